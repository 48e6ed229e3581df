"""`l4 needle-test` through the front door: results, events, resuming, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny_chat import save_checkpoint

from l4cli.cli import main
from l4cli.commands import needle_model

NEEDLES = ["--needle", "#{key}={value};", "--question", "#{key}=", "--keys", "letters:3"]
NEEDLES += ["--values", "digits:2"]
GRID = ["--lengths", "256,512", "--depths", "3", "--samples", "2", *NEEDLES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model: it finds nothing."""
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny", sees=False)


def run(*args: object) -> int:
    return main(["needle-test", *map(str, args)])


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_questions_about_the_users_own_documents(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"question": f"Who owns boat {i}?", "answers": f"P{i}", "context": f"Boat {i} is P{i}'s."}
        for i in range(40)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prose = tmp_path / "prose.txt"
    prose.write_text("The sea was calm. " * 100)
    grid = ["--lengths", "512", "--depths", "1", "--samples", "1", "--no-controls"]
    asked = [model, "--tasks", "single,qa", *grid, "--haystack", prose]
    assert run(*asked, "--qa", file, "-o", tmp_path / "report") == 0
    assert run(*asked, "--qa", tmp_path, "-o", tmp_path / "other") == 1
    assert "it is a folder" in capsys.readouterr().err
    assert run(model, *grid, "--qa", file, "-o", tmp_path / "other") == 2
    assert "no task asks about its rows" in capsys.readouterr().err


def test_a_grid_leaves_events_results_summary_and_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert run(model, *GRID, "-o", out, "--json") == 0
    events = lines(capsys.readouterr().out)
    cells = [event for event in events if event["event"] == "cell"]
    assert {(c["task"], c["length"], c["depth"]) for c in cells} == {
        ("single", length, depth) for length in (256, 512) for depth in (0.0, 50.0, 100.0)
    }
    assert all(c["num_samples"] == 2 and 0 <= c["low"] <= c["high"] <= 1 for c in cells)
    assert events[-1]["event"] == "done"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["means_by_task"].keys() == {"single"}
    assert set(summary["controls"]) == {"no_needle", "closed_book", "distractors"}
    assert {"ruler", "nolima"} <= summary["effective_length"].keys()
    assert summary["settings"]["model"] == str(model)
    records = lines((out / "results.jsonl").read_text())
    # Each length: 2 tests, 1 without needles, 2 among needles; 2 questions without a text.
    assert len(records) == 2 * 5 + 2
    assert all(r["num_tokens"] == r["length"] for r in records if r["role"] == "test")
    with Image.open(out / "heatmap.png") as picture:
        assert picture.width > 100


def test_without_json_the_table_is_the_data(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *GRID, "-o", tmp_path / "report") == 0
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines()]
    assert rows[0][0] == "single:"
    assert [row[0] for row in rows[2:5]] == ["0", "50", "100"]
    table = rows.index(["task", "256", "512"])
    assert rows[table + 1][:2] == ["single", "0.000"]
    assert "(no needle)" in shown.out
    assert "effective length: none" in shown.out
    assert "12 texts" in shown.err


