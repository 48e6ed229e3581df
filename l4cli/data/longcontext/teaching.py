"""Training documents made on the spot: long texts, then many questions about them with answers.

in: kinds, a length, a tokenizer, a haystack, a seed; out: ids and loss masks, or frames
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from l4cli.data.encoding import FrameBuilder, Part
from l4cli.data.frame import Frame
from l4cli.data.longcontext import lessons, sample_lessons
from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.lessons import Draft, Lesson
from l4cli.data.longcontext.needles import NeedleFormat, sentence_format
from l4cli.data.longcontext.pool import FillerPool
from l4cli.errors import UsageError, suggest
from l4cli.text import Tokenizer

Document = tuple[np.ndarray, np.ndarray]  # ids uint32 [n], loss_mask uint8 [n]


@dataclass(frozen=True)
class Kind:
    """A kind of training document."""

    help: str
    draft: Callable[[Lesson], Draft]


KINDS: dict[str, Kind] = {
    "retrieval": Kind("values beside keys, among text or among other needles", lessons.retrieval),
    "tracking": Kind("variables that get their value from others", sample_lessons.tracking),
    "aggregation": Kind("the most common words of a list", sample_lessons.aggregation),
    "aliases": Kind("keys asked for under another name", sample_lessons.aliases),
    "copies": Kind("a long passage, said again", lessons.copies),
}


def parse_kinds(text: str) -> list[str]:
    """Read a list such as `retrieval,copies`; `all` stands for all. raises: UsageError"""
    names: list[str] = []
    for name in text.split(","):
        word = name.strip()
        if word != "all" and word not in KINDS:
            fix, why = suggest(word, [*KINDS, "all"]), "there is no kind of this name"
            raise UsageError(f"cannot make `{word}` documents", why=why, fix=fix)
        names += KINDS if word == "all" else [word]
    return list(dict.fromkeys(names))


def teaching_documents(
    kinds: Sequence[str],
    *,
    length: int,
    tokenizer: Tokenizer,
    haystack: Haystack,
    fmt: NeedleFormat | None = None,
    seed: int = 0,
    hard_share: float = 0.0,
    max_needles: int = lessons.MAX_NEEDLES,
    context_share: float = 0.0,
) -> Iterator[Document]:
    """Make documents without end, each of a kind drawn at random and of at most `length` tokens.

    Only answers and what closes them are targets; with the chance `context_share` a document
    teaches all of itself. `hard_share` of the retrieval documents are full of needles.
    shapes: -> ids uint32 [n], loss_mask uint8 [n]
    """
    rng = np.random.default_rng(seed)
    fmt = fmt if fmt is not None else sentence_format()
    pool = FillerPool(haystack, tokenizer, rng, length)
    lesson = Lesson(length, tokenizer, haystack, fmt, rng, pool, hard_share, max_needles)
    begin, end = (
        np.zeros(0, np.uint32) if i is None else np.array([i], np.uint32)
        for i in (tokenizer.bos_id, tokenizer.eos_id)
    )
    while True:
        kind = kinds[int(rng.integers(len(kinds)))] if len(kinds) > 1 else kinds[0]
        draft = KINDS[kind].draft(lesson)
        ids = np.concatenate([begin, draft.context, draft.questions, end])
        assert len(ids) <= length, (kind, len(ids), length)
        if context_share > 0 and rng.random() < context_share:
            yield ids, np.ones(len(ids), np.uint8)
            continue
        mask = np.zeros(len(ids), np.uint8)
        start = len(begin) + len(draft.context)
        mask[start : start + len(draft.questions)] = draft.are_targets
        yield ids, mask


def teaching_frames(documents: Iterable[Document], num_tokens: int) -> Iterator[Frame]:
    """Gather documents into frames of a token stream, until they have `num_tokens` or just more."""
    builder, count = FrameBuilder(), 0
    for ids, mask in documents:
        yield from builder.add(Part(ids, loss_mask=mask))
        count += len(ids)
        if count >= num_tokens:
            break
    yield from builder.flush()
