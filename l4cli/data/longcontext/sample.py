"""One long text with questions about it: what generators give, tests ask and training teaches.

in: pieces of text, questions with their evidence; out: token ids with exact places, scores
source: RULER (arXiv 2404.06654) for `all` and `any`; BABILong (2406.10149) for `only`; MRCR for
`ratio`
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from l4cli.text import Tokenizer


class Match(StrEnum):
    """How an answer is compared with its references."""

    exact = "exact"  # it begins with the reference, token by token
    all = "all"  # the share of references that occur in it
    any = "any"  # 1 if one of them occurs in it
    only = "only"  # 1 if the reference is the only one of `labels` that occurs in it
    ratio = "ratio"  # similarity to the reference, 0 without its first word


@dataclass(frozen=True)
class Question:
    """One question about a text."""

    prompt: str  # follows the text; ends where the answer begins, an answer's prefix included
    answers: tuple[str, ...]  # references; a blank that begins one stands after the prompt
    match: Match = Match.exact
    evidence: tuple[int, ...] = ()  # the pieces of the text that hold what must be found
    depth: float | None = None  # percent of the text before the evidence, if it has one place
    labels: tuple[str, ...] = ()  # of `Match.only`: everything that could be an answer
    end: str = ""  # what closes an answer in this format, such as `;`: taught, not scored
    between: str = ", "  # what stands between several answers

    @property
    def target(self) -> str:
        """A right answer as it follows the prompt; where all references count, all of them."""
        if self.match is not Match.all:
            return self.answers[0]
        lead = self.answers[0][: len(self.answers[0]) - len(self.answers[0].lstrip())]
        return lead + self.between.join(answer.strip() for answer in self.answers)

    def num_tokens(self, tokenizer: Tokenizer) -> int:
        """Count the tokens of the prompt and of a right answer, each encoded apart."""
        return len(tokenizer.encode(self.prompt)) + len(tokenizer.encode(self.target))

    def score(self, answer: str) -> float:
        """How right an answer is, from 0 to 1."""
        said = answer.lower()
        references = [reference.strip().lower() for reference in self.answers]
        if self.match is Match.exact:
            return float(answer.lstrip().startswith(self.answers[0].strip()))
        if self.match is Match.all:
            return sum(reference in said for reference in references) / len(references)
        if self.match is Match.any:
            return float(any(reference in said for reference in references))
        if self.match is Match.only:
            found = {label for label in _lower(self.labels) if label in said.partition(".")[0]}
            return float(found == set(references))
        first, _, rest = self.answers[0].strip().partition(" ")
        said_first, _, said_rest = answer.strip().partition(" ")
        if said_first != first:
            return 0.0
        return difflib.SequenceMatcher(None, said_rest, rest, autojunk=False).ratio()


def _lower(words: Collection[str]) -> list[str]:
    return [word.lower() for word in words]


@dataclass(frozen=True)
class Sample:
    """A text in pieces (a needle is a piece of its own), and questions that share its reading."""

    task: str
    pieces: tuple[str, ...]
    questions: tuple[Question, ...]
    # The same questions where they cannot be answered from the text: what guessing brings.
    without_evidence: tuple[str, ...] | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text as people read it."""
        return "".join(self.pieces)

    def encode(self, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and where each piece begins.

        shapes: -> uint32 [n], int64 [pieces + 1]
        """
        return encode_pieces(self.pieces, tokenizer)


def encode_pieces(
    pieces: tuple[str, ...] | list[str], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize piece by piece, so that a needle's place is known exactly.

    shapes: -> uint32 [n], int64 [pieces + 1]
    """
    parts = [tokenizer.encode(piece) for piece in pieces]
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    ids = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    return ids.astype(np.uint32, copy=False), offsets
