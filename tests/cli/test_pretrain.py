"""`l4 pretrain` through its entry point: it trains, stops, continues."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny_pretrain import (
    TIMINGS,
    as_many_threads,
    metrics_of,
    only_error,
    pretrain,
    run_options,
    start_process,
    wait_for,
    weights_of,
)

from l4cli.cli import main


def test_trains_evaluates_and_says_so_in_json(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    held_out = ["--eval-data", str(data / "held"), "--eval-every", "3"]
    assert pretrain(data, out, "--steps", "6", "--json", *held_out) == 0
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
    assert pretrain(data, out, "--steps", "3") == 0
    before = weights_of(out)
    capsys.readouterr()
    assert pretrain(data, out, "--steps", "3") == 0
    captured = capsys.readouterr()
    assert "finished" in captured.err
    assert captured.out.strip() == str(out / "step-000003")
    assert weights_of(out) == before
    assert pretrain(data, out, "--steps", "8", "--decay-frac", "0.2") == 0
    captured = capsys.readouterr()
    assert "continuing from" in captured.err
    assert "goes back up" in captured.err  # the shorter run had begun its decay
    assert (out / "latest").resolve().name == "step-000008"


def test_another_thread_count_continues_with_a_warning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert pretrain(data, tmp_path / "run", "--steps", "2") == 0
        torch.set_num_threads(2)
        assert pretrain(data, tmp_path / "run", "--steps", "3") == 0
    finally:
        torch.set_num_threads(before)
    assert "warning: `num_threads` was 1 and is now 2" in capsys.readouterr().err


def test_killed_at_any_instant_ends_where_a_straight_run_ends(data: Path, tmp_path: Path) -> None:
    held_out = ["--eval-data", str(data / "held"), "--eval-every", "7"]
    length = ["--steps", "30", "--save-every", "3", "-q", *held_out]
    assert pretrain(data, tmp_path / "straight", *length) == 0
    driver = Path(__file__).parent / "pretrain_driver.py"
    for when, kills in (("any", 6), ("saving", 8)):
        out = tmp_path / when
        done = subprocess.run(
            [sys.executable, driver, "0", str(kills), when, *run_options(data, out, *length)],
            capture_output=True,
            text=True,
            env=as_many_threads(),
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split("kills ")[1]) >= 2, "too fast to be killed"
        assert weights_of(out) == weights_of(tmp_path / "straight")
        assert metrics_of(out) == metrics_of(tmp_path / "straight")
        assert not list(out.glob(".step*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_continues(
    data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    length = ["--steps", "150", "--save-every", "0", "-q", "--log-every", "20"]
    out = tmp_path / "cut"
    process = start_process(run_options(data, out, *length))
    wait_for(out / "metrics.jsonl", process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stdout == ""
    assert 20 <= int((out / "latest").resolve().name.removeprefix("step-")) < 150
    assert pretrain(data, out, *length) == 0
    assert pretrain(data, tmp_path / "straight", *length) == 0
    assert weights_of(out) == weights_of(tmp_path / "straight")
    assert metrics_of(out) == metrics_of(tmp_path / "straight")


def test_a_second_process_in_the_same_folder_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    process = start_process(run_options(data, out, "--steps", "100000", "-q"))
    wait_for(out / "metrics.jsonl", process)
    assert pretrain(data, out, "--steps", "100000", "-q") == 1
    assert f"process {process.pid} is writing to it" in only_error(capsys)
    process.kill()
    process.communicate()


def test_a_full_disk_keeps_the_previous_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    out = tmp_path / "run"
    assert pretrain(data, out, "--steps", "2", "-q") == 0
    before = weights_of(out)
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = pretrain(data, out, "--steps", "4", "-q", "--save-every", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert code == 1
    assert "cannot save step 4" in only_error(capsys)
    assert weights_of(out) == before
    assert pretrain(data, out, "--steps", "4", "-q") == 0


def test_pictures_and_text_together(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shards = [f"{data / 'pictures'}:0.5", f"{data / 'text'}:0.5"]
    sizes = ["--set", "hidden_size=64", "--set", "intermediate_size=64"]
    length = ["--steps", "4", "--batch-size", "4", "--log-every", "1", "-q"]
    assert main(["pretrain", *shards, "--preset", "nano", *sizes, *length, "-o", str(out)]) == 0
    assert (out / "latest" / "preprocessor_config.json").exists()
    assert all(event["loss"] < 8 for event in metrics_of(out))
    for half in ("text", "vision"):
        more = [*length, "--freeze", half, "--init-from", str(out / "latest")]
        more += ["--dtype", "bf16", "--activation-checkpointing", "--optim", "adamw"]
        assert main(["pretrain", *shards, *more, "-o", str(tmp_path / half)]) == 0


def test_experts_in_fp8(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Emulated on a CPU, which it says: near bf16's losses, and not the same."""
    wide = ["--set", "hidden_size=128", "--set", "intermediate_size=128"]
    losses = []
    for dtype in ("bf16", "fp8"):
        length = ["--steps", "3", "--log-every", "1", "--dtype", dtype, *wide]
        assert pretrain(data, tmp_path / dtype, *length) == 0
        losses.append([m["loss"] for m in metrics_of(tmp_path / dtype) if "loss" in m])
        said = "`--dtype fp8` is emulated here, slower than bf16: " in capsys.readouterr().err
        assert said == (dtype == "fp8")
    bf16, fp8 = losses
    assert fp8[2] < fp8[0] - 0.05
    assert fp8[0] != bf16[0]
    assert fp8 == pytest.approx(bf16, rel=0.02)


def test_moved_shards_and_a_name_that_is_no_utf8_continue(data: Path, tmp_path: Path) -> None:
    moved = tmp_path / os.fsdecode(b"caf\xe9")
    assert pretrain(data, tmp_path / "run", "--steps", "1", "-q") == 0
    shutil.copytree(data / "text", moved)
    words = run_options(data, tmp_path / "run", "--steps", "2", "-q")
    assert main(["pretrain", str(moved), *words[1:]]) == 0
    assert (tmp_path / "run" / "step-000002").is_dir()


def test_lines_nobody_reads_end_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start_process(
        [*run_options(data, out, "--steps", "400", "--json"), "--save-every", "0"]
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert (out / "latest" / "model.safetensors").is_file()


def test_dry_run_shows_the_figures_and_makes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(data, out, "--steps", "10", "--dry-run", "--json") == 0
    (event,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert event["tokens_per_step"] == 256
    assert event["num_tokens"] == 2560
    parts = [v for k, v in event.items() if k.startswith("bytes_")]
    assert event["bytes_total"] * 2 + event["bytes_available"] == sum(parts)
    assert event["bytes_weights"] == 4 * event["num_parameters"]
    assert pretrain(data, out, "--steps", "10", "--dry-run") == 0
    assert "flops_per_token" in capsys.readouterr().out
    scout = ["pretrain", str(data / "text"), "--preset", "scout", "--dry-run", "-o", str(out)]
    assert main(scout) == 0
    assert "404.7 GiB" in capsys.readouterr().out
    assert not out.exists()
