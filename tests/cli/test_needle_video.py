"""`l4 needle-test` in films and pictures, through the front door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_chat import save_checkpoint

from l4cli.cli import main

GRID = ["--frames", "3,6", "--depths", "2", "--samples", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that sees, with room for 512 tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run(*args: object) -> int:
    return main(["needle-test", *map(str, args)])


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_grid_of_films_and_pictures(model, tmp_path, capsys) -> None:
    out = tmp_path / "report"
    words = [model, "--tasks", "video,pictures", *GRID, "-o", out, "--json"]
    assert run(*words) == 0
    events = lines(capsys.readouterr().out)
    cells = [event for event in events if event["event"] == "cell"]
    assert [(c["task"], c["length"], c["depth"]) for c in cells] == [
        (task, length, depth)
        for task in ("video", "pictures")
        for length in (3, 6)
        for depth in (0.0, 100.0)
    ]
    assert all(c["num_samples"] == 2 for c in cells)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["unit"], summary["tokens_per_frame"]) == ("frames", 4 + 3)
    assert set(summary["controls"]) == {"no_needle", "closed_book"}
    with Image.open(out / "heatmap.png") as picture:
        assert picture.width > 100
    before = (out / "results.jsonl").read_bytes()
    records = lines(before.decode())
    # Films: 2 lengths x 2 depths x 2 tests, 2 x 2 without needles, 2 x 2 questions alone. Albums
    # are asked for all depths: 2 x 2 tests, 2 without numbers, 2 questions alone.
    assert len(records) == 8 + 4 + 4 + 4 + 2 + 2
    read = [r["num_tokens"] for r in records if r["role"] == "test" and r["task"] == "video"]
    asked = len("One frame of the video shows a number. Which number is it?\n") + 2
    assert read == [1 + 7 * 3 + asked] * 4 + [1 + 7 * 6 + asked] * 4
    # Again: nothing is read, everything is told.
    assert run(*words) == 0
    shown = capsys.readouterr()
    assert lines(shown.out) == events
    assert "all 24 films of this test already" in shown.err
    assert (out / "results.jsonl").read_bytes() == before
    assert run(*words, "--fps", "2") == 2
    assert "`fps` was 1.0, now 2.0" in capsys.readouterr().err
    assert run(*words, "--set", "attn_scale=0.5") == 2
    assert "`set` was not set, now attn_scale=0.5" in capsys.readouterr().err


def test_hours_are_another_axis(model, tmp_path, capsys) -> None:
    out = tmp_path / "report"
    words = ["--hours", "0.002,0.004", "--fps", "0.5", "--depths", "1", "--samples", "1"]
    assert run(model, *words, "--no-controls", "-o", out) == 0
    shown = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["frames"] == [4, 7]
    assert [cell["length"] for cell in summary["cells"]] == [4, 7]
    assert "lengths are frames at 0.5 a second; each is 7 tokens" in shown.out


def test_beyond_what_the_model_claims_is_a_warning(model, tmp_path, capsys) -> None:
    words = ["--frames", "80", "--depths", "1", "--samples", "1", "--no-controls"]
    assert run(model, *words, "-o", tmp_path / "report") == 0
    assert "560 tokens are more than `max_position_embeddings` (512)" in capsys.readouterr().err


def test_a_model_below_the_bar_is_exit_1(model, tmp_path, capsys) -> None:
    words = ["--tasks", "video", *GRID, "--require", "0.95", "-o", tmp_path / "report"]
    assert run(model, *words) == 1
    assert "below `--require 0.95`" in capsys.readouterr().err


def test_the_plan_for_hours_of_film(capsys) -> None:
    """Scout, 147 tokens a frame; keys and values of its 12 layers that see everything in bf16."""
    words = ["--dry-run", "--preset", "scout", "--gpus", "8xh100", "--hours", "0.1,1,20"]
    assert run(*words, "--fps", "1", "--json") == 0
    *plans, total = lines(capsys.readouterr().out)
    assert [plan["num_frames"] for plan in plans] == [360, 3600, 72000]
    assert [plan["length"] for plan in plans] == [147 * n for n in (360, 3600, 72000)]
    assert plans[2]["hours"] == pytest.approx(20)
    per_token = 12 * 2 * 8 * 128 * 2
    local = 36 * 2 * 8 * 128 * 2 * 8192
    assert plans[2]["bytes_kv"] == 72000 * 147 * per_token + local
    assert not plans[2]["fits"]
    assert plans[2]["bytes_total_layer_major"] < plans[2]["bytes_total"] / 10
    # 11 depths x 5 films, and at each depth one without a needle.
    assert [plan["num_texts"] for plan in plans] == [66, 66, 66]
    assert total["total_time_s"] == pytest.approx(sum(plan["total_time_s"] for plan in plans))
    # Encoding the tiles is a part of it: 871,932,416 weights, about 577 positions a tile.
    flops = plans[2]["vision_time_s"] * 420e12 * 8 * 0.92
    assert 0.8 < flops / (72000 * 2 * 811e6 * 577) < 1.4
    assert run(*words) == 0
    shown = capsys.readouterr().out
    assert "20h00m" in shown
    assert "10.58M" in shown


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--frames", "8,4"], 2, "should rise"),
        (["--frames", "8,x"], 2, "not a whole number"),
        (["--frames", "1"], 2, "at least 2"),
        (["--hours", "0"], 2, "no number of hours above 0"),
        (["--hours", "1e308", "--fps", "1000"], 2, "frames are not among"),
        (["--hours", "nan"], 2, "no number of hours above 0"),
        (["--hours", "1", "--frames", "8"], 2, "both say how long"),
        (["--tasks", "video,single"], 2, "`single` among tasks with frames"),
        (["--tasks", "vidoe", "--frames", "8"], 2, "did you mean `video`?"),
        (["--tasks", "pictures", "--hours", "1"], 2, "no length in time"),
        (["--tasks", "video", "--haystack", "README.md"], 2, "`--haystack` with frames"),
        (["--frames", "8", "--endpoint", "http://127.0.0.1:1"], 2, "`--endpoint` with frames"),
        (["--frames", "8", "--lengths", "4k"], 2, "`--lengths 4k` with frames"),
        (["--fps", "2"], 2, "add `--tasks video`"),
        (["--frames", "90M"], 1, "ask for fewer with `--frames`"),
    ],
)
def test_what_cannot_be_tested_is_refused(model, tmp_path, capsys, args, code, told) -> None:
    assert run(model, *args, "-o", tmp_path / "report") == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "report" / "results.jsonl").exists()


def test_a_model_without_vision(tmp_path, capsys) -> None:
    blind = save_checkpoint(tmp_path / "blind", sees=False)
    assert run(blind, *GRID, "-o", tmp_path / "report") == 1
    assert "sees no frames" in capsys.readouterr().err
