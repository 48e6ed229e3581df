"""Tasks beyond needles: exact lengths, and answers found again by plain readers of the text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from longtexts import NAMES, num_tokens, seeded, tokenizer_of
from solvers import SOLVERS

from l4cli.data.longcontext.associations import ASSOCIATIONS, PEOPLE
from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.sample import Match, Sample
from l4cli.data.longcontext.tasks import RULER, TASKS, make
from l4cli.errors import L4Error, UsageError

DEPTHS = (0, 30, 100)


def sample_of(task: str, length: int, seed: int, name: str = "bytes", **options) -> Sample:
    return make(
        task,
        length=length,
        depths=options.pop("depths", DEPTHS),
        tokenizer=tokenizer_of(name),
        haystack=Haystack.generated(),
        rng=seeded(seed),
        **options,
    )


def test_every_task_has_a_reader():
    assert {name for name in TASKS if not name.startswith(("single", "multi"))} == set(SOLVERS)
    assert len(RULER) == 13 == len(set(RULER.values()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", SOLVERS)
def test_the_text_has_its_length_and_says_the_answer(task: str, name: str):
    for seed, (length, reserve) in enumerate([(2600, 0), (3301, 17), (9000, 5)]):
        sample = sample_of(task, length, seed, name, reserve=reserve)
        assert num_tokens(sample, tokenizer_of(name)) == length - reserve
        for question in sample.questions:
            found = SOLVERS[task](sample.text, question.prompt)
            answers = [answer.strip() for answer in question.answers]
            assert sorted(found) == sorted(answers)
            assert question.score(question.target) == 1.0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("task", SOLVERS)
def test_many_seeds_give_many_texts_that_say_the_answer(task: str, seed: int):
    sample = sample_of(task, 2400 + 37 * seed, 100 + seed)
    for question in sample.questions:
        found = SOLVERS[task](sample.text, question.prompt)
        assert sorted(found) == sorted(answer.strip() for answer in question.answers)
    assert sample == sample_of(task, 2400 + 37 * seed, 100 + seed)
    assert sample != sample_of(task, 2400 + 37 * seed, 200 + seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", SOLVERS)
def test_the_control_has_the_same_length_and_no_answer(task: str, name: str):
    for seed in range(3):
        sample = sample_of(task, 3000, seed, name)
        asked = {i for question in sample.questions for i in question.evidence}
        assert asked
        if sample.without_evidence is None:
            assert task in ("common-words", "frequent-words")
            continue
        pairs = list(zip(sample.pieces, sample.without_evidence, strict=True))
        encode = tokenizer_of(name).encode
        assert all(len(encode(piece)) == len(encode(other)) for piece, other in pairs)
        assert all(piece != other for i, (piece, other) in enumerate(pairs) if i in asked)
        for question in sample.questions:
            assert SOLVERS[task]("".join(sample.without_evidence), question.prompt) == []


@pytest.mark.parametrize("task", ["tracking", "qa", "qa-hops", "code", "documents", "facts-2"])
def test_evidence_alone_says_the_answer(task: str):
    for seed in range(5):
        sample = sample_of(task, 4000, seed)
        (question,) = sample.questions
        held = "".join(sample.pieces[i] for i in sorted(question.evidence))
        if task == "facts-2":  # who takes something stands somewhere, which is not asked for
            taker = held.split()[0]
            held = f"{taker} went to the cellar.{held}"
        found = SOLVERS[task](held, question.prompt)
        assert sorted(found) == sorted(answer.strip() for answer in question.answers)


@pytest.mark.parametrize("task", SOLVERS)
def test_a_length_without_room_is_refused(task: str):
    with pytest.raises(UsageError, match="is too short"):
        sample_of(task, 120, 0)


def test_long_texts_are_long_by_units_and_not_by_filler():
    for task in ("qa", "code", "documents", "activity", "requests", "common-words"):
        sample = sample_of(task, 60_000, 0)
        assert len(sample.pieces[0]) < 700


def test_depths_are_those_asked_for():
    for task in ("aliases", "aliases-taught"):
        sample = sample_of(task, 8000, 3, depths=(0, 20, 60, 100))
        assert [question.depth for question in sample.questions] == [0, 20, 60, 100]
        places = [sum(map(len, sample.pieces[: q.evidence[0]])) for q in sample.questions]
        assert all(
            abs(100 * place / len(sample.text) - depth) < 5
            for place, depth in zip(places, (0, 20, 60, 100), strict=True)
        )


def test_associations_share_no_content_word():
    assert len(ASSOCIATIONS) == 100
    assert len(set(PEOPLE)) == len(PEOPLE)
    small = {"is", "a", "has", "the", "of", "in", "to", "with", "for", "at", "not", "been", "on"}
    small |= {"an", "by", "from", "and", "works", "plays"}
    for said, asked in ASSOCIATIONS:
        words = {word for word in re.findall(r"[a-z]+", said.lower())} - small
        assert not words & {word for word in re.findall(r"[a-z]+", asked.lower())}


def test_answers_come_from_the_users_own_rows(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "question": f"What is number {i}?",
            "answers": [f"n{i}n"],
            "context": f"Number {i} is n{i}n.",
        }
        for i in range(60)
    ]
    rows += [
        {
            "question": f"Both {i}?",
            "answers": [f"b{i}b"],
            "context": [f"Half {i}.", f"b{i}b it is."],
        }
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, count in (("qa", 1), ("qa-hops", 2)):
        for seed in range(5):
            sample = sample_of(task, 1500, seed, documents=[str(path)])
            (question,) = sample.questions
            assert num_tokens(sample, tokenizer_of("bytes")) == 1500
            assert question.match is Match.any
            assert len(question.evidence) == count
            held = "".join(sample.pieces[i] for i in question.evidence)
            (answer,) = (answer.strip() for answer in question.answers)
            assert answer in held
            others = [piece for i, piece in enumerate(sample.pieces) if i not in question.evidence]
            assert answer not in "".join(others)
            assert sample.text.count("Document ") > 20
            assert answer not in "".join(sample.without_evidence or ())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not valid JSON"),
        ("[]", "answers"),
        ('{"question": "a?", "context": "b"}', "answers"),
        ('{"question": "a?", "answers": [], "context": "b"}', "answers"),
        ('{"question": "a?", "answers": ["b"], "context": [3]}', "context"),
        ('{"question": 1, "answers": ["b"], "context": "b"}', "question"),
        ("", "no rows"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, line: str, why: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(L4Error, match=why):
        sample_of("qa", 1500, 0, documents=[str(path)])
    path.write_text('{"question": "a?", "answers": ["b"], "context": "b"}\n')
    with pytest.raises(UsageError, match="two or more paragraphs"):
        sample_of("qa-hops", 1500, 0, documents=[str(path)])
    with pytest.raises(L4Error, match="no such file"):
        sample_of("qa", 1500, 0, documents=[str(tmp_path / "absent.jsonl")])
