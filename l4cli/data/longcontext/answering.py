"""Questions answered by one or two of many paragraphs, the user's own or invented ones.

in: a `Setting`, JSONL rows of `question`, `answers`, `context`; out: a `Sample`
source: RULER (arXiv 2404.06654), tasks qa_1 and qa_2, by their definitions
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from l4cli.data.longcontext.fitting import Built, fill, without
from l4cli.data.longcontext.people import full_names, towns
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import Setting
from l4cli.data.longcontext.words import ADJECTIVES, NOUNS
from l4cli.errors import L4Error, UsageError

_INTRO = "Answer the question after these documents; they hold what it needs.\n\n"
_TRADES = ("weaver", "baker", "pilot", "surgeon", "potter", "judge", "painter", "miner", "singer")
_MAX_TRIES = 16


@dataclass(frozen=True)
class Row:
    """One question with the paragraphs that answer it."""

    question: str
    answers: tuple[str, ...]
    context: tuple[str, ...]


def one_paragraph(setting: Setting) -> Sample:
    """A question that one paragraph answers."""
    return _answered(setting, 1)


def two_paragraphs(setting: Setting) -> Sample:
    """A question that needs two paragraphs."""
    return _answered(setting, 2)


def _answered(setting: Setting, hops: int) -> Sample:
    rng = setting.rng
    seed = int(rng.integers(2**62))
    rows = [row for path in setting.documents for row in read_rows(path)]
    if not rows:
        row, others = _invented(hops, np.random.default_rng(seed))
        return _among(setting, row, others, None, seed)
    fitting = [row for row in rows if (len(row.context) > 1) == (hops > 1)]
    if not fitting:
        what = "one paragraph" if hops == 1 else "two or more paragraphs"
        why = f"none of {len(rows)} rows has {what} in `context`"
        fix = "write `context` as a list of paragraphs, or leave the task out"
        raise UsageError(f"no row for `{setting.task}`", why=why, fix=fix)
    for trial in range(_MAX_TRIES):
        row = fitting[int(rng.integers(len(fitting)))]
        texts = _distractors(rows, row)
        try:
            return _among(setting, row, _first_of(texts, seed + trial), len(texts), seed + trial)
        except UsageError:
            if trial == _MAX_TRIES - 1:
                raise
    raise AssertionError


def _distractors(rows: list[Row], row: Row) -> list[str]:
    """The paragraphs of other questions that are not this one's, and do not answer it too."""
    own, answers = set(row.context), [answer.lower() for answer in row.answers]
    texts = dict.fromkeys(text for other in rows for text in other.context if text not in own)
    return [text for text in texts if not any(answer in text.lower() for answer in answers)]


def _first_of(texts: list[str], seed: int) -> Callable[[int], list[str]]:
    """Give the first of some texts, in an order of each sample's own."""
    order = np.random.default_rng([seed, 5]).permutation(len(texts)).tolist()
    return lambda count: [texts[i] for i in order[:count]]


def _among(
    setting: Setting, row: Row, others: Callable[[int], list[str]], most: int | None, seed: int
) -> Sample:
    """Hide the paragraphs of a question among as many others as fit."""

    def build(count: int) -> Built:
        inner = np.random.default_rng([seed, 6])
        texts = [*row.context, *others(count)]
        order = inner.permutation(len(texts)).tolist()
        pieces = [f"Document {i}:\n{texts[k]}\n\n" for i, k in enumerate(order, start=1)]
        return Built([_INTRO, *pieces], [[1 + order.index(k) for k in range(len(row.context))]])

    prompt = f"Question: {row.question}\nAnswer:"
    answers = tuple(f" {answer}" for answer in row.answers)
    built = fill(build, [Question(prompt, answers, Match.any)], setting, most=most)
    question = Question(prompt, answers, Match.any, tuple(built.evidence[0]), end="\n")
    return Sample(setting.task, tuple(built.pieces), (question,), without(built, setting))


