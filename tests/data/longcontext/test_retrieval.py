"""Needles among text and among needles: lengths, places, answers read back from the text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from longtexts import NAMES, num_tokens, seeded, tokenizer_of

from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.needles import NeedleFormat, sentence_format
from l4cli.data.longcontext.sample import Match, Sample
from l4cli.data.longcontext.tasks import RULER, TASKS, make, parse_tasks
from l4cli.errors import L4Error, UsageError

MARKS = NeedleFormat.parse("#{key}={value};", "#{key}=", "letters:3", "digits:3")
FORMATS = {"marks": MARKS, "sentences": sentence_format()}
RETRIEVAL = tuple(name for name in TASKS if name.startswith(("single", "multi")))
DEPTHS = (0, 25, 50, 75, 100)
SENTENCE = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")
MARK = re.compile(r"#([a-z0-9-]+)=([a-z0-9-]+);")


def sample_of(task: str, fmt: str, name: str, length: int, seed: int, **options) -> Sample:
    return make(
        task,
        length=length,
        depths=options.pop("depths", DEPTHS),
        tokenizer=tokenizer_of(name),
        haystack=options.pop("haystack", Haystack.generated()),
        fmt=FORMATS[fmt],
        rng=seeded(seed),
        **options,
    )


def read_back(text: str, prompt: str) -> list[str]:
    """Look for the keys a prompt names, in a plain reading of the text."""
    found = [*SENTENCE.findall(text), *MARK.findall(text)]
    return [value for key, value in found if re.search(rf"[ #]{key}[ =,?]", prompt)]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", RETRIEVAL)
def test_every_sample_has_its_length_and_its_answers(task: str, name: str, fmt: str):
    for seed, (length, reserve) in enumerate([(1400, 0), (1777, 40), (5000, 1)]):
        sample = sample_of(task, fmt, name, length, seed, reserve=reserve)
        tokenizer = tokenizer_of(name)
        assert num_tokens(sample, tokenizer) == length - reserve
        ids, offsets = sample.encode(tokenizer)
        assert len(ids) == offsets[-1]
        for question in sample.questions:
            answers = [answer.strip() for answer in question.answers]
            held = "".join(sample.pieces[i] for i in question.evidence)
            assert sorted(read_back(sample.text, question.prompt)) == sorted(answers)
            assert sorted(read_back(held, question.prompt)) == sorted(answers)
            assert question.score(question.target) == 1.0
            assert len(question.evidence) == len(answers)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", RETRIEVAL)
def test_the_control_is_as_long_and_holds_no_answer(task: str, name: str, fmt: str):
    tokenizer = tokenizer_of(name)
    for seed in range(3):
        sample = sample_of(task, fmt, name, 1700, seed)
        assert sample.without_evidence is not None
        asked = {i for question in sample.questions for i in question.evidence}
        pairs = zip(sample.pieces, sample.without_evidence, strict=True)
        for i, (piece, other) in enumerate(pairs):
            if i in asked:
                assert len(tokenizer.encode(piece)) == len(tokenizer.encode(other))
            else:
                assert piece == other
        for question in sample.questions:
            assert read_back("".join(sample.without_evidence), question.prompt) == []


@pytest.mark.parametrize("task", RETRIEVAL)
def test_the_random_generator_decides_everything(task: str):
    first, again, other = (sample_of(task, "marks", "bytes", 900, seed) for seed in (4, 4, 5))
    assert first == again
    assert first.questions != other.questions


@pytest.mark.parametrize("task", ["single", "multi-key", "multi-key-full"])
@pytest.mark.parametrize("name", NAMES)
def test_needles_stand_at_their_depth_at_the_end_of_a_sentence(task: str, name: str):
    tokenizer = tokenizer_of(name)
    depths = (0, 10, 33, 50, 90, 100)
    sample = sample_of(task, "sentences", name, 20_000, 1, depths=depths)
    _, offsets = sample.encode(tokenizer)
    for question, depth in zip(sample.questions, depths, strict=True):
        (place,) = question.evidence
        assert question.depth == depth
        assert abs(100 * offsets[place] / offsets[-1] - depth) < 1.5
        if place > 0 and depth < 100:
            assert sample.pieces[place - 1].endswith((".", "?", "\n"))
    assert sample.questions[-1].evidence[0] >= len(sample.pieces) - 2


def test_a_needle_of_marks_stands_between_the_text_as_it_is():
    sample = sample_of("single", "marks", "bytes", 600, 0)
    place = sample.questions[2].evidence[0]
    assert MARK.fullmatch(sample.pieces[place])
    assert sample.questions[0].prompt == sample.pieces[sample.questions[0].evidence[0]][:5]


def test_single_asks_for_every_needle_there_is():
    sample = sample_of("single", "marks", "bytes", 3000, 0, depths=range(0, 101, 10))
    assert len(sample.questions) == 11 == len(MARK.findall(sample.text))
    assert len({question.prompt for question in sample.questions}) == 11


def test_multi_key_has_three_needles_more_than_it_asks_for():
    sample = sample_of("multi-key", "sentences", "bytes", 3000, 0, depths=(50,))
    assert len(sample.questions) == 1
    assert len({key for key, _ in SENTENCE.findall(sample.text)}) == 4


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_the_full_haystack_holds_needles_with_different_keys_and_next_to_nothing_else(
    name: str, fmt: str
):
    sample = sample_of("multi-key-full", fmt, name, 6000, 3)
    pattern = MARK if fmt == "marks" else SENTENCE
    keys = [key for key, _ in pattern.findall(sample.text)]
    assert len(set(keys)) == len(keys) == int(sample.notes["needles"])
    rest = pattern.sub("", sample.text).replace(FORMATS[fmt].intro, "").replace("\n", "")
    longest = max(len(found.group()) for found in pattern.finditer(sample.text))
    assert len(rest) <= 2 * longest


def test_the_full_haystack_refuses_when_keys_run_out_unless_they_may_repeat():
    fmt = NeedleFormat.parse("#{key}={value};", "#{key}=", "letters:1", "digits:3")
    options = dict(
        length=800,
        depths=(50,),
        tokenizer=tokenizer_of("bytes"),
        haystack=Haystack.noise(),
        fmt=fmt,
    )
    with pytest.raises(UsageError, match="26 different"):
        make("multi-key-full", rng=seeded(0), **options)
    sample = make("multi-key-full", rng=seeded(0), repeat_keys=True, **options)
    keys = [key for key, _ in MARK.findall(sample.text)]
    (question,) = sample.questions
    assert len(keys) > 26
    assert keys.count(question.prompt[1]) == 1
    assert num_tokens(sample, tokenizer_of("bytes")) == 800


def test_multi_value_and_multi_query_want_everything():
    values = sample_of("multi-value", "sentences", "bytes", 3000, 0)
    queries = sample_of("multi-query", "sentences", "bytes", 3000, 0)
    for sample in (values, queries):
        (question,) = sample.questions
        assert question.match is Match.all
        assert len(set(question.answers)) == 4 == len(set(question.evidence))
    marks = sample_of("multi-query", "marks", "bytes", 3000, 0)
    assert len(marks.questions) == 4
    (question,) = sample_of("multi-value", "marks", "bytes", 3000, 0).questions
    assert MARK.findall(question.prompt + question.target + ";") == [
        (question.prompt[1:-1], answer) for answer in question.answers
    ]


def test_noise_and_long_values_are_what_their_tasks_say():
    noise = sample_of("single-noise", "sentences", "bytes", 2000, 0)
    assert "The grass is green." in noise.text
    (_, value), *_ = SENTENCE.findall(sample_of("single-uuid", "sentences", "bytes", 2000, 0).text)
    assert len(value) == 36
    full = sample_of("multi-key-uuid", "sentences", "bytes", 3000, 0)
    assert all(len(key) == len(value) == 36 for key, value in SENTENCE.findall(full.text))


@pytest.mark.parametrize("task", RETRIEVAL)
def test_a_length_without_room_is_refused_with_what_it_takes(task: str):
    with pytest.raises(UsageError) as caught:
        sample_of(task, "sentences", "bytes", 300, 0, reserve=10)
    assert "length 300 is too short" in caught.value.what
    needed = int(re.findall(r"at least (\d+)", caught.value.fix)[0])
    assert (
        num_tokens(
            sample_of(task, "sentences", "bytes", needed, 0, reserve=10), tokenizer_of("bytes")
        )
        == needed - 10
    )


def test_a_haystack_that_has_the_needle_already_is_refused(tmp_path: Path):
    fmt = NeedleFormat.parse("#{key}={value};", "#{key}=", "digits:1", "digits:3")
    path = tmp_path / "full.txt"
    path.write_text("".join(f"A line #{i}=000; here.\n" for i in range(10)) * 50)
    with pytest.raises(L4Error, match="full of needles"):
        make(
            "single",
            length=600,
            depths=(50,),
            tokenizer=tokenizer_of("bytes"),
            haystack=Haystack.from_files([path]),
            fmt=fmt,
            rng=seeded(0),
        )


def test_lists_of_tasks():
    assert parse_tasks("single, multi-key,single") == ["single", "multi-key"]
    assert parse_tasks("all") == list(TASKS)
    assert parse_tasks("niah_multikey_2") == ["multi-key-full"]
    assert parse_tasks("ruler") == list(RULER.values())
    assert set(RULER.values()) <= set(TASKS)
    with pytest.raises(UsageError) as caught:
        parse_tasks("single,multi-kye")
    assert "multi-key" in caught.value.fix
