"""`l4 pretrain` through its entry point: it trains, continues, and refuses what it must."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from l4cli.cli import main

TINY = {
    "model_type": "llama4_text",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 16,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}
TIMINGS = {"tok_per_sec", "mfu", "mem_gib"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text/`, `held/` and `pictures/` shards, `tiny.json`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    for name, lines in (("text", 400), ("held", 30)):
        text = "".join(f"line {i} says {i * 7919 % 1000} and ends\n" for i in range(lines))
        (folder / f"{name}.txt").write_text(text)
        _pack(folder, name, f"{name}.txt", "--format", "lines")
    rows = []
    for i in range(8):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).rectangle((8, 8, 20 + 4 * i, 40), fill=(255, 30 * i, 0))
        picture.save(folder / f"{i}.png")
        rows.append({"text": f"<|image|> a box {i} wide", "images": [f"{i}.png"]})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _pack(folder, "pictures", "pictures.jsonl", "--preset", "nano")
    return folder


def _pack(folder: Path, name: str, file: str, *options: str) -> None:
    stream = folder / f"{name}.tokens"
    assert main(["tokenize", str(folder / file), "-o", str(stream), "-q", *options]) == 0
    shards = str(folder / name)
    assert main(["pack", str(stream), "--seq-len", "64", "-o", shards, "-q"]) == 0


def _options(data: Path, out: Path, *more: str) -> list[str]:
    tiny = ["--config", str(data / "tiny.json"), "--batch-size", "4", "--log-every", "2"]
    return [str(data / "text"), *tiny, "-o", str(out), *more]


def _train(data: Path, out: Path, *more: str) -> int:
    return main(["pretrain", *_options(data, out, *more)])


def _metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]


def _weights(folder: Path) -> bytes:
    return (folder / "latest" / "model.safetensors").read_bytes()


def _as_many_threads() -> dict[str, str]:
    """The last bits of a run depend on the threads, so a process gets as many as we have."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _start(args: list[str], **kwargs: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "l4cli", "pretrain", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_as_many_threads(),
        **kwargs,  # type: ignore[call-overload]
    )


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    assert "fix:" in captured.err
    return captured.err