def _invented(hops: int, rng: np.random.Generator) -> tuple[Row, Callable[[int], list[str]]]:
    """A question about invented people or towns, and any number of paragraphs like its own."""
    (name,), (home, place) = full_names(1, rng), towns(2, rng)
    seed = int(rng.integers(2**62))
    about = _biography(name, home, rng)
    if hops == 1:
        row = Row(f"In which town was {name} born?", (home,), (about,))
    else:
        thing = NOUNS[rng.integers(len(NOUNS))]
        question = f"In which town was the person born who built the {thing} of {place}?"
        row = Row(question, (home,), (_history(place, thing, name, rng), about))

    def others(count: int) -> list[str]:
        inner = np.random.default_rng(seed)
        names = full_names(count, inner, without=[name])
        texts: list[str] = []
        for other, (where, built) in zip(names, _places(count, inner, (home, place)), strict=True):
            texts.append(
                _biography(other, where, inner)
                if len(texts) % hops == 0
                else _history(built, NOUNS[inner.integers(len(NOUNS))], other, inner)
            )
        return texts

    return row, others


def _places(count: int, rng: np.random.Generator, known: tuple[str, str]) -> list[tuple[str, str]]:
    """A birth town and another one for each person; births share towns, buildings do not."""
    births = towns(64, rng, without=known)
    drawn = rng.integers(len(births), size=count).tolist()
    return list(zip([births[i] for i in drawn], towns(count, rng, [*known, *births]), strict=True))


def _biography(name: str, home: str, rng: np.random.Generator) -> str:
    trade, thing = _TRADES[rng.integers(len(_TRADES))], NOUNS[rng.integers(len(NOUNS))]
    adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))]
    return (
        f"{name} was born in {home} in {rng.integers(1700, 1990)} and worked as a {trade}. "
        f"Friends knew the {trade} as {adjective}, and fond of every {thing}."
    )


def _history(place: str, thing: str, name: str, rng: np.random.Generator) -> str:
    adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))]
    return (
        f"The town of {place} has {rng.integers(1, 90)} thousand people. Its {adjective} {thing} "
        f"was built by {name}, and visitors come to see it."
    )


def read_rows(path: str) -> tuple[Row, ...]:
    """Read the rows of a JSONL file. raises: L4Error with the line that cannot be used"""
    try:
        status = Path(path).stat()
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise L4Error(f"cannot read `{path}`", why=why, fix="check the path") from error
    return _read_rows(path, status.st_mtime_ns, status.st_size)


@lru_cache(8)
def _read_rows(path: str, _changed: int, _size: int) -> tuple[Row, ...]:
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(line, f"`{path}` line {number}"))
    except UnicodeDecodeError as error:
        fix = "convert the text to UTF-8 (`iconv -f LATIN1 -t UTF-8`)"
        raise L4Error(f"cannot read `{path}`", why="it is not UTF-8 text", fix=fix) from error
    if not rows:
        raise L4Error(f"cannot use `{path}`", why="it has no rows", fix=_FIX_ROW)
    return tuple(rows)


_FIX_ROW = 'write rows such as {"question": "...", "answers": ["..."], "context": "..."}'


def _row(line: str, place: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise L4Error(f"cannot use {place}", why="it is not valid JSON", fix=_FIX_ROW) from None
    question = fields.get("question") if isinstance(fields, dict) else None
    lists = []
    for name in ("answers", "context"):
        value = fields.get(name) if isinstance(fields, dict) else None
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            why = f"`{name}` is not a text or a list of texts"
            raise L4Error(f"cannot use {place}", why=why, fix=_FIX_ROW)
        lists.append(tuple(text.strip() for text in texts))
    if not isinstance(question, str) or not question.strip():
        raise L4Error(f"cannot use {place}", why="`question` is not a text", fix=_FIX_ROW)
    return Row(question.strip(), *lists)
