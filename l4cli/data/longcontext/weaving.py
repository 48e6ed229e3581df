"""Put statements into filler, each at its depth, so that the whole has an exact length.

in: statements with depths, a number of tokens; out: pieces of text, and which ones are statements
source: depth as in LLMTest_NeedleInAHaystack: percent of the filler before, at a sentence's end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from l4cli.data.longcontext.haystack import Filler, Haystack
from l4cli.data.longcontext.needles import NeedleFormat, sentence_format
from l4cli.data.longcontext.sample import Question
from l4cli.errors import UsageError
from l4cli.text import Tokenizer


@dataclass(frozen=True)
class Setting:
    """What a generator is given: the length to reach, and what to make a text of.

    The text and the longest question with its answer take `length - reserve` tokens. Everything
    random comes from `rng`.
    """

    task: str
    length: int
    tokenizer: Tokenizer
    haystack: Haystack
    rng: np.random.Generator
    depths: tuple[float, ...] = (50.0,)
    reserve: int = 0
    fmt: NeedleFormat = field(default_factory=sentence_format)
    documents: tuple[str, ...] = ()  # files of the user's own, for `qa`
    repeat_keys: bool = False  # needles nobody asks for may repeat keys when these run out
    asks_in_a_row: bool = False  # all questions follow the text one after the other: for teaching

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        if self.tokenizer.name == "bytes":
            return len(text) if text.isascii() else len(text.encode())
        return len(self.tokenizer.encode(text))

    def room(self, questions: Sequence[Question]) -> int:
        """How many tokens the text may have. raises: UsageError if there is no room for one"""
        taken = self.question_tokens(questions)
        if self.length - self.reserve - taken < 1:
            self.refuse(taken)
        return self.length - self.reserve - taken

    def question_tokens(self, questions: Sequence[Question]) -> int:
        """What the questions take: the longest one, or all with what closes their answers."""
        sizes = [question.num_tokens(self.tokenizer) for question in questions]
        if not self.asks_in_a_row:
            return max(sizes)
        return sum(sizes) + sum(self.count(question.end) for question in questions)

    def refuse(self, num_tokens: int) -> None:
        """Say that the length is too short for what must be in it."""
        held = f", and {self.reserve} are reserved" if self.reserve else ""
        raise UsageError(
            f"length {self.length} is too short for `{self.task}`",
            why=f"statements, question and answer take {num_tokens} tokens{held}",
            fix=f"ask for a length of at least {num_tokens + self.reserve + 1}, or fewer depths",
        )


@dataclass(frozen=True)
class Statement:
    """What must stand in the text, at a percentage of the filler."""

    text: str
    depth: float
    is_sentence: bool = True  # blanks or lines keep it from what is around it


@dataclass
class Woven:
    """A text in pieces, and the piece of each statement, in the order they were given."""

    pieces: list[str]
    places: list[int]


def weave(
    statements: Sequence[Statement], num_tokens: int, setting: Setting, *, intro: str = ""
) -> Woven:
    """Spread statements over filler so that all pieces together have `num_tokens`."""
    return _Weaver(statements, num_tokens, setting, intro).run()


class _Weaver:
    """The text so far. Only one piece of filler is cut to the token; the others end sentences."""

    def __init__(
        self, statements: Sequence[Statement], num_tokens: int, setting: Setting, intro: str
    ) -> None:
        self.setting, self.statements, self.num_tokens = setting, statements, num_tokens
        self.pieces: list[str] = [intro] if intro else []
        self.used = setting.count(intro)
        self.places = [-1] * len(statements)
        fixed = self.used + sum(self._most(statement) for statement in statements)
        if fixed > num_tokens:
            setting.refuse(setting.length - setting.reserve - num_tokens + fixed)
        self.num_filler, self.num_filled = num_tokens - fixed, 0
        # Blanks that turn out not to be needed are made up for by filler.
        needed = self.num_filler + 2 * len(statements)
        self.filler = setting.haystack.filler(needed, setting.tokenizer, setting.rng)

    def run(self) -> Woven:
        order = sorted(range(len(self.statements)), key=lambda i: self.statements[i].depth)
        last = [i for i in order if self.statements[i].depth >= 100]
        for i in order[: len(order) - len(last)]:
            target = int(self.num_filler * self.statements[i].depth / 100)
            self._fill_units(target - self.num_filled)
            self._state(i)
        self._close(last)
        return Woven(self.pieces, self.places)

    def _close(self, last: list[int]) -> None:
        """End with filler to the token, or with filler and the statements at its end."""
        texts = [self._glued(self.statements[i], "x", "") for i in last]
        room = self.num_tokens - self.used - sum(map(self.setting.count, texts))
        if not last:
            self._add(self.filler.take(room))
            return
        # The cut piece goes before the last whole sentences, so that the end is one.
        text, count = self.filler.take_units(room)
        self._add(self.filler.take(room - count))
        self._add(text)
        if text.endswith("\n"):
            lines = [self._glued(self.statements[i], "\n", "") for i in last]
            if sum(map(self.setting.count, lines)) == sum(map(self.setting.count, texts)):
                texts = lines
        for i, text in zip(last, texts, strict=True):
            self.places[i] = len(self.pieces)
            self._add(text)

    def _fill_units(self, num_tokens: int) -> None:
        text, count = self.filler.take_units(num_tokens)
        self.num_filled += count
        self._add(text)

    def _state(self, i: int) -> None:
        before = self.pieces[-1][-1] if self.pieces else ""
        self.places[i] = len(self.pieces)
        self._add(self._glued(self.statements[i], before, self.filler.next_char()))

    def _add(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.used += self.setting.count(text)

    def _glued(self, statement: Statement, before: str, after: str) -> str:
        if not statement.is_sentence:
            return statement.text
        lead = "" if before == "" or before.isspace() else " "
        if before == "\n":
            return statement.text + "\n"
        return lead + statement.text + ("" if after == "" or after.isspace() else " ")

    def _most(self, statement: Statement) -> int:
        """The most tokens a statement can take, whatever stands around it."""
        around = ("", "\n", "x") if statement.is_sentence else ("",)
        return max(
            self.setting.count(self._glued(statement, before, after))
            for before in around
            for after in ("", "x")
        )


def replace(
    pieces: Sequence[str], places: Sequence[int], filler: Filler, setting: Setting
) -> tuple[str, ...]:
    """Put equally long filler where statements were: a text in which they cannot be found."""
    changed = list(pieces)
    for place in places:
        changed[place] = filler.take(setting.count(pieces[place]))
    return tuple(changed)


def fresh_filler(setting: Setting, num_tokens: int) -> Filler:
    """Filler from another place of the same haystack, which may begin again."""
    haystack = Haystack(setting.haystack.source, repeat=True)
    return haystack.filler(num_tokens, setting.tokenizer, setting.rng)


def odd_filler(num_tokens: int, setting: Setting) -> str:
    """Filler for the tokens that are left over: a line of its own, if it can be one."""
    filler = fresh_filler(setting, num_tokens)
    line = filler.take(num_tokens - 1) + "\n"
    if setting.count(line) == num_tokens:
        return line
    return fresh_filler(setting, num_tokens).take(num_tokens)