def test_the_same_command_again_reads_nothing_and_tells_everything(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    run(model, *GRID, "-o", out, "--json")
    first = lines(capsys.readouterr().out)
    before = (out / "results.jsonl").read_bytes()
    assert run(model, *GRID, "-o", out, "--json") == 0
    shown = capsys.readouterr()
    assert lines(shown.out) == first
    assert "all 12 texts of this test already" in shown.err
    assert (out / "results.jsonl").read_bytes() == before


def test_a_killed_test_keeps_its_texts(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    args = [*GRID[:4], "--samples", "200", *NEEDLES, "-o", out]
    command = [sys.executable, "-m", "l4cli", "needle-test", str(model), *map(str, args)]
    results = out / "results.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not results.exists() or results.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        told = process.stderr.read()
    kept = lines(results.read_text())
    assert 3 <= len(kept) < 1000
    # Each length: 200 tests and as many among needles, 1 without; 200 questions without a text.
    assert f"{len(kept)} of 1002 texts are kept" in told


def test_other_options_in_the_same_folder_are_refused_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    run(model, *GRID, "-o", out)
    capsys.readouterr()
    assert run(model, *GRID, "--seed", 1, "-o", out) == 2
    assert "why: `seed` was 0, now 1" in capsys.readouterr().err
    assert run(model, *GRID, "--fresh", "-o", out) == 2
    assert "`--fresh` needs a new or empty folder" in capsys.readouterr().err


def test_other_weights_in_the_same_place_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_checkpoint(tmp_path / "tiny", sees=False)
    run(model, *GRID, "-o", tmp_path / "report")
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert run(model, *GRID, "-o", tmp_path / "report") == 2
    assert "why: `weights` was" in capsys.readouterr().err


def test_a_model_that_fails_the_bar_is_exit_1_and_has_its_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert run(model, *GRID, "--require", 0.95, "-o", out) == 1
    assert "the mean is below `--require 0.95`" in capsys.readouterr().err
    assert (out / "summary.json").exists()


def test_lengths_beyond_the_config_are_a_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--lengths", "1k", "--depths", "1", "--samples", "1", "--no-controls"]
    assert run(model, *args, "-o", tmp_path / "report") == 0
    assert "more than `max_position_embeddings` (512)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--lengths", "4k,1k"], 2, "not in ascending order"),
        (["--lengths", "1k,3k,...,64k"], 2, "meets 27k or 81k"),
        (["--depths", "0,150"], 2, "not a percentage"),
        (["--tasks", "singel"], 2, "did you mean `single`?"),
        (["--lengths", "40"], 2, "too short for `single`"),
        (["--lengths", "800m"], 1, "does not fit this machine"),
        (["--gpus", "8xh100"], 2, "add `--dry-run`"),
        (["--tokenizer", "nowhere"], 1, "nowhere"),
        (["--needle", "#{key};", "--question", "#{key}"], 2, "{value}"),
    ],
)
def test_what_cannot_be_tested_is_refused_before_loading(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    told: str,
) -> None:
    assert run(model, *args, "-o", tmp_path / "report") == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "report" / "results.jsonl").exists()


