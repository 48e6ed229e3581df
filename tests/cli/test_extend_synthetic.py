"""`l4 extend-context` on documents made on the spot, by schedule, and with a gate after a stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_extension import NEEDLES, extend, make_start, options_of
from tiny_pretrain import only_error, weights_of

from l4cli.cli import main
from l4cli.data.shards import ShardSet

SYNTHETIC = ["--synthetic", "retrieval,copies", "--hard", "0.5", *NEEDLES]


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    make_start(data, folder)
    return folder


def synthetic_alone(start: Path, out: Path, *more: str) -> int:
    words = options_of(start, out, *SYNTHETIC, "-q", *more)
    return main(["extend-context", words[0], *words[2:]])


def weights_by_set(stage: Path) -> dict[str, float]:
    """The rows' weights of a stage's mixture by the name of the set."""
    text = (stage / "run.toml").read_text()
    specs = json.loads(text.split("data_paths = ")[1].splitlines()[0])
    found = {}
    for spec in specs:
        path, _, weight = spec.rpartition(":")
        name = Path(path).name
        found["synthetic" if name.startswith("synthetic") else name] = float(weight)
    return found


def test_made_documents_alone_are_enough_and_the_same_for_a_seed(
    start: Path, tmp_path: Path
) -> None:
    assert synthetic_alone(start, tmp_path / "a") == 0
    assert synthetic_alone(start, tmp_path / "b") == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    made = sorted((tmp_path / "a" / "data").glob("synthetic-*"))
    assert [path.name.split("-")[1] for path in made] == ["128", "256"]
    for folder, num_tokens in zip(made, (1536, 2048), strict=True):
        shards = ShardSet.open(folder)
        assert num_tokens <= shards.num_tokens <= num_tokens + 256
        assert shards.row(0).loss_mask is not None
    assert synthetic_alone(start, tmp_path / "c", "--seed", "1") == 0
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "c")


def test_made_documents_get_their_fraction(start: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["--synthetic-fraction", "0.25", "--long-fraction", "0.6"]
    assert extend(start, out, *SYNTHETIC, "-q", *more) == 0
    weights = weights_by_set(out / "stage-1-128")
    folders = {"synthetic": "synthetic-128-*", "long": "128-*/long", "short": "128-*/short"}
    fills = {
        name: ShardSet.open(next((out / "data").glob(pattern))).index["fill"]
        for name, pattern in folders.items()
    }
    tokens = {name: weight * fills[name] for name, weight in weights.items()}
    assert tokens == pytest.approx({"synthetic": 0.25, "long": 0.45, "short": 0.3}, abs=1e-4)


def test_a_schedule_gives_each_stage_its_own_mixture(start: Path, tmp_path: Path) -> None:
    schedule = tmp_path / "mix.toml"
    schedule.write_text(
        f'[data]\nbooks = "{start / "books.tokens"}"\n'
        "[stages.1]\nbooks = 1\n[stages.2]\nbooks = 1\nsynthetic = 3\n"
    )
    out = tmp_path / "run"
    words = options_of(start, out, *SYNTHETIC, "-q", "--mix-schedule", str(schedule))
    assert main(["extend-context", words[0], *words[2:]]) == 0
    assert set(weights_by_set(out / "stage-1-128")) == {"long", "short"}
    second = weights_by_set(out / "stage-2-256")
    fill = ShardSet.open(next((out / "data").glob("synthetic-256-*"))).index["fill"]
    assert second["synthetic"] * fill == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data]\n[stages.1]\nboks = 1\n[stages.2]\nboks = 1", "names `boks`"),
        ('[data]\nbooks="b"\n[stages.1]\nbooks = 1', "`[stages.2]` is missing"),
        ('[data]\nbooks="b"\n[stages.1]\nbooks=1\n[stages.2]\nbooks=1\n[stages.3]\nbooks=1', "3"),
        (
            '[data]\nbooks="b"\n[stages.1]\nbooks=-1\n[stages.2]\nbooks=1',
            "not a share of 0 or more",
        ),
        ('[data]\nbooks="b"\n[stages.1]\nbooks=0\n[stages.2]\nbooks=1', "add up to 0"),
        ('[data]\nbooks="b"\n[stages.1]\nsynthetic=1\n[stages.2]\nbooks=1', "none is asked for"),
        ("[data]\nbooks=3\n[stages.1]\nbooks=1\n[stages.2]\nbooks=1", "not the path"),
        ("[stage.1]\nbooks=1", "did you mean `stages`?"),
        ("[data", "it is not TOML"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "mix.toml").write_text(text)
    options = options_of(start, tmp_path / "run", "--mix-schedule", str(tmp_path / "mix.toml"))
    assert main(["extend-context", options[0], *options[2:]]) == 2
    assert words in only_error(capsys)
    assert not (tmp_path / "run").exists()


def test_the_gate_stops_after_the_stage_that_does_not_pass(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    gated = [*SYNTHETIC, "-q", "--gate"]
    assert extend(start, out, *gated, "1.0") == 1
    error = only_error(capsys)
    assert "stage 1 does not pass the gate of 1" in error
    assert "of 20 at 128 tokens" in error
    assert "of 20 at 256 tokens" in error
    # What was trained is kept and named; the second stage has not begun.
    assert os.readlink(out / "latest") == "stage-1-128/step-000003"
    assert not (out / "stage-2-256").exists()
    (failed,) = map(json.loads, (out / "gates.jsonl").read_text().splitlines())
    assert not failed["passed"]
    assert failed["lengths"]["128"]["num_samples"] == 20
    # A lower gate lets it go on from there, without asking the first stage's questions again.
    answers = {path: path.read_bytes() for path in out.glob("gates/stage-1-*/results.jsonl")}
    assert len(answers) == 1
    assert extend(start, out, *gated, "0") == 0
    assert os.readlink(out / "latest") == "stage-2-256/step-000004"
    assert all(path.read_bytes() == before for path, before in answers.items())
    lines = [json.loads(line) for line in (out / "gates.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["passed"]) for line in lines] == [(1, False), (1, True), (2, True)]
    assert set(lines[-1]["lengths"]) == {"256", "512"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--synthetic", "retreival"], "did you mean `retrieval`?"),
        (["--hard", "0.5"], "`--hard` needs `--synthetic`"),
        (["--keys", "words"], "`--keys` needs `--synthetic`"),
        (["--synthetic-fraction", "0.5"], "`--synthetic-fraction` needs `--synthetic`"),
        (["--synthetic", "retrieval", "--needle", "#{key}={value};"], "belong together"),
        (["--synthetic", "retrieval", "--stages", "16:1k"], "too short for `retrieval`"),
        (["--gate", "1.5"], "--gate"),
        (["--mix-schedule", "none.toml"], "`--mix-schedule` given"),
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
