"""Training documents: what they hold, which tokens are targets, and frames of a stream."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest
from longtexts import NAMES, tokenizer_of
from solvers import SOLVERS

from l4cli.data.geometry import PictureGeometry
from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.needles import NeedleFormat, sentence_format
from l4cli.data.longcontext.teaching import (
    KINDS,
    Document,
    parse_kinds,
    teaching_documents,
    teaching_frames,
)
from l4cli.data.stream import StreamWriter, read_stream
from l4cli.errors import UsageError

MARKS = NeedleFormat.parse("#{key}={value};", "#{key}=", "letters:2", "digits:3")
MARK = re.compile(r"#([a-z]+)=([0-9]+);")
SENTENCE = re.compile(r"special magic numbers for ([a-z-]+) is: (\d+)\.")


def documents(kind: str, name: str, fmt: NeedleFormat, **options) -> Iterator[Document]:
    options = {"length": 512, "seed": 3, **options}
    tokenizer, haystack = tokenizer_of(name), Haystack.generated()
    return teaching_documents([kind], tokenizer=tokenizer, haystack=haystack, fmt=fmt, **options)


def parts_of(ids: np.ndarray, mask: np.ndarray, name: str) -> list[tuple[str, bool]]:
    """The text in runs of targets and of other tokens."""
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    decode = tokenizer_of(name).decode
    return [(decode(ids[a:b]), bool(mask[a])) for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_fit_and_have_targets(kind: str, name: str):
    tokenizer = tokenizer_of(name)
    for ids, mask in itertools.islice(documents(kind, name, MARKS, length=2000), 20):
        assert (ids.dtype, mask.dtype, ids.shape) == (np.uint32, np.uint8, mask.shape)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert (mask[0], mask[-1]) == (0, 0)
        assert 0 < mask.sum() < len(mask) <= 2000


@pytest.mark.parametrize("hard", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", [MARKS, sentence_format()], ids=["marks", "sentences"])
def test_answers_of_retrieval_stand_in_the_text(fmt: NeedleFormat, name: str, hard: float):
    pattern = MARK if fmt is MARKS else SENTENCE
    made = documents("retrieval", name, fmt, hard_share=hard, length=1000)
    for ids, mask in itertools.islice(made, 40):
        assert len(ids) == 1000
        parts = parts_of(ids, mask, name)
        assert [is_target for _, is_target in parts] == [False, True] * (len(parts) // 2) + [False]
        first = fmt.question.partition("{key}")[0]
        context = parts[0][0][: parts[0][0].rindex(first)]
        needles = dict(pattern.findall(context))
        assert len(needles) == len(pattern.findall(context))  # keys differ
        asked = set()
        for (prompt, _), (answer, _) in zip(parts[::2], parts[1::2], strict=False):
            key = re.findall(re.escape(fmt.question).replace(r"\{key\}", "([a-z-]+)"), prompt)[-1]
            key = key if isinstance(key, str) else key[0]
            assert answer == f"{fmt.lead}{needles[key]}{fmt.end}"
            asked.add(key)
        if hard:
            assert len(needles) >= len(asked) == min(40, len(asked))
        else:
            assert asked == set(needles)


def test_hard_documents_are_full_of_needles_and_easy_ones_vary():
    hard = itertools.islice(documents("retrieval", "bytes", MARKS, hard_share=1.0), 30)
    for ids, mask in hard:
        assert mask.any()
        text = tokenizer_of("bytes").decode(ids)
        assert sum(len(found.group()) for found in MARK.finditer(text)) > 0.9 * 512
    easy = itertools.islice(documents("retrieval", "bytes", MARKS), 60)
    answers = [parts_of(ids, mask, "bytes")[1::2] for ids, mask in easy]
    assert {len(said[0][0]) for said in answers} == {2, 3, 4}
    assert min(map(len, answers)) <= 3
    assert max(map(len, answers)) >= 25


def test_needles_of_sentences_stand_between_sentences():
    made = documents("retrieval", "bytes", sentence_format(), length=4000)
    for ids, mask in itertools.islice(made, 10):
        context = parts_of(ids, mask, "bytes")[0][0]
        for found in re.finditer(r"One of the special", context):
            assert context[found.start() - 2 : found.start()] in (". ", "? ", ".\n", "?\n")


def test_copies_are_copies_of_what_is_marked():
    for ids, mask in itertools.islice(documents("copies", "bytes", MARKS), 10):
        context, copy, _ = (text for text, _ in parts_of(ids, mask, "bytes"))
        assert f"Here it begins:\n{copy}\nHere it ends." in context
        assert len(copy) >= 50


def test_a_share_of_documents_teaches_all_its_text():
    made = documents("retrieval", "bytes", MARKS, context_share=0.5)
    whole = [bool(mask.all()) for _, mask in itertools.islice(made, 100)]
    assert 30 < sum(whole) < 70


def test_the_seed_decides_everything():
    def first(seed: int) -> list[list[int]]:
        made = documents("retrieval", "bytes", MARKS, seed=seed, hard_share=0.5)
        return [ids.tolist() for ids, _ in itertools.islice(made, 5)]

    assert first(1) == first(1) != first(2)


def test_documents_become_a_stream():
    made = documents("retrieval", "bytes", MARKS, length=300)
    kept = list(itertools.islice(documents("retrieval", "bytes", MARKS, length=300), 40))
    file = io.BytesIO()
    writer = StreamWriter(file, tokenizer_of("bytes"), PictureGeometry())
    for frame in teaching_frames(made, 40 * 300):
        writer.write(frame)
    writer.close()
    file.seek(0)
    (frame,) = read_stream(file, "x")
    assert frame.num_documents == 40
    assert frame.tokens.tolist() == np.concatenate([ids for ids, _ in kept]).tolist()
    assert frame.loss_mask is not None
    assert frame.loss_mask.tolist() == np.concatenate([mask for _, mask in kept]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_without_room_is_refused(kind: str):
    with pytest.raises(UsageError, match="too short"):
        next(documents(kind, "bytes", sentence_format(), length=40))


def test_lists_of_kinds():
    assert parse_kinds("copies, retrieval,copies") == ["copies", "retrieval"]
    assert parse_kinds("all") == list(KINDS)
    with pytest.raises(UsageError) as caught:
        parse_kinds("copes")
    assert "copies" in caught.value.fix


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "task"),
    [("tracking", "tracking"), ("aggregation", "common-words"), ("aliases", "aliases-taught")],
)
def test_answers_of_other_kinds_are_found_in_the_text(kind: str, task: str, name: str):
    made = documents(kind, name, sentence_format(), length=1500)
    num_asked = []
    for ids, mask in itertools.islice(made, 15):
        assert len(ids) == 1500
        parts = parts_of(ids, mask, name)
        num_asked.append(len(parts) // 2)
        context, _, first = parts[0][0].rpartition("\n")  # a question begins a line
        for prompt, answer in zip([first, *(p for p, _ in parts[2::2])], parts[1::2], strict=False):
            found = SOLVERS[task](context, prompt)
            said = answer[0].strip().removesuffix(".").split(", ")
            assert sorted(found[: len(said)]) == sorted(said)
    assert max(num_asked) > (1 if kind != "aggregation" else 0)
