"""What training documents teach: retrieval and copying, built from ids without detours.

in: a `Lesson`; out: `Draft`s: the ids of a text, and of questions with their answers
source: Zoology (arXiv 2312.04927) for many questions on one text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.needles import NeedleFormat, WordKind
from l4cli.data.longcontext.pool import FillerPool, encode_all
from l4cli.data.longcontext.sample import Question
from l4cli.errors import UsageError
from l4cli.text import Tokenizer

MAX_NEEDLES = 40
_MARKS = ("\nHere it begins:\n", "\nHere it ends.\n", "\nThe same once more:\n")


@dataclass(frozen=True)
class Lesson:
    """What documents are made of; everything random comes from `rng`."""

    length: int
    tokenizer: Tokenizer
    haystack: Haystack
    fmt: NeedleFormat
    rng: np.random.Generator
    pool: FillerPool
    hard_share: float = 0.0  # of retrieval: as many needles as fit
    max_needles: int = MAX_NEEDLES  # asked for in one document

    @property
    def room(self) -> int:
        """Tokens between the document's own begin and end."""
        return self.length - sum(
            i is not None for i in (self.tokenizer.bos_id, self.tokenizer.eos_id)
        )

    def refuse(self, what: str, num_tokens: int) -> UsageError:
        """Say that not even one question fits."""
        edges = self.length - self.room
        return UsageError(
            f"length {self.length} is too short for `{what}` documents",
            why=f"one with a single question takes {num_tokens + edges} tokens",
            fix=f"make documents of at least {num_tokens + edges} tokens",
        )


@dataclass
class Draft:
    """A document without its begin and end."""

    context: np.ndarray  # uint32 [n]
    questions: np.ndarray  # uint32 [q], with their answers
    are_targets: np.ndarray  # uint8 [q]


@dataclass
class _Asked:
    """Questions encoded in parts: what is asked, what is to be said, what closes it."""

    ids: np.ndarray  # uint32 [n]
    lengths_Q3: np.ndarray  # int64

    @classmethod
    def of(cls, parts: Sequence[tuple[str, str, str]], tokenizer: Tokenizer) -> _Asked:
        ids, lengths = encode_all([text for part in parts for text in part], tokenizer)
        return cls(ids, lengths.reshape(-1, 3))

    def first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first questions' ids, and which of them are targets."""
        lengths = self.lengths_Q3[:count].ravel()
        flags = np.tile(np.array([0, 1, 1], np.uint8), count)
        return self.ids[: lengths.sum()], np.repeat(flags, lengths)


def draft_of(context: np.ndarray, questions: Sequence[Question], tokenizer: Tokenizer) -> Draft:
    """Put questions after a text, one after the other."""
    parts = [(question.prompt, question.target, question.end) for question in questions]
    return Draft(context, *_Asked.of(parts, tokenizer).first(len(parts)))


def retrieval(lesson: Lesson) -> Draft:
    """Needles in text, all asked for; or as many needles as fit, of which some are asked for."""
    rng, tokenizer = lesson.rng, lesson.tokenizer
    is_hard = rng.random() < lesson.hard_share
    fmt = _shortened(lesson.fmt, rng)
    intro = tokenizer.encode(fmt.intro)
    room = lesson.room - len(intro)
    if is_hard:
        fmt, num_drawn = _fitting(fmt, lesson.fmt, room, tokenizer, rng)
    else:
        num_drawn = int(rng.integers(1, lesson.max_needles + 1))
    num_drawn = min(num_drawn, fmt.keys.num_values)
    keys, values = fmt.keys.draw_distinct(num_drawn, rng), _draw_values(fmt.values, num_drawn, rng)
    most = min(num_drawn, lesson.max_needles)
    asked = _Asked.of(
        [(fmt.ask(k), fmt.lead + v, fmt.end) for k, v in zip(keys[:most], values, strict=False)],
        tokenizer,
    )
    needles = [fmt.write(key, value) for key, value in zip(keys, values, strict=True)]
    needle_lengths = encode_all(_glued(needles, fmt, [True] * num_drawn), tokenizer)[1]
    num_asked, num_needles = _counts(asked.lengths_Q3.sum(1), needle_lengths, room)
    if not is_hard:
        num_needles = num_asked
    if num_asked == 0:
        raise lesson.refuse("retrieval", int(needle_lengths[0] + asked.lengths_Q3[0].sum()) + 2)
    questions, are_targets = asked.first(num_asked)
    shuffled = [needles[i] for i in rng.permutation(num_needles).tolist()]
    context = _strewn(shuffled, room - len(questions), fmt, lesson)
    return Draft(np.concatenate([intro, context]), questions, are_targets)


