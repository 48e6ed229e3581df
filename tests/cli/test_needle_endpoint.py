"""`l4 needle-test --endpoint` over real HTTP against a server of the test suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evals.openai_server import KEY, broken, find_needle, rate_limited, running

from l4cli.cli import main

GRID = ["--lengths", "512,1k", "--depths", "3", "--samples", "2"]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def run(url: str, out: Path, *args: object) -> int:
    call = ["needle-test", "--endpoint", url, "--model", "reader", *GRID, "-o", out, *args]
    return main(list(map(str, call)))


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_server_that_finds_needles_is_right_everywhere(tmp_path: Path, api: str) -> None:
    with running() as (url, behaviour):
        args = ["--api", api, "--require", 1.0, "--tokenizer", "bytes"]
        assert run(url, tmp_path / "report", *args) == 0
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["means_by_task"] == {"single": 1.0}
    assert summary["effective_length"]["ruler"] == 1024
    assert summary["controls"]["no_needle"]["num_correct"] == 0
    assert summary["controls"]["closed_book"]["num_correct"] == 0
    assert summary["straddled"] == dict.fromkeys(summary["straddled"], 0)  # nobody knows
    assert summary["endpoint"]["num_requests"] == len(behaviour.seen)
    assert (tmp_path / "report" / "heatmap.png").exists()
    for record in map(json.loads, (tmp_path / "report" / "results.jsonl").open()):
        assert all(find_needle("") != answer["answer"] for answer in record["answers"])


def test_what_passes_is_tried_again_and_what_does_not_keeps_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    with running() as (url, behaviour):
        behaviour.failures[:] = [rate_limited("0"), broken(503)]
        assert run(url, out, "--max-tokens", 3000) == 1  # not enough for all of it
        assert "texts are kept; the same command again reads the rest" in capsys.readouterr().err
        kept = len((out / "results.jsonl").read_text().splitlines())
        assert 0 < kept < 12
        asked = len(behaviour.seen)
        assert run(url, out) == 0
        # What was kept is not asked again: three questions a text.
        assert len(behaviour.seen) - asked == 3 * (12 - kept)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--chat"], "`--chat` and `--endpoint` given"),
        (["--kv-dtype", "int8"], "`--kv-dtype int8` and `--endpoint` given"),
        (["--dry-run"], "`--dry-run` and `--endpoint` given"),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_what_a_server_cannot_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], told: str
) -> None:
    assert run("http://127.0.0.1:9", tmp_path / "report", *args) == 2
    assert told in capsys.readouterr().err


def test_an_address_and_a_name_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["needle-test", "--endpoint", "http://127.0.0.1:9"]) == 2
    assert "`--model NAME`" in capsys.readouterr().err
    assert main(["needle-test", "--model", "reader"]) == 2
    assert "`--endpoint URL`" in capsys.readouterr().err
    assert main(["needle-test", "--endpoint", "ftp://x", "--model", "reader"]) == 2
    assert "no `http://`" in capsys.readouterr().err


def test_a_thinking_model_gets_the_room_it_is_given(tmp_path: Path) -> None:
    """Lengths hold the answer's room, and what an address asks for stays out of reports."""
    with running() as (url, behaviour):
        args = ["--answer-tokens", 80, "--tokenizer", "bytes", "--no-controls"]
        assert run(f"{url}?token=hidden", tmp_path / "report", *args) == 0
    assert {seen.body["max_tokens"] for seen in behaviour.seen} == {80}
    lengths = {len(seen.body["messages"][0]["content"]) for seen in behaviour.seen}
    assert max(lengths) + 80 <= 1024
    assert max(lengths) + 80 > 1000
    for path in (tmp_path / "report").iterdir():
        assert b"hidden" not in path.read_bytes()


def test_jobs_go_across_texts_with_one_question_each(tmp_path: Path) -> None:
    with running(delay_s=0.05) as (url, behaviour):
        args = ["--tasks", "multi-value", "--no-controls", "--jobs", 3, "--require", 1.0]
        assert run(url, tmp_path / "report", *args) == 0
    assert behaviour.num_most == 3
    assert len(behaviour.seen) == 4
