"""Passages drawn from token streams, and long documents that ask about them from far away.

in: token streams, question and answer pairs; out: passages; ids and loss masks of documents
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from l4cli.data.frame import Frame
from l4cli.data.longcontext.teaching import Document
from l4cli.data.stream import read_stream
from l4cli.errors import UsageError
from l4cli.text import Tokenizer

MAX_QUESTIONS = 4  # asked in one document
_MIN_SHARE = 4  # a passage has at least a quarter of the tokens that were asked for


@dataclass(frozen=True)
class Passage:
    """A run of tokens of one document."""

    number: int
    ids: np.ndarray  # uint32 [n]
    text: str


@dataclass(frozen=True)
class Pair:
    """A question about one passage, and its answer."""

    passage: int  # its number
    question: str
    answer: str


def draw_passages(
    streams: Sequence[Path], count: int, num_tokens: int, tokenizer: Tokenizer, seed: int
) -> list[Passage]:
    """Draw up to `count` passages of up to `num_tokens`, each as likely as any other.

    Memory is bounded by `count`, whatever the streams hold (reservoir sampling).
    """
    rng = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    num_seen = 0
    for stream in streams:
        with stream.open("rb") as file:
            for frame in read_stream(file, str(stream)):
                for ids in _windows(frame, num_tokens, tokenizer):
                    num_seen += 1
                    if len(kept) < count:
                        kept.append(ids.copy())
                    elif (place := int(rng.integers(num_seen))) < count:
                        kept[place] = ids.copy()
    order = rng.permutation(len(kept)).tolist()
    chosen = [kept[i] for i in order]
    return [Passage(i, ids, tokenizer.decode(ids)) for i, ids in enumerate(chosen)]


def _windows(frame: Frame, num_tokens: int, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The runs of a frame's documents, without begin, end and pictures."""
    edges = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    owners = np.searchsorted(frame.offsets, frame.media_positions, side="right") - 1
    with_media = set(owners.tolist())
    for number in range(frame.num_documents):
        if number in with_media:
            continue
        ids = frame.tokens[frame.offsets[number] : frame.offsets[number + 1]]
        ids = ids[~np.isin(ids, edges)]
        for start in range(0, len(ids), num_tokens):
            window = ids[start : start + num_tokens]
            if len(window) * _MIN_SHARE >= num_tokens:
                yield window


def question_documents(
    pairs: Sequence[Pair],
    passages: Sequence[Passage],
    *,
    length: int,
    tokenizer: Tokenizer,
    seed: int,
) -> Iterator[Document]:
    """Documents without end: passages asked about in the first half, others, then the questions.

    Every pair is asked as often as any other. Only answers and the document's end are targets.
    raises: UsageError where a passage and its question have no room
    """
    rng = np.random.default_rng(seed)
    maker = _Maker(passages, length, tokenizer, rng)
    waiting: list[Pair] = []
    while True:
        if len(waiting) < MAX_QUESTIONS:
            waiting += [pairs[i] for i in rng.permutation(len(pairs)).tolist()]
        document, num_asked = maker.document(waiting[:MAX_QUESTIONS])
        yield document
        del waiting[:num_asked]


@dataclass
class _Maker:
    passages: Sequence[Passage]
    length: int
    tokenizer: Tokenizer
    rng: np.random.Generator

    def document(self, pairs: Sequence[Pair]) -> tuple[Document, int]:
        """One document of exactly `length`, and how many of the pairs it asks."""
        begin, end = (
            np.zeros(0, np.uint32) if i is None else np.array([i], np.uint32)
            for i in (self.tokenizer.bos_id, self.tokenizer.eos_id)
        )
        room = self.length - len(begin) - len(end)  # of passages
        far = self.length // 2  # from the end of what is asked about to the questions
        asked: list[tuple[np.ndarray, np.ndarray]] = []
        sources: dict[int, np.ndarray] = {}
        for pair in pairs[: len(self.passages) - 1]:
            question, answer = self._asked(pair)
            source = self._block(pair.passage)
            left = room - len(question) - len(answer)
            if pair.passage in sources or _size(sources.values()) + len(source) > left - far:
                break
            asked.append((question, answer))
            sources[pair.passage], room = source, left
        if not asked:
            self._refuse(pairs[0])
        near = self._filler(room - far - _size(sources.values()), sources)
        mixed = [*near, *sources.values()]
        first = [mixed[i] for i in self.rng.permutation(len(mixed)).tolist()]
        rest = self._filler(room - _size(first), sources, is_exact=True)
        parts = [begin, *first, *rest, *(ids for both in asked for ids in both), end]
        ids = np.concatenate(parts)
        assert len(ids) == self.length, (len(ids), self.length)
        mask = np.zeros(len(ids), np.uint8)
        at = self.length - len(end)
        mask[at:] = 1
        for question, answer in reversed(asked):
            mask[at - len(answer) : at] = 1
            at -= len(question) + len(answer)
        return (ids, mask), len(asked)

    def _asked(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        encode = self.tokenizer.encode
        return encode(f"\nQuestion: {pair.question}\nAnswer:"), encode(f" {pair.answer}")

    def _block(self, number: int) -> np.ndarray:
        return np.concatenate([self.passages[number].ids, self.tokenizer.encode("\n\n")])

    def _filler(
        self, num_tokens: int, without: Collection[int], *, is_exact: bool = False
    ) -> list[np.ndarray]:
        """Other passages: whole ones up to `num_tokens`, or so many with the last one cut."""
        others = [p.number for p in self.passages if p.number not in without]
        blocks: list[np.ndarray] = []
        order: list[int] = []
        while num_tokens > 0:
            order = order or [others[i] for i in self.rng.permutation(len(others)).tolist()]
            block = self._block(order.pop())
            if len(block) > num_tokens and not is_exact:
                break
            blocks.append(block[:num_tokens])
            num_tokens -= len(blocks[-1])
        return blocks

    def _refuse(self, pair: Pair) -> NoReturn:
        question, answer = self._asked(pair)
        needed = 2 * (len(self._block(pair.passage)) + len(question) + len(answer) + 3)
        if len(self.passages) < 2:
            why = "there is one passage, and others have to lie between it and its question"
            fix = "bring more text, or leave `--synthetic-from` out"
            raise UsageError("too little text to ask about", why=why, fix=fix)
        raise UsageError(
            f"rows of {self.length} are too short for questions about passages",
            why=f"a passage, as much again between and its question take {needed} tokens",
            fix=f"make the stage at least {needed} long, or leave `--synthetic-from` out",
        )


def _size(blocks: Iterable[np.ndarray]) -> int:
    return sum(map(len, blocks))
