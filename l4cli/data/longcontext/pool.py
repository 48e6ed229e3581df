"""A stock of encoded filler, to cut training documents from without encoding again and again.

in: a haystack, a tokenizer; out: slices of ids from random places, and where sentences end in them
"""

from __future__ import annotations

import numpy as np

from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.sources import BORDER
from l4cli.text import Tokenizer

_FIRST_TOKENS = 1 << 14  # a stock doubles with every renewal: a few documents cost little
_MAX_TOKENS = 1 << 19
_USES = 4  # times its size that are cut from a stock before other text is read


class FillerPool:
    """Encoded filler from one place of a haystack; renewed now and then."""

    def __init__(
        self, haystack: Haystack, tokenizer: Tokenizer, rng: np.random.Generator, max_tokens: int
    ) -> None:
        # A text that is shorter than a document is better than none: nothing is asked of it.
        self._haystack = Haystack(haystack.source, repeat=True)
        self._tokenizer, self._rng = tokenizer, rng
        self._least, self._size, self._num_left = 4 * max_tokens, _FIRST_TOKENS, 0
        self._ids = np.zeros(0, np.uint32)
        self._borders, self._are_lines = np.zeros(0, np.int64), np.zeros(0, bool)

    def take(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut ids from where a sentence begins; and where sentences and lines end in them.

        shapes: -> uint32 [n], int64 [borders], bool [borders]: whether each one ends a line
        """
        if self._num_left <= 0:
            self._renew()
        self._num_left -= num_tokens
        last = int(np.searchsorted(self._borders, len(self._ids) - num_tokens, side="right"))
        first = int(self._rng.integers(last)) if last else 0
        start = int(self._borders[first]) if last else 0
        end = int(np.searchsorted(self._borders, start + num_tokens, side="right"))
        within = slice(first, end)
        ids = self._ids[start : start + num_tokens]
        return ids, self._borders[within] - start, self._are_lines[within]

    def _renew(self) -> None:
        size = max(self._size, self._least)
        text = self._haystack.take(size, self._tokenizer, self._rng)
        ends = [0, *(found.end() for found in BORDER.finditer(text))]
        units = [text[a:b] for a, b in zip(ends, [*ends[1:], len(text)], strict=True)]
        ids, lengths = encode_all([unit for unit in units if unit], self._tokenizer)
        self._ids, self._num_left = ids, _USES * size
        self._size = min(2 * self._size, _MAX_TOKENS)
        self._borders = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        self._are_lines = np.array([end == 0 or text[end - 1] == "\n" for end in ends], bool)
        self._are_lines = self._are_lines[: len(self._borders)]


def encode_all(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Encode many short texts, each apart.

    shapes: -> uint32 [n], int64 [texts]
    """
    if tokenizer.name == "bytes":  # there, one after the other is the same as all at once
        joined = "".join(texts)
        lengths = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        return tokenizer.encode(joined), np.array(lengths, np.int64)
    parts = [tokenizer.encode(text) for text in texts]
    ids = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    return ids, np.array([len(part) for part in parts], np.int64)
