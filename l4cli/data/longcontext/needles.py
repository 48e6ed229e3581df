"""What needles look like: a template, its question, and where keys and values are drawn from.

in: templates with `{key}` and `{value}`, kinds of words; out: needles, questions and answers
source: RULER (arXiv 2404.06654) for the idea of magic numbers and of confusable needles
"""

from __future__ import annotations

import re
import string
import uuid
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from l4cli.data.longcontext.words import ADJECTIVES, NOUNS
from l4cli.errors import UsageError, suggest

KINDS = ("words", "letters:N", "digits:N", "uuid")
_MAX_SYMBOLS = 64
_ALPHABETS = {"letters": string.ascii_lowercase, "digits": string.digits}


@dataclass(frozen=True)
class WordKind:
    """A set of strings to draw from: `words`, `letters:N`, `digits:N` or `uuid`."""

    name: str
    num_symbols: int = 0  # of letters and digits

    @classmethod
    def parse(cls, text: str) -> WordKind:
        """Read a kind as it is written on the command line. raises: UsageError"""
        name, colon, number = text.partition(":")
        if name in ("words", "uuid") and not colon:
            return cls(name)
        if name not in _ALPHABETS:
            raise UsageError(f"unknown kind `{text}`", why=_KINDS_ARE, fix=suggest(text, KINDS))
        if not number.isdecimal() or not 1 <= int(number) <= _MAX_SYMBOLS:
            why = f"`{name}` takes a length from 1 to {_MAX_SYMBOLS}"
            raise UsageError(f"bad kind `{text}`", why=why, fix=f"write `{name}:3`")
        return cls(name, int(number))

    def __str__(self) -> str:
        return f"{self.name}:{self.num_symbols}" if self.num_symbols else self.name

    @property
    def num_values(self) -> int:
        """How many different strings there are."""
        if self.name == "words":
            return len(ADJECTIVES) * len(NOUNS)
        return 1 << 122 if self.name == "uuid" else len(self.alphabet) ** self.num_symbols

    @property
    def alphabet(self) -> str:
        """The symbols of letters and digits."""
        return _ALPHABETS[self.name]

    def draw(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw strings; the same one may come twice."""
        if self.name == "words":
            first, second = (
                rng.integers(len(ADJECTIVES), size=count),
                rng.integers(len(NOUNS), size=count),
            )
            pairs = zip(first.tolist(), second.tolist(), strict=True)
            return [f"{ADJECTIVES[a]}-{NOUNS[b]}" for a, b in pairs]
        if self.name == "uuid":
            drawn = rng.bytes(16 * count)
            parts = [drawn[16 * i : 16 * i + 16] for i in range(count)]
            return [str(uuid.UUID(bytes=part, version=4)) for part in parts]
        symbols = np.frombuffer(self.alphabet.encode(), np.uint8)
        size = self.num_symbols
        data = symbols[rng.integers(len(symbols), size=count * size)].tobytes().decode()
        return [data[size * i : size * i + size] for i in range(count)]

    def draw_distinct(
        self, count: int, rng: np.random.Generator, without: Collection[str] = ()
    ) -> list[str]:
        """Draw strings that all differ. raises: UsageError if there are not so many"""
        if count + len(without) > self.num_values:
            why = f"`{self}` has {self.num_values} different ones"
            fix = "take longer keys" + (
                f", such as `--keys {self.name}:{self._enough(count + len(without))}`"
                if self.num_symbols
                else ""
            )
            raise UsageError(f"cannot draw {count + len(without)} keys", why=why, fix=fix)
        if 2 * (count + len(without)) > self.num_values:  # drawing again and again would take long
            order = [self._spell(i) for i in rng.permutation(self.num_values).tolist()]
            known = set(without)
            return [word for word in order if word not in known][:count]
        found = dict.fromkeys(without)
        while (missing := count + len(without) - len(found)) > 0:
            found |= dict.fromkeys(self.draw(missing + missing // 8, rng))
            while len(found) > count + len(without):
                found.popitem()
        return list(found)[len(without) :]

    def _spell(self, number: int) -> str:
        """The string of a number below `num_values`."""
        if self.name == "words":
            return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"
        word = ""
        for _ in range(self.num_symbols):
            number, symbol = divmod(number, len(self.alphabet))
            word += self.alphabet[symbol]
        return word

    def _enough(self, count: int) -> int:
        size = 1
        while len(self.alphabet) ** size < 4 * count:
            size += 1
        return size


_KINDS_ARE = "keys and values are " + ", ".join(f"`{kind}`" for kind in KINDS)


@dataclass(frozen=True)
class NeedleFormat:
    """How a needle is written and asked for.

    `question` follows the text and ends where the value begins; `question_many`, if there is one,
    asks for several values at once and has `{keys}`; `intro` comes before the text.
    """

    needle: str
    question: str
    keys: WordKind
    values: WordKind
    question_many: str | None = None
    intro: str = ""

    @classmethod
    def parse(cls, needle: str, question: str, keys: str, values: str) -> NeedleFormat:
        """Read a format of the user's own. raises: UsageError"""
        return cls(needle, question, WordKind.parse(keys), WordKind.parse(values))

    def __post_init__(self) -> None:
        for name, text, fields in (
            ("needle", self.needle, ("key", "value")),
            ("question", self.question, ("key",)),
        ):
            found = re.findall(r"\{(\w*)\}", text)
            for field in fields:
                if field not in found or (field == "value" and found.count(field) > 1):
                    why = f"it needs `{{{field}}}` once, and has it {found.count(field)} times"
                    fix = "write, for example, `--needle '#{key}={value};' --question '#{key}='`"
                    raise UsageError(f"bad {name} `{text}`", why=why, fix=fix)
            for field in found:
                if field not in fields:
                    known = " and ".join(f"`{{{field}}}`" for field in fields)
                    why = f"it has `{{{field}}}`; {name}s have {known}"
                    raise UsageError(f"bad {name} `{text}`", why=why, fix="leave it out")

    @property
    def is_sentence(self) -> bool:
        """Whether needles stand among sentences, with blanks or lines between, or as they are."""
        return " " in self.needle

    @property
    def lead(self) -> str:
        """What stands between the question and the value: the needle's own blank, if any."""
        before = self.needle.partition("{value}")[0]
        blank = before[len(before.rstrip()) :]
        return "" if self.question.endswith((" ", "\n")) else blank

    @property
    def end(self) -> str:
        """What closes a value."""
        return self.needle.partition("{value}")[2]

    def write(self, key: str, value: str) -> str:
        """Write a needle."""
        return self.needle.replace("{key}", key).replace("{value}", value)

    def sign(self, key: str) -> str:
        """What tells this needle from all others: what stands with the key beside its value."""
        before, _, after = self.needle.partition("{value}")
        return (before if "{key}" in before else after).replace("{key}", key).strip()

    def ask(self, key: str) -> str:
        """Write the question for one value."""
        return self.question.replace("{key}", key)

    def ask_many(self, keys: list[str]) -> str | None:
        """Write the question for several values; None where the format has none."""
        if self.question_many is None:
            return None
        named = ", ".join(keys[:-1]) + f" and {keys[-1]}" if len(keys) > 1 else keys[0]
        return self.question_many.replace("{keys}", named)


def sentence_format(keys: str = "words", values: str = "digits:7") -> NeedleFormat:
    """Needles in the shape of RULER's, by kinds of keys and values."""
    value_kind = WordKind.parse(values)
    thing = {"words": "word", "uuid": "uuid", "letters": "word", "digits": "number"}[
        value_kind.name
    ]
    return NeedleFormat(
        needle=f"One of the special magic {thing}s for {{key}} is: {{value}}.",
        question=(
            f"\nWhich special magic {thing} does the text above give for {{key}}? "
            f"The special magic {thing} for {{key}} in the text above is:"
        ),
        keys=WordKind.parse(keys),
        values=value_kind,
        question_many=(
            f"\nWhich special magic {thing}s does the text above give for {{keys}}? "
            f"The special magic {thing}s for {{keys}} in the text above are:"
        ),
        intro=(
            f"Special magic {thing}s are hidden in the text below. "
            "Read it with care: it will be asked for them.\n"
        ),
    )


def format_of(
    needle: str | None, question: str | None, keys: str | None, values: str | None
) -> NeedleFormat:
    """Put a format together from what was given; the rest as usual. raises: UsageError"""
    if (needle is None) != (question is None):
        given, missing = ("needle", "question") if question is None else ("question", "needle")
        why = "a needle and its question belong together"
        fix = f"write the {missing} too, with `--{missing}`"
        raise UsageError(f"`--{given}` is given alone", why=why, fix=fix)
    if needle is None or question is None:
        return sentence_format(keys or "words", values or "digits:7")
    return NeedleFormat.parse(needle, question, keys or "words", values or "digits:7")
