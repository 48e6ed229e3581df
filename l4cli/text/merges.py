"""The merges of a vocabulary defined by ranks: every pair of its tokens that forms a token.

in: tokens by id; out: pairs of ids, and the id each forms, in the order in which pairs merge
source: transformers/convert_slow_tokenizer.py `TikTokenConverter`, whose order this is
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_PREFIX_BITS = 24
_PREFIX_SHIFT = np.uint64(64 - _PREFIX_BITS)


def derive_merges(tokens: Sequence[bytes]) -> np.ndarray:
    """Find all pairs; int64 [n, 3]: left, right, formed; by `formed`, then by the pair.

    A rolling hash finds the halves of all tokens at once (200,000 tokens in half a second, a
    loop takes two); what it finds is compared byte by byte.
    """
    text = np.frombuffer(b"".join(tokens), dtype=np.uint8)
    lengths = np.array([len(token) for token in tokens], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    hashes = _RollingHash(text)
    token_hashes = hashes.of(starts, ends)
    whole = np.repeat(np.arange(len(tokens)), lengths - 1)
    split = _ranges(starts + 1, lengths - 1)
    left_hash = hashes.of(starts[whole], split)
    right_hash = hashes.of(split, ends[whole])
    # Most halves are no tokens; a table of hash prefixes rules nearly all of them out.
    is_known = np.zeros(1 << _PREFIX_BITS, dtype=bool)
    is_known[token_hashes >> _PREFIX_SHIFT] = True
    maybe = is_known[left_hash >> _PREFIX_SHIFT] & is_known[right_hash >> _PREFIX_SHIFT]
    whole, left_hash, right_hash = whole[maybe], left_hash[maybe], right_hash[maybe]
    left, right = (_look_up(token_hashes, wanted) for wanted in (left_hash, right_hash))
    is_pair = (token_hashes[left] == left_hash) & (token_hashes[right] == right_hash)
    whole, left, right = whole[is_pair], left[is_pair], right[is_pair]
    formed = np.stack([left, right], axis=1).reshape(-1)
    same = (
        text[_ranges(starts[formed], lengths[formed])]
        == text[_ranges(starts[whole], lengths[whole])]
    )
    assert same.all(), "two different tokens have one hash"
    return np.stack([left, right, whole], axis=1)[np.lexsort((right, left, whole))]


def _look_up(token_hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Find the token of each hash; where there is none, any token."""
    by_hash = np.argsort(token_hashes)
    places = np.searchsorted(token_hashes, wanted, sorter=by_hash)
    return by_hash[np.minimum(places, len(by_hash) - 1)]


class _RollingHash:
    """Hashes of any part of a text, modulo 2^64: sum of byte * multiplier^place, moved to 0."""

    def __init__(self, text: np.ndarray) -> None:
        self._sums = np.zeros(len(text) + 1, dtype=np.uint64)
        np.cumsum((text + np.uint64(1)) * _powers(_MULTIPLIER, len(text)), out=self._sums[1:])
        self._inverse = _powers(pow(_MULTIPLIER, -1, 1 << 64), len(text) + 1)

    def of(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return (self._sums[last] - self._sums[first]) * self._inverse[first]


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Join the ranges start, start + 1, ... of the given lengths."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