def test_a_haystack_too_short_says_how_much_it_has(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("Call me short. " * 10)
    args = ["--haystack", tmp_path / "book.txt", "--lengths", "512"]
    assert run(model, *args, *NEEDLES, "-o", tmp_path / "report") == 1
    assert "too short" in capsys.readouterr().err


def test_no_model_and_no_place_for_results(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 2
    assert "nothing to test" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert run(model, *GRID, "-o", tmp_path) == 2
    assert "belongs to something else" in capsys.readouterr().err


def test_a_plan_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Scout at 1M tokens on eight H100: 49,152 bytes a token in the layers that see everything,
    a chunk of 8192 in 36 others; the last of 12 such layers needs the question's queries only."""
    args = ["--dry-run", "--preset", "scout", "--gpus", "8xh100", "--lengths", "1m", "--json"]
    assert run(*args) == 0
    plan, total = lines(capsys.readouterr().out)
    length = 1 << 20
    assert plan["bytes_kv"] == 49152 * length + 36 * 8192 * 4096
    everything, chunks = 11 * 2 * 5120 * length**2, 36 * 2 * 5120 * 8192 * length
    assert plan["attention_flops"] == pytest.approx(everything + chunks, rel=1e-3)
    assert plan["linear_flops"] == pytest.approx(2 * 17e9 * length, rel=0.15)
    products = (plan["linear_flops"] + chunks) / (8 * 420e12)
    time_s = (products + everything / (8 * 600e12)) / 0.92  # eight share a text at 92%
    assert plan["time_s"] == pytest.approx(time_s, rel=1e-3)
    assert plan["fits"]
    # Five texts, as many among needles, one without its needles.
    assert plan["num_texts"] == 11
    assert total["total_time_s"] == pytest.approx(11 * plan["time_s"])


def test_a_plan_for_this_machine(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--dry-run", "--lengths", "1k,2k") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["length", "texts"]
    assert [row.split()[0] for row in table[1:3]] == ["1k", "2k"]
    assert "this machine (cpu), an estimate" in table[3]


def test_chat_and_separate_texts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--lengths", "512", "--depths", "2", "--samples", "1", "--no-controls", *NEEDLES]
    assert run(model, *args, "--chat", "--separate", "-o", tmp_path / "report", "--json") == 0
    records = lines((tmp_path / "report" / "results.jsonl").read_text())
    assert [[a["depth"] for a in r["answers"]] for r in records] == [[0.0], [100.0]]
    assert all(r["num_tokens"] == 512 for r in records)


def test_nll_reads_files_in_two_orders(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    for i in range(12):
        (code / f"m{i:02d}.py").write_text(f"def f{i}(x):\n    return x + {i * 7919}\n" * 2)
    (code / "picture.bin").write_bytes(bytes(range(256)))
    args = [model, "--tasks", "nll", "--haystack", code, "--lengths", "256,512"]
    out = tmp_path / "report"
    assert run(*args, "-o", out) == 0
    shown = capsys.readouterr().out
    assert "bits per byte by position" in shown
    assert "with every doubling of the position" in shown
    curves = json.loads((out / "summary.json").read_text())["nll"]
    assert set(curves) == {"in_order", "shuffled"}
    assert all(found["num_tokens"] == 511 for found in curves.values())  # and BOS
    first = curves["in_order"]["doubling"]
    assert [bucket["end"] for bucket in first] == [128, 256, 511]
    assert (out / "nll.png").exists()
    before = (out / "results.jsonl").read_bytes()
    assert run(*args, "-o", out) == 0
    assert (out / "results.jsonl").read_bytes() == before
    capsys.readouterr()
    short = ["--lengths", "1", "--haystack", code, "-o", tmp_path / "short"]
    assert run(model, "--tasks", "nll", *short) == 2
    assert "nothing to foretell" in capsys.readouterr().err
    assert run(model, "--tasks", "nll", "-o", tmp_path / "none") == 2
    assert "needs a haystack" in capsys.readouterr().err
    assert run(*args[:-1], "4k", "-o", tmp_path / "short") == 1
    assert "too short for `nll`" in capsys.readouterr().err


def test_a_changed_config_is_another_test(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    args = [model, "--lengths", "512", "--depths", "1", "--samples", "1", *NEEDLES, "-o", out]
    assert run(*args, "--set", "attn_scale=8", "--set", "floor_scale=16") == 0
    changed = json.loads((out / "summary.json").read_text())
    assert changed["settings"]["set"] == ["attn_scale=8", "floor_scale=16"]
    capsys.readouterr()
    assert run(*args) == 2
    assert "why: `set` was attn_scale=8,floor_scale=16, now not set" in capsys.readouterr().err
    assert run(*args, "--set", "hidden_size=64") == 2
    assert "with `--set hidden_size=64`" in capsys.readouterr().err
    assert run(*args, "--set", "attn_scal=8") == 2
    assert "did you mean `attn_scale`?" in capsys.readouterr().err


def test_the_changed_config_is_the_one_that_reads(model: Path) -> None:
    plain = needle_model.TestedModel.open(model, None, "cpu", "auto", "auto").load()
    sharp = needle_model.TestedModel.open(
        model, None, "cpu", "auto", "auto", overrides=["attn_scale=8", "floor_scale=16"]
    ).load()
    ids = list(range(1, 200))
    assert sharp.config.text.attn_scale == 8
    assert (plain.score(ids) - sharp.score(ids)).abs().max() > 1e-4