def _shortened(fmt: NeedleFormat, rng: np.random.Generator) -> NeedleFormat:
    """Draw how long keys are in this document, up to what the format has."""
    size = fmt.keys.num_symbols
    if size < 2:
        return fmt
    keys = dataclasses.replace(fmt.keys, num_symbols=int(rng.integers(1, size + 1)))
    return dataclasses.replace(fmt, keys=keys)


def _draw_values(kind: WordKind, count: int, rng: np.random.Generator) -> list[str]:
    """Values, in half of the documents each of a length of its own.

    Were they all of one length in a document, a model would learn to end an answer where other
    answers end, and not where its own needle does.
    """
    values = kind.draw(count, rng)
    if kind.num_symbols < 2 or rng.random() < 0.5:
        return values
    lengths = rng.integers(1, kind.num_symbols + 1, size=count).tolist()
    return [value[:length] for value, length in zip(values, lengths, strict=True)]


def _fitting(
    fmt: NeedleFormat,
    full: NeedleFormat,
    room: int,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
) -> tuple[NeedleFormat, int]:
    """How many needles may fit, and a format that has keys for them, if there is one."""
    keys, values = fmt.keys.draw(8, rng), fmt.values.draw(8, rng)
    examples = [fmt.write(key, value) for key, value in zip(keys, values, strict=True)]
    size = encode_all(_glued(examples, fmt, [True] * 8), tokenizer)[1].min()
    count = max(1, room // int(size))
    if fmt.keys.num_values < count:
        fmt = dataclasses.replace(fmt, keys=full.keys)
    return fmt, count


def _counts(questions_Q: np.ndarray, needles_N: np.ndarray, room: int) -> tuple[int, int]:
    """How many questions fit together with their needles, and how many needles then."""
    together = np.cumsum(questions_Q + needles_N[: len(questions_Q)])
    num_asked = int(np.searchsorted(together, room, side="right"))
    left = room - int(questions_Q[:num_asked].sum())
    return num_asked, int(np.searchsorted(np.cumsum(needles_N), left, side="right"))


def _glued(needles: list[str], fmt: NeedleFormat, are_lines: Sequence[bool]) -> list[str]:
    """Put a line's end, or a blank, between needles and the text around them."""
    if not fmt.is_sentence:
        return needles
    return [f"{n}\n" if is_line else f" {n}" for n, is_line in zip(needles, are_lines, strict=True)]


def _strewn(needles: list[str], num_tokens: int, fmt: NeedleFormat, lesson: Lesson) -> np.ndarray:
    """Put needles into filler at random places, sentences where sentences end."""
    rng = lesson.rng
    filler, borders, line_ends = lesson.pool.take(num_tokens)
    as_lines = _glued(needles, fmt, [True] * len(needles))
    num_filler = num_tokens - int(encode_all(as_lines, lesson.tokenizer)[1].sum())
    if fmt.is_sentence:
        usable = max(1, int(np.searchsorted(borders, num_filler)))
        chosen = np.sort(rng.integers(usable, size=len(needles)))
        # What begins a text begins a line.
        places, are_lines = borders[chosen], (line_ends[chosen] | (chosen == 0)).tolist()
    else:
        places = np.sort(rng.integers(num_filler + 1, size=len(needles)))
        are_lines = [False] * len(needles)
    ids, lengths = encode_all(_glued(needles, fmt, are_lines), lesson.tokenizer)
    num_filler = num_tokens - int(lengths.sum())
    if num_filler < 0:  # a blank cost more than a line's end: the last needle goes
        return _strewn(needles[:-1], num_tokens, fmt, lesson)
    places = np.minimum(places, num_filler)
    return np.insert(filler[:num_filler], np.repeat(places, lengths), ids)


def copies(lesson: Lesson) -> Draft:
    """A passage somewhere in a text, and at its end the same passage once more."""
    rng, encode = lesson.rng, lesson.tokenizer.encode
    begins, ends, again = map(encode, _MARKS)
    room = lesson.room - sum(map(len, (begins, ends, again)))
    if room < 2:
        raise lesson.refuse("copies", lesson.room - room + 2)
    size = int(rng.integers(max(1, room // 8), room // 2 + 1))
    passage = lesson.pool.take(size)[0]
    around = lesson.pool.take(room - 2 * size)[0]
    place = int(rng.integers(len(around) + 1))
    context = np.concatenate([around[:place], begins, passage, ends, around[place:], again])
    return Draft(context, passage, np.ones(size, np.uint8))
