"""`l4 extend-context --synthetic-from`: a model writes about the user's passages and is checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evals.openai_server import KEY, Behaviour, Handler, broken, running
from tiny_extension import extend, make_start, options_of
from tiny_pretrain import only_error, weights_of

from l4cli.cli import main
from l4cli.data.shards import ShardSet
from l4cli.data.stream import read_stream
from l4cli.text import load_tokenizer

STAGES = ["--stages", "512:4k", "--batch-tokens", "1024", "--log-every", "1"]


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    make_start(data, folder)
    words = [
        "".join(f"The {kind} of town {i} is {kind[:2]}{i:03d}, they say. " for kind in ("mayor",))
        for i in range(40)
    ]
    (folder / "towns.txt").write_text("\n".join(words) + "\n")
    stream = str(folder / "towns.tokens")
    tokenize = ["tokenize", str(folder / "towns.txt"), "--format", "lines", "-o", stream, "-q"]
    assert main(tokenize) == 0
    return folder


def write_and_answer(handler: Handler) -> None:
    """Asks for the mayor of the passage's town; knows some by heart, and is sloppy at times."""
    prompt = handler.body["messages"][-1]["content"]
    town = re.search(r"mayor of town (\d+)", prompt)
    assert town is not None, prompt
    number = int(town[1])
    right = f"ma{number:03d}"
    if "Write one question" in prompt:
        text = f"Question: Who is the mayor of town {number}?\nAnswer: {right}"
        if number % 4 == 1:
            text = "I would rather not."
    elif "Passage:" in prompt:
        text = "Nobody." if number % 4 == 2 else f"The {right.upper()}."  # compared as words
    else:
        text = right if number % 4 == 3 else "I do not know."
    handler.reply(200, handler.shaped(text, True, len(prompt) // 4))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Behaviour]]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with running(always=write_and_answer) as server:
        yield server


def asked(start: Path, out: Path, url: str, *more: str) -> int:
    words = [str(start / "base" / "latest"), str(start / "towns.tokens"), *STAGES, "-o", str(out)]
    words += ["--synthetic-from", url, "--model", "reader", "--passages", "24", "-q"]
    return main(["extend-context", *words, "--long-fraction", "0", *more])


def records_of(out: Path) -> list[dict[str, Any]]:
    (file,) = (out / "data").glob("questions-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_only_what_the_passage_alone_answers_is_kept_and_asked_from_far_away(
    start: Path, tmp_path: Path, server: tuple[str, Behaviour], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert asked(start, out, server[0], "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    records = records_of(out)
    assert len(records) == 24
    outcomes = ("kept", "unreadable", "not answered with it", "known without")
    for record in records:
        number = int(re.search(r"town (\d+)", record["text"])[1])  # type: ignore[index]
        assert record["outcome"] == outcomes[number % 4]
    counts = {name: sum(r["outcome"] == name for r in records) for name in outcomes}
    assert all(counts.values())
    found = {name.replace(" ", "_"): count for name, count in counts.items()}
    assert events[0] == {"event": "questions", "num_passages": 24, **found}
    # Each document asks for what stands half a row before, and only answers are targets.
    kept = {r["question"]: r for r in records if r["outcome"] == "kept"}
    (stream,) = (out / "data").glob("questions-512-*.tokens")
    tokenizer = load_tokenizer("bytes")
    seen: set[str] = set()
    with stream.open("rb") as file:
        for frame in read_stream(file, str(stream)):
            for i in range(frame.num_documents):
                part = slice(frame.offsets[i], frame.offsets[i + 1])
                assert frame.num_tokens
                assert part.stop - part.start == 512
                assert frame.loss_mask is not None
                ids, mask = frame.tokens[part], frame.loss_mask[part]
                text = tokenizer.decode(ids[1:-1])
                questions = re.findall(r"\nQuestion: (.+)\nAnswer: (.+)", text)
                assert questions
                taught = tokenizer.decode(ids[:-1][mask[:-1] == 1])
                assert taught == "".join(f" {answer}" for _, answer in questions)
                assert mask[-1] == 1
                begin = text.index("\nQuestion:")
                for question, answer in questions:
                    assert kept[question]["answer"] == answer
                    passage = kept[question]["text"]
                    assert text.count(passage) == 1
                    assert begin - text.index(passage) - len(passage) >= 512 // 2 - 2
                seen |= {question for question, _ in questions}
    assert seen == set(kept)
    (shards,) = (path for path in (out / "data").glob("questions-512-*") if path.is_dir())
    assert ShardSet.open(shards).num_tokens >= 2048


def test_a_stop_keeps_what_was_written_and_the_same_command_goes_on(
    start: Path, tmp_path: Path, server: tuple[str, Behaviour], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cut"
    url, behaviour = server

    def fail_late(handler: Handler) -> None:
        if len(behaviour.seen) > 45:  # in the second group of passages
            broken(400)(handler)
        else:
            write_and_answer(handler)

    behaviour.always = fail_late
    assert asked(start, out, url) == 1
    assert "cannot ask" in only_error(capsys)
    before = records_of(out)
    assert len(before) == 16
    behaviour.always, behaviour.seen = write_and_answer, []
    assert asked(start, out, url) == 0
    assert records_of(out)[:16] == before
    written = [s for s in behaviour.seen if "Write one" in s.body["messages"][-1]["content"]]
    assert len(written) == 8
    assert asked(start, tmp_path / "straight", url) == 0
    assert weights_of(out) == weights_of(tmp_path / "straight")
    behaviour.seen = []
    assert asked(start, out, url) == 0
    assert not behaviour.seen  # finished: nobody is asked


def test_a_checkpoint_that_cannot_write_says_so_with_numbers(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = options_of(start, out, *STAGES, "-q", "--long-fraction", "0", "--passages", "3")
    words += ["--synthetic-from", str(start / "base")]
    assert main(["extend-context", *words]) == 1
    error = only_error(capsys)
    assert "no question of" in error
    assert "of 3 written: 3 unreadable" in error
    assert [record["outcome"] for record in records_of(out)] == ["unreadable"] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--synthetic-from", "http://127.0.0.1:1/v1"], "no model was named"),
        (["--synthetic-from", "http://127.0.0.1:0/v1", "--model", "m"], "cannot use the endpoint"),
        (["--passages", "9"], "`--passages` needs `--synthetic-from`"),
        (["--max-tokens", "9"], "`--max-tokens` needs `--synthetic-from`"),
        (["--synthetic-from", "base", "--stages", "64:1k"], "a passage would have 8 tokens"),
    ],
)
def test_wrong_usage(
    start: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    options = [str(start / "base") if word == "base" else word for word in options]
    assert extend(start, tmp_path / "run", *options) == 2
    assert words in only_error(capsys)
    assert not (tmp_path / "run").exists()
