"""`l4 extend-context` through its entry point: stages, what they carry over, stops and goes on."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_extension import extend, make_start, options_of, start_extending
from tiny_pretrain import metrics_of, only_error, wait_for, weights_of

from l4cli.checkpoint import load_model, load_training_state
from l4cli.cli import main


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    make_start(data, folder)
    return folder


def adam_steps(checkpoint: Path) -> float:
    return float(load_training_state(checkpoint)["optimizer"]["lm_head.weight.step"])


def test_stages_follow_each_other_and_latest_is_the_last(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert extend(start, out, "--json") == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [e["event"] for e in events] == ["stage", *["step"] * 3, "stage", *["step"] * 4, "done"]
    assert [e["seq_len"] for e in events if e["event"] == "stage"] == [128, 256]
    assert events[-1]["checkpoint"] == str(out / "stage-2-256" / "step-000004")
    assert os.readlink(out / "latest") == "stage-2-256/step-000004"
    # The learning rate warms up and decays in each stage, from a share of the first run's.
    peak = json.loads((start / "base/latest/l4/state.json").read_text())["state"]["identity"]
    rates = [e["lr"] for e in events if e["event"] == "step"]
    assert rates[0] == rates[3] == pytest.approx(0.75 * peak["options"]["lr"])
    assert rates[2] < rates[1]
    assert rates[6] < rates[5] < rates[4]
    assert load_model(out).config.text.max_position_embeddings == 1024
    # Again: nothing is left to do, and nothing is done.
    before = weights_of(out)
    assert extend(start, out) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out / "stage-2-256" / "step-000004")
    assert "stage 1 is finished" in captured.err
    assert "packing" not in captured.err
    assert weights_of(out) == before
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latest"] == "stage-2-256/step-000004"
    # A further stage begins where the last one ended.
    more = ["--stages", "128:1536,256:2048,512:1024", "-q"]
    assert extend(start, out, *more) == 0
    assert os.readlink(out / "latest") == "stage-3-512/step-000002"


def test_optimizer_state_carries_over_unless_told_otherwise(start: Path, tmp_path: Path) -> None:
    assert extend(start, tmp_path / "kept", "-q") == 0
    assert adam_steps(tmp_path / "kept" / "stage-1-128" / "latest") == 4 + 3
    assert adam_steps(tmp_path / "kept" / "latest") == 4 + 3 + 4
    assert extend(start, tmp_path / "reset", "-q", "--reset-optimizer") == 0
    # From one stage to the next it is kept all the same.
    assert adam_steps(tmp_path / "reset" / "latest") == 3 + 4
    assert weights_of(tmp_path / "kept") != weights_of(tmp_path / "reset")


def test_one_stage_is_pretraining_from_where_it_stood(start: Path, tmp_path: Path) -> None:
    """The oracle of a stage: a plain run over the shards it packed, from the same moments."""
    from l4cli.training import continuation

    out = tmp_path / "run"
    stage = ["--stages", "128:1536", "--schedule", "constant", "--warmup", "0", "--lr", "1e-3"]
    assert extend(start, out, *stage, "-q", "--reset-optimizer") == 0
    record = (out / "stage-1-128" / "run.toml").read_text()
    specs = json.loads(record.split("data_paths = ")[1].splitlines()[0])
    words = ["pretrain", *specs, "--init-from", str(start / "base/latest"), "--batch-size", "4"]
    words += ["--steps", "3", *stage[2:], "-o", str(tmp_path / "plain"), "-q"]
    assert main(words) == 0
    assert weights_of(tmp_path / "plain") == weights_of(out)
    assert continuation.fingerprint(out / "latest") != continuation.fingerprint(
        start / "base/latest"
    )


def test_a_signal_in_the_second_stage_and_the_same_command_give_the_same_bits(
    start: Path, tmp_path: Path
) -> None:
    long = ["--stages", "128:1536,256:16k", "--save-every", "0", "-q"]
    words = options_of(start, tmp_path / "cut", *long)
    process = start_extending(words)
    wait_for(tmp_path / "cut" / "stage-2-256" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert stdout == ""
    # The first stage is whole, and so is what `latest` names.
    assert os.readlink(tmp_path / "cut" / "latest") == "stage-1-128/step-000003"
    assert 0 < int((tmp_path / "cut/stage-2-256/latest").resolve().name[5:]) < 32
    assert extend(start, tmp_path / "cut", *long) == 0
    assert extend(start, tmp_path / "straight", *long) == 0
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "straight")
    for stage in ("stage-1-128", "stage-2-256"):
        assert metrics_of(tmp_path / "cut" / stage) == metrics_of(tmp_path / "straight" / stage)


def test_other_options_are_refused_by_name(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert extend(start, out, "-q") == 0
    capsys.readouterr()
    for more, words in (
        (["--lr", "1e-4"], "`lr` was"),
        (["--floor-scale", "64"], "`model.floor_scale` was"),
        (["--long-fraction", "0.5"], "`data` was"),
        (["--stages", "128:1536,512:2048"], "it has `stage-2-256`"),
        (["--stages", "128:9999,256:2048"], "`stage-2-256` has begun from its last checkpoint"),
        (["--fresh"], "needs a new or empty folder"),
    ):
        assert extend(start, out, "-q", *more) == 2, more
        assert words in only_error(capsys)
    # More tokens in the last stage are more steps.
    assert extend(start, out, "-q", "--stages", "128:1536,256:3072") == 0
    assert os.readlink(out / "latest") == "stage-2-256/step-000006"


def test_what_is_changed_stands_in_the_config(start: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["--attn-scale", "0.3", "--floor-scale", "32", "--attention-chunk-size", "32,64"]
    more += ["--rope-scaling", "yarn", "--set", "max_position_embeddings=128", "-q"]
    assert extend(start, out, *more) == 0
    for stage, length, chunk in (("stage-1-128", 128, 32), ("stage-2-256", 256, 64)):
        keys = json.loads((out / stage / "latest" / "config.json").read_text())
        assert keys["attn_scale"] == 0.3
        assert keys["floor_scale"] == 32
        assert keys["attention_chunk_size"] == chunk
        assert keys["max_position_embeddings"] == length
        assert keys["rope_scaling"] == {
            "rope_type": "yarn",
            "factor": length / 64,
            "original_max_position_embeddings": 64,
        }
        assert keys["model_type"] == "llama4_text"


def test_scalable_softmax_comes_in_with_a_temperature_of_one_and_learns(
    start: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stages = ["--stages", "128:1536", "--batch-tokens", "512", "-q", "--scalable-softmax"]
    still = [*stages, "--lr", "1e-30"]  # nothing moves, so the first values are found again
    assert extend(start, tmp_path / "still", *still) == 0
    scale = load_model(tmp_path / "still").model.layers[1].self_attn.softmax_scale
    assert scale.tolist() == pytest.approx([1 / math.log(64)] * 2)
    assert extend(start, out, *stages) == 0
    keys = json.loads((out / "latest" / "config.json").read_text())
    assert keys["model_type"] == "l4_text"
    assert keys["scalable_softmax"]
    assert not keys["attn_temperature_tuning"]
    learned = load_model(out).model.layers[1].self_attn.softmax_scale
    assert not torch.equal(learned, scale)


def test_dry_run_shows_every_stage_and_writes_nothing(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extend(start, tmp_path / "run", "--dry-run", "--json") == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(p["stage"], p["seq_len"], p["num_steps"]) for p in plans] == [(1, 128, 3), (2, 256, 4)]
    assert all(p["fits"] and p["bytes_total"] > 0 and p["time_s"] > 0 for p in plans)
    assert not (tmp_path / "run").exists()


def test_a_stage_beyond_memory_is_refused_before_any_is_trained(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ["--stages", "128:1536,16m:16M", "--long-fraction", "0", "-q"]
    assert extend(start, tmp_path / "run", *long, "--no-activation-checkpointing") == 1
    error = only_error(capsys)
    assert "stage 2 does not fit this machine" in error
    assert "rows of 16777216 need" in error
    assert "add `--activation-checkpointing`" in error
    assert not (tmp_path / "run" / "stage-1-128").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trained-length", "1"], "rows of two tokens"),
        (["--gate", "0.5"], "`--gate` cannot test stage 1"),
        (["--stages", "2k"], "no length and number of tokens"),
        (["--stages", "256:1k,128:1k"], "stage 2 has 128 tokens after 256"),
        (["--stages", "0:1k"], "not a whole number above 0"),
        (["--stages", "128:zero"], "cannot use `--stages zero`"),
        (["--lr", "1e-3,1e-3,1e-3"], "3 values for 2 stages"),
        (["--lr", "fast"], "cannot use `--lr fast`"),
        (["--lr", "1e-4", "--min-lr", "1e-3"], "cannot use `--min-lr 0.001`"),
        (["--attention-chunk-size", "1"], "sees nothing but itself"),
        (["--rope-scaling", "yarm"], "did you mean `yarn`?"),
        (["--rope-scaling", "yarn:0.5"], "not a number above 1"),
        (["--rope-scaling", "ntk", "--rope-theta", "5e5"], "both set the base"),
        (["--rope-scope", "full"], "nothing of RoPE is changed"),
        (["--rope-scope", "full", "--rope-theta", "5e5"], "no RoPE layer that attends in full"),
        (["--scalable-softmax", "--attn-scale", "0.3"], "each scale the same queries"),
        (["--no-temperature", "--attn-scale", "0.3"], "temperature is off"),
        (["--optim", "adamw"], "optimizer state is of `muon`"),
        (["--set", "hidden_size=64"], "leave out `--set hidden_size=64`"),
        (["--set", "floor_scale=0"], "`floor_scale` is 0"),
        (["--long-fraction", "1.5"], "--long-fraction"),
        (["--trained-length", "x"], "cannot use `--trained-length x`"),
        (["--batch-tokens", "0"], "cannot use `--batch-tokens 0`"),
    ],
)
def test_wrong_usage(
    start: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    assert extend(start, tmp_path / "run", *options) == 2
    assert words in only_error(capsys)
    assert not (tmp_path / "run").exists()


def test_streams_that_do_not_fit_are_refused_first(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = str(start / "base" / "latest"), ["-o", str(tmp_path / "run")]
    stages = ["--stages", "512:2k,1k:4k"]
    assert main(["extend-context", base, *stages, *out]) == 2
    assert "no token stream was named, and nothing is to be made" in only_error(capsys)
    assert main(["extend-context", base, "-", *stages, *out]) == 2
    assert "it has to be a file" in only_error(capsys)
    assert main(["extend-context", base, str(tmp_path / "none"), *stages, *out]) == 1
    assert "there is no such file" in only_error(capsys)
    (tmp_path / "a.txt").write_text("several words to learn from, several words to learn from")
    tokenizer = str(tmp_path / "tok")
    words = [str(tmp_path / "a.txt"), "--vocab-size", "290", "-o", tokenizer, "-q"]
    assert main(["train-tokenizer", *words]) == 0
    words = [str(tmp_path / "a.txt"), "--tokenizer", tokenizer, "-o", str(tmp_path / "a.tokens")]
    assert main(["tokenize", *words, "-q"]) == 0
    capsys.readouterr()
    assert main(["extend-context", base, str(tmp_path / "a.tokens"), *stages, *out]) == 2
    assert "another tokenizer" in only_error(capsys)
    assert not (tmp_path / "run").exists()
    # Nothing in the stream reaches half of the second stage's rows.
    assert main(["extend-context", base, str(start / "books.tokens"), *stages, *out]) == 1
    error = only_error(capsys)
    assert "stage 2 has no long documents" in error
    assert "none of 60 documents has 512 tokens" in error
    assert "the longest has 281" in error
