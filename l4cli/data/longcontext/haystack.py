"""Filler for long texts: as many tokens as are asked for, to the token, from a random place.

in: a source of text, a tokenizer, a random generator; out: text that encodes to exactly n tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from l4cli.data.longcontext.sources import (
    BORDER,
    FileText,
    GeneratedText,
    NoiseText,
    ShardText,
    TextSource,
)
from l4cli.errors import L4Error
from l4cli.text import Tokenizer

_TAIL_CHARS = 1 << 11  # where the last unit's end is looked for first
_MAX_TRIES = 32
_PADS = (" a", " x", " the", ".", "\n", "!", " ", "a")


class Haystack:
    """Where filler comes from; `repeat` lets a source that is too short begin again."""

    def __init__(self, source: TextSource, *, repeat: bool = False) -> None:
        self.source, self.repeat = source, repeat

    @classmethod
    def from_files(cls, paths: Sequence[str | Path], *, repeat: bool = False) -> Haystack:
        """Take plain text from files, folders and patterns, or from one folder of packed shards."""
        if len(paths) == 1 and (Path(paths[0]) / "index.json").is_file():
            return cls(ShardText(paths[0]), repeat=repeat)
        return cls(FileText(paths), repeat=repeat)

    @classmethod
    def from_shards(cls, folder: str | Path, *, repeat: bool = False) -> Haystack:
        """Take the documents of packed shards."""
        return cls(ShardText(folder), repeat=repeat)

    @classmethod
    def generated(cls, seed: int = 0) -> Haystack:
        """Write sentences by a grammar, without end."""
        return cls(GeneratedText(seed))

    @classmethod
    def noise(cls) -> Haystack:
        """Say one paragraph over and over."""
        return cls(NoiseText())

    @property
    def name(self) -> str:
        """The source in the user's words."""
        return self.source.name

    def filler(self, num_tokens: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Filler:
        """Begin reading at a random place; `num_tokens` will be needed in all."""
        return Filler(self, num_tokens, tokenizer, rng)

    def take(self, num_tokens: int, tokenizer: Tokenizer, rng: np.random.Generator) -> str:
        """Give a text of exactly `num_tokens` from a random place.

        raises: L4Error where the source is shorter and may not repeat
        """
        return self.filler(num_tokens, tokenizer, rng).take(num_tokens)


class Filler:
    """Text read on and on from one place, cut by numbers of tokens."""

    def __init__(
        self, haystack: Haystack, num_tokens: int, tokenizer: Tokenizer, rng: np.random.Generator
    ) -> None:
        self._haystack, self._needed, self._rng = haystack, num_tokens, rng
        self._tokenizer, self._is_bytes = tokenizer, tokenizer.name == "bytes"
        self._pieces: Iterator[str] = haystack.source.pieces(rng)
        self._text, self._at, self._has_begun = "", 0, False
        self._num_taken = 0
        self._chars_per_token = 1.0 if self._is_bytes else 4.0

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        if self._is_bytes:
            return len(text) if text.isascii() else len(text.encode())
        return len(self._tokenizer.encode(text))

    def next_char(self) -> str:
        """The character that comes next, or "" at the end."""
        return self._peek(1)

    def take(self, num_tokens: int) -> str:
        """Give the next text of exactly `num_tokens`, cut within a word if need be."""
        if num_tokens <= 0:
            assert num_tokens == 0
            return ""
        text, count = self._prefix(num_tokens)
        self._take(text, num_tokens)
        return text if count == num_tokens else self._padded(text, num_tokens)

    def take_units(self, num_tokens: int) -> tuple[str, int]:
        """Give the next text of at most `num_tokens` that ends with a sentence or line, and its
        count; where no sentence ends in it, it ends with a word, or else anywhere.
        """
        if num_tokens <= 0:
            return "", 0
        text, count = self._prefix(num_tokens)
        whole = text
        for _ in range(_MAX_TRIES):
            end = _last_border(text, self._peek(len(text) + 1)[len(text) :])
            if end == 0:
                break
            text = text[:end]
            count = self.count(text)
            if count <= num_tokens:
                self._take(text, count)
                return text, count
            text = text[:-1]  # this cut cost a token more: look for the border before it
        count = self.count(whole)
        self._take(whole, count)
        return whole, count

    def _take(self, text: str, count: int) -> None:
        self._at += len(text)
        self._num_taken += count

    def _peek(self, num_chars: int) -> str:
        """Show the next characters without taking them; fewer only at the end of the source."""
        missing = num_chars - (len(self._text) - self._at)
        if missing > 0:
            parts = [self._text[self._at :]]
            while missing > 0:
                piece = next(self._pieces, None)
                if piece is None:
                    # A source of blanks alone would be begun again for ever.
                    if not self._haystack.repeat or not self._has_begun:
                        break
                    self._pieces = self._haystack.source.pieces(self._rng)
                    continue
                if not self._has_begun:  # a text begins with a word
                    piece = piece.lstrip()
                    self._has_begun = piece != ""
                parts.append(piece)
                missing -= len(piece)
            self._text, self._at = "".join(parts), 0
        return self._text[self._at : self._at + num_chars]

    def _prefix(self, num_tokens: int) -> tuple[str, int]:
        """Find the longest next text of at most `num_tokens`, and its count."""
        if self._is_bytes:
            return self._prefix_of_bytes(num_tokens)
        size = int(num_tokens * self._chars_per_token * 1.1) + 32
        while True:
            text = self._peek(size)
            ids = self._tokenizer.encode(text)
            # A word cut off at the end may take more tokens than it has as a whole.
            if len(ids) > num_tokens + 8:
                break
            if len(text) < size:
                if len(ids) < num_tokens:
                    self._refuse(len(ids))
                break
            size += size // 4 + 32
        self._chars_per_token = len(text) / len(ids)
        return self._cut(text, ids, num_tokens)

    def _prefix_of_bytes(self, num_tokens: int) -> tuple[str, int]:
        text = self._peek(num_tokens)
        if text.isascii():
            if len(text) < num_tokens:
                self._refuse(len(text))
            return text, num_tokens
        data = text.encode()
        if len(data) < num_tokens:
            self._refuse(len(data))
        text = data[:num_tokens].decode(errors="ignore")  # a character cut in two goes
        return text, self.count(text)

    def _cut(self, text: str, ids: np.ndarray, num_tokens: int) -> tuple[str, int]:
        """Cut where the tokens say, or, if decoding does not give the text back, by trying."""
        for size in range(num_tokens, max(num_tokens - _MAX_TRIES, 0), -1):
            part = self._tokenizer.decode(ids[:size]).rstrip("\ufffd")
            if not text.startswith(part):
                break
            count = self.count(part)
            if count <= num_tokens:
                return part, count
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.count(text[:middle]) <= num_tokens else (low, middle - 1)
            )
        return text[:low], self.count(text[:low])

    def _padded(self, text: str, num_tokens: int) -> str:
        """Bring a text that lacks a few tokens to its count."""
        if self._is_bytes:
            return text + " " * (num_tokens - self.count(text))
        for shorter in range(_MAX_TRIES):
            kept = text[: len(text) - shorter]
            for pad in _PADS:
                for times in range(num_tokens - self.count(kept), _MAX_TRIES):
                    if times >= 0 and self.count(kept + pad * times) == num_tokens:
                        return kept + pad * times
        raise L4Error(
            f"cannot cut filler to {num_tokens} tokens",
            why=f"the vocabulary of `{self._tokenizer.name}` joins whatever is put at its end",
            fix="use another haystack, or another length",
        )

    def _refuse(self, num_left: int) -> None:
        held = self._num_taken + num_left
        raise L4Error(
            f"the haystack {self._haystack.name} is too short",
            why=f"it has {held} tokens, and {self._needed} are needed",
            fix="give more text with `--haystack`, ask for shorter lengths, or leave `--haystack` "
            "out for generated filler",
        )


def _last_border(text: str, following: str) -> int:
    """Where the last sentence or line of a text ends; else its last word; 0 where there is none."""
    looked = text + following  # a sentence's end shows in the blank after it
    for size in (_TAIL_CHARS, len(text)):
        start = max(len(text) - size, 0)
        ends = [found.end() for found in BORDER.finditer(looked, start) if found.end() <= len(text)]
        if ends:
            return ends[-1]
    return max(text.rfind(" "), 0)