def test_trains_evaluates_and_says_so_in_json(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    held_out = ["--eval-data", str(data / "held"), "--eval-every", "3"]
    assert _train(data, out, "--steps", "6", "--json", *held_out) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [(e["event"], e.get("step")) for e in events] == [
        ("step", 2),
        ("eval", 3),
        ("step", 4),
        ("step", 6),
        ("eval", 6),
        ("done", None),
    ]
    assert {"loss", "lr", "grad_norm", "num_tokens", "expert_load"} <= events[0].keys()
    assert events[0].keys() >= TIMINGS
    assert events[1]["bits_per_byte"] > 0
    assert events[3]["loss"] < events[0]["loss"]
    assert events[-1]["checkpoint"] == str(out / "step-000006")
    assert [json.loads(x) for x in (out / "metrics.jsonl").open()] == events[:-1]
    record = tomllib.loads((out / "run.toml").read_text())
    assert record["options"]["num_steps"] == 6
    assert record["options"]["model"]["hidden_size"] == 32
    assert record["environment"]["code"].startswith("0.")


def test_the_same_command_says_finished_and_more_steps_continue(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _train(data, out, "--steps", "3") == 0
    before = _weights(out)
    capsys.readouterr()
    assert _train(data, out, "--steps", "3") == 0
    captured = capsys.readouterr()
    assert "finished" in captured.err
    assert captured.out.strip() == str(out / "step-000003")
    assert _weights(out) == before
    assert _train(data, out, "--steps", "8", "--decay-frac", "0.2") == 0
    captured = capsys.readouterr()
    assert "continuing from" in captured.err
    assert "goes back up" in captured.err  # the shorter run had begun its decay
    assert (out / "latest").resolve().name == "step-000008"


def test_another_thread_count_continues_with_a_warning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _train(data, tmp_path / "run", "--steps", "2") == 0
        torch.set_num_threads(2)
        assert _train(data, tmp_path / "run", "--steps", "3") == 0
    finally:
        torch.set_num_threads(before)
    assert "warning: `num_threads` was 1 and is now 2" in capsys.readouterr().err


def test_other_options_are_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _train(data, out, "--steps", "2") == 0
    capsys.readouterr()
    assert _train(data, out, "--steps", "2", "--lr", "0.5", "--set", "rope_theta=5e5") == 2
    error = _error(capsys)
    assert "`lr` was" in error
    assert "`model.rope_theta` was 10000.0, now 500000.0" in error
    assert _train(data, out, "--steps", "1") == 2
    assert "`steps` was 2, now 1" in _error(capsys)
    assert _train(data, out, "--steps", "2", "--fresh") == 2
    assert "new or empty folder" in _error(capsys)
    # How often to save and to log is no part of what the run is.
    assert _train(data, out, "--steps", "3", "--log-every", "1", "--save-every", "1") == 0


def test_killed_at_any_instant_ends_where_a_straight_run_ends(data: Path, tmp_path: Path) -> None:
    held_out = ["--eval-data", str(data / "held"), "--eval-every", "7"]
    length = ["--steps", "30", "--save-every", "3", "-q", *held_out]
    assert _train(data, tmp_path / "straight", *length) == 0
    driver = Path(__file__).parent / "pretrain_driver.py"
    for when, kills in (("any", 6), ("saving", 8)):
        out = tmp_path / when
        done = subprocess.run(
            [sys.executable, driver, "0", str(kills), when, *_options(data, out, *length)],
            capture_output=True,
            text=True,
            env=_as_many_threads(),
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split("kills ")[1]) >= 2, "too fast to be killed"
        assert _weights(out) == _weights(tmp_path / "straight")
        assert _metrics(out) == _metrics(tmp_path / "straight")
        assert not list(out.glob(".step*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_continues(
    data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    length = ["--steps", "150", "--save-every", "0", "-q", "--log-every", "20"]
    out = tmp_path / "cut"
    process = _start(_options(data, out, *length))
    _wait_for(out / "metrics.jsonl", process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stdout == ""
    assert 20 <= int((out / "latest").resolve().name.removeprefix("step-")) < 150
    assert _train(data, out, *length) == 0
    assert _train(data, tmp_path / "straight", *length) == 0
    assert _weights(out) == _weights(tmp_path / "straight")
    assert _metrics(out) == _metrics(tmp_path / "straight")


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_second_process_in_the_same_folder_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    process = _start(_options(data, out, "--steps", "100000", "-q"))
    _wait_for(out / "metrics.jsonl", process)
    assert _train(data, out, "--steps", "100000", "-q") == 1
    assert f"process {process.pid} is writing to it" in _error(capsys)
    process.kill()
    process.communicate()


def test_a_full_disk_keeps_the_previous_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    out = tmp_path / "run"
    assert _train(data, out, "--steps", "2", "-q") == 0
    before = _weights(out)
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = _train(data, out, "--steps", "4", "-q", "--save-every", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert code == 1
    assert "cannot save step 4" in _error(capsys)
    assert _weights(out) == before
    assert _train(data, out, "--steps", "4", "-q") == 0


def test_pictures_and_text_together(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shards = [f"{data / 'pictures'}:0.5", f"{data / 'text'}:0.5"]
    sizes = ["--set", "hidden_size=64", "--set", "intermediate_size=64"]
    length = ["--steps", "4", "--batch-size", "4", "--log-every", "1", "-q"]
    assert main(["pretrain", *shards, "--preset", "nano", *sizes, *length, "-o", str(out)]) == 0
    assert (out / "latest" / "preprocessor_config.json").exists()
    assert all(event["loss"] < 8 for event in _metrics(out))
    for half in ("text", "vision"):
        more = [*length, "--freeze", half, "--init-from", str(out / "latest")]
        more += ["--dtype", "bf16", "--activation-checkpointing", "--optim", "adamw"]
        assert main(["pretrain", *shards, *more, "-o", str(tmp_path / half)]) == 0


def test_a_model_too_large_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scout"
    began = time.process_time()
    shards = str(data / "text")
    assert main(["pretrain", shards, "--preset", "scout", "-o", str(out)]) == 1
    assert time.process_time() - began < 5
    error = _error(capsys)
    assert "`scout` does not fit this machine" in error
    assert "weights 404.7 GiB" in error
    assert "`--preset " in error
    assert not out.exists()


def test_dry_run_shows_the_figures_and_makes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _train(data, out, "--steps", "10", "--dry-run", "--json") == 0
    (event,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert event["tokens_per_step"] == 256
    assert event["num_tokens"] == 2560
    parts = [v for k, v in event.items() if k.startswith("bytes_")]
    assert event["bytes_total"] * 2 + event["bytes_available"] == sum(parts)
    assert event["bytes_weights"] == 4 * event["num_parameters"]
    assert _train(data, out, "--steps", "10", "--dry-run") == 0
    assert "flops_per_token" in capsys.readouterr().out
    scout = ["pretrain", str(data / "text"), "--preset", "scout", "--dry-run", "-o", str(out)]
    assert main(scout) == 0
    assert "404.7 GiB" in capsys.readouterr().out
    assert not out.exists()


def test_vocabulary_follows_the_shards_or_has_to_hold_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _train(data, out, "--steps", "1", "--set", "vocab_size=100") == 2
    error = _error(capsys)
    assert "the model 100" in error
    assert "--set vocab_size=277" in error
    assert main(["pretrain", str(data / "text"), "--steps", "1", "-o", str(out), "-q"]) == 0
    config = json.loads((out / "latest" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 320
    assert config["text_config"]["bos_token_id"] == 256
    assert config["image_token_index"] == 274


def test_pictures_of_another_geometry_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = str(data / "pictures")
    assert main(["pretrain", pictures, "--preset", "mini", "-o", str(tmp_path / "a")]) == 2
    assert "`image_size` is 64, the model's 112" in _error(capsys)
    config = ["--config", str(data / "tiny.json"), "-o", str(tmp_path / "b")]
    assert main(["pretrain", pictures, *config]) == 2
    assert "has no vision" in _error(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "hiden_size=3"], "did you mean `hidden_size`?"),
        (["--set", "text_config.hidden_sise=3"], "did you mean `text_config.hidden_size`?"),
        (["--set", "hidden_size=abc"], "`hidden_size` is a whole number"),
        (["--set", "hidden_size"], "it has no `=`"),
        (["--set", "num_key_value_heads=3"], "does not divide"),
        (["--set", "image_size=3"], "has no vision"),
        (["--steps", "3", "--tokens", "4M"], "give one of them"),
        (["--tokens", "4X"], "cannot use `--tokens 4X`"),
        (["--epochs", "0"], "cannot use `--epochs 0.0`"),
        (["--lr", "-1"], "cannot use `--lr -1.0`"),
        (["--lr", "1e-3", "--min-lr", "1"], "cannot use `--min-lr 1`"),
        (["--seq-len", "128"], "rows of 64 tokens"),
        (["--preset", "nano"], "each brings a shape of its own"),
        (["--micro-batch-size", "3"], "does not divide"),
        (["--freeze", "vision"], "no vision"),
        (["--balance", "maybe"], "maybe"),
        (["--seq-len", "4x"], "cannot use `--seq-len 4x`"),
        (["--seed", str(2**64)], "--seed"),
        (["--epochs", "1e300"], "cannot use `--epochs 1e+300`"),
        (["--set", "max_position_embeddings=32"], "rows of 64 tokens are too long"),
        (["--set", "initializer_range=0.5"], "cannot set `initializer_range`"),
        (["--set", "rope_theta=0"], "`rope_theta` is 0"),
        (["--optim", "sgd"], "sgd"),
    ],
)
def test_wrong_usage(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    assert _train(data, tmp_path / "run", *options) == 2
    assert words in _error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("patch_size=0", "`patch_size` is 0"),
        ("pixel_shuffle_ratio=0", "`pixel_shuffle_ratio` is 0"),
        ("vision_config.num_attention_heads=0", "`num_attention_heads` is 0"),
        ("vision_config.num_hidden_layers=-1", "`num_hidden_layers` is -1"),
        ("num_channels=1", "`num_channels` is 1"),
    ],
)
def test_impossible_vision_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    options = [str(data / "pictures"), "--preset", "nano", "--set", word, "-o", str(tmp_path / "r")]
    assert main(["pretrain", *options]) == 2
    assert said in _error(capsys)
    assert not (tmp_path / "r").exists()


def test_several_ranks_are_refused(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert _train(data, tmp_path / "run") == 2
    assert "cannot train on several ranks" in _error(capsys)
    assert not (tmp_path / "run").exists()
    # Whoever starts us may set these for every program; only training is of several ranks.
    assert main(["info", "preset:nano"]) == 0
    assert "num_hidden_layers" in capsys.readouterr().out


def test_held_out_pictures_are_checked_against_the_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tmp_path / "wide"
    stream = tmp_path / "wide.tokens"
    rows = str(data / "pictures.jsonl")
    assert main(["tokenize", rows, "-o", str(stream), "-q", "--preset", "mini"]) == 0
    assert main(["pack", str(stream), "--seq-len", "64", "-o", str(wide), "-q"]) == 0
    nano = [str(data / "text"), "--preset", "nano", "--steps", "1", "--batch-size", "2", "-q"]
    capsys.readouterr()
    bad = ["pretrain", *nano, "--eval-data", str(wide), "-o", str(tmp_path / "bad")]
    assert main(bad) == 2
    assert "do not fit the model" in _error(capsys)
    assert not (tmp_path / "bad").exists()
    # Training on text alone says nothing about pictures; the model does.
    good = ["--eval-data", str(data / "pictures"), "-o", str(tmp_path / "good")]
    assert main(["pretrain", *nano, *good]) == 0


def test_starting_from_weights_of_another_shape_is_refused_first(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(data, tmp_path / "first", "--steps", "1", "-q") == 0
    capsys.readouterr()
    options = [str(data / "text"), "--init-from", str(tmp_path / "first")]
    options += ["--set", "hidden_size=64", "-o", str(tmp_path / "second")]
    assert main(["pretrain", *options]) == 2
    assert "leave out `--set hidden_size=64`" in _error(capsys)
    assert not (tmp_path / "second").exists()


def test_moved_shards_and_a_name_that_is_no_utf8_continue(data: Path, tmp_path: Path) -> None:
    moved = tmp_path / os.fsdecode(b"caf\xe9")
    assert _train(data, tmp_path / "run", "--steps", "1", "-q") == 0
    shutil.copytree(data / "text", moved)
    words = _options(data, tmp_path / "run", "--steps", "2", "-q")
    assert main(["pretrain", str(moved), *words[1:]]) == 0
    assert (tmp_path / "run" / "step-000002").is_dir()


def test_lines_nobody_reads_end_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = _start([*_options(data, out, "--steps", "400", "--json"), "--save-every", "0"])
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert (out / "latest" / "model.safetensors").is_file()


def test_wrong_files(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", str(data / "nothing"), "-o", str(out)]) == 1
    assert "there is no such folder" in _error(capsys)
    assert main(["pretrain", str(data / "text"), "--preset", "nan", "-o", str(out)]) == 2
    assert "did you mean `nano`?" in _error(capsys)
    damaged = tmp_path / "damaged"
    shutil.copytree(data / "text", damaged)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert _train(data, out, "--eval-data", str(damaged)) == 1
    _error(capsys)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert _train(data, foreign, "--steps", "1") == 2
    assert "belongs to something else" in _error(capsys)


def test_a_damaged_checkpoint_is_refused_with_the_way_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _train(data, out, "--steps", "4", "-q", "--save-every", "2") == 0
    straight = _weights(out)
    newest = out / "step-000004"
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert _train(data, out, "--steps", "6", "-q") == 1
    assert f"remove `{newest}`" in _error(capsys)
    shutil.rmtree(newest)
    assert _train(data, out, "--steps", "4", "-q") == 0
    assert _weights(out) == straight
