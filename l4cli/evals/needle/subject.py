"""Who is tested: reads a sample's text once and answers its questions.

in: a `Sample`; out: a `Reading`: answers in the order of the questions, tokens read, straddles
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from l4cli.data.longcontext.sample import Match, Question, Sample


@dataclass(frozen=True)
class Reading:
    """What came of one text."""

    answers: list[str]
    num_tokens: int | None  # the text, its longest question and answer; None: nobody counted
    # Whether the question's evidence lies across a border of chunks; None: nobody knows.
    is_straddled: list[bool | None]
    # By layer, the share of exact attention that was read; None: all of it.
    sparse_recall: dict[str, float] | None = None


class Subject(Protocol):
    """A model with its way of asking."""

    speaks_freely: bool  # answers in sentences, so that an exact answer may be anywhere in it

    def read(self, sample: Sample) -> Reading:
        """Read the text, answer its questions."""


class _Answering(Protocol):
    speaks_freely: bool

    def ask(self, sample: Sample) -> list[str]:
        """Answer the questions of a sample."""


class AnswersOnly:
    """Makes a subject of whoever only answers, such as a server."""

    def __init__(self, answering: _Answering) -> None:
        self.answering, self.speaks_freely = answering, answering.speaks_freely

    def read(self, sample: Sample) -> Reading:
        """Ask everything; how tokens lie is the server's secret."""
        answers = self.answering.ask(sample)
        assert len(answers) == len(sample.questions)
        return Reading(answers, None, [None] * len(answers))


def score_answer(question: Question, answer: str, *, speaks_freely: bool) -> float:
    """How right an answer is, from 0 to 1; in free speech an exact answer counts as a word."""
    if question.match is Match.exact and speaks_freely:
        word = re.escape(question.answers[0].strip().lower())
        return float(re.search(rf"(?<!\w){word}(?!\w)", answer.lower()) is not None)
    return question.score(answer)


def straddles(
    question: Question, offsets: np.ndarray, num_before: int, chunk_size: int | None
) -> bool:
    """Whether a piece of evidence lies in more than one chunk of local attention.

    shapes: offsets int64 [pieces + 1], the first token of each piece
    """
    if chunk_size is None:
        return False
    for piece in question.evidence:
        first, end = (int(place) + num_before for place in offsets[piece : piece + 2])
        if end > first and first // chunk_size != (end - 1) // chunk_size:
            return True
    return False
