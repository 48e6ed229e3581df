"""Which row of which data set is sample number n: a pure rule, the same for every rank.

in: `a/:0.7 b/:0.3`; out: (data set, row) per global sample, resumable from one count a data set

Without weights every data set counts by its rows, so that one epoch sees each row once. With
weights all must have one. No data set is ever a whole sample ahead of its share; within one, each
epoch is another permutation of the rows, computed and not stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from l4cli.errors import UsageError

_NUM_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Part:
    """One data set of a mixture; without a weight it counts by its rows."""

    path: Path
    weight: Fraction | None = None


def parse_mixture(specs: Sequence[str]) -> list[Part]:
    """Read `PATH` or `PATH:WEIGHT`; an existing path that ends in `:3` is meant as the path."""
    if not specs:
        raise UsageError(
            "no data to train on",
            why="no folder of packed shards was named",
            fix="name one or more, for example `shards/` or `code/:0.3 web/:0.7`",
        )
    parts = [_parse_part(spec) for spec in specs]
    with_weight = [part.weight is not None for part in parts]
    if any(with_weight) and not all(with_weight):
        missing = specs[with_weight.index(False)]
        raise UsageError(
            f"`{missing}` has no weight",
            why="other data sets of the mixture have one",
            fix=f"give every one a weight, such as `{missing}:0.5`, or none",
        )
    seen: set[Path] = set()
    for spec, part in zip(specs, parts, strict=True):
        if part.path.resolve() in seen:
            raise UsageError(
                f"`{spec}` is named twice",
                why="a data set has one place in a mixture",
                fix="name it once; a larger weight makes it count more",
            )
        seen.add(part.path.resolve())
    return parts


def _parse_part(spec: str) -> Part:
    path, colon, text = spec.rpartition(":")
    if Path(spec).exists() or not colon or not path:
        return Part(Path(spec))
    try:
        is_number = math.isfinite(float(text))
    except ValueError:
        is_number = False
    if not is_number:
        return Part(Path(spec))
    # Exactly what was typed: 0.7 is 7/10 here.
    weight = Fraction(text)
    if weight <= 0:
        raise UsageError(
            f"`{spec}` has the weight {text}",
            why="weights are above zero",
            fix="leave the data set out, or give it a weight above zero",
        )
    return Part(Path(path), weight)


def whole_weights(parts: Sequence[Part], num_rows: Sequence[int]) -> list[int]:
    """The same proportions in whole numbers, so that no rounding ever decides."""
    shares = [
        Fraction(rows) if part.weight is None else part.weight
        for part, rows in zip(parts, num_rows, strict=True)
    ]
    scale = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    common = math.gcd(*weights)
    return [weight // common for weight in weights]


class Mixture:
    """Draws samples one after the other; its whole state is `counts`."""

    def __init__(
        self, weights: Sequence[int], num_rows: Sequence[int], seed: int, shuffle: bool = True
    ) -> None:
        assert all(weight > 0 for weight in weights)
        assert all(num > 0 for num in num_rows)
        self.weights, self.num_rows = list(weights), list(num_rows)
        self.seed, self.shuffle = seed, shuffle
        self.counts = [0] * len(self.weights)  # samples drawn of each data set
        self._total = sum(self.weights)

    @property
    def num_samples(self) -> int:
        """Samples drawn in all."""
        return sum(self.counts)

    def draw(self) -> tuple[int, int, int]:
        """The next sample: data set, epoch, place in the epoch."""
        following = self.num_samples + 1
        # The data set furthest behind its share; the first one if several are.
        behind = [
            weight * following - count * self._total
            for weight, count in zip(self.weights, self.counts, strict=True)
        ]
        chosen = behind.index(max(behind))
        epoch, place = divmod(self.counts[chosen], self.num_rows[chosen])
        self.counts[chosen] += 1
        return chosen, epoch, place

    def row(self, dataset: int, epoch: int, place: int) -> int:
        """The row that stands at a place of an epoch."""
        if not self.shuffle:
            return place
        key = f"{self.seed}/{dataset}/{epoch}"
        return permuted(place, self.num_rows[dataset], key)


def permuted(place: int, size: int, key: str) -> int:
    """Where `place` goes in a permutation of `size` that `key` picks; needs no memory.

    source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002): a Feistel network
    over the next even power of two, walked until it is back inside
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _NUM_ROUNDS).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]
    while True:
        left, right = place >> half_bits, place & half_mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & half_mask)
        place = left << half_bits | right
        if place < size:
            return place


def _mixed(x: int) -> int:
    """The finalizer of splitmix64: every bit of `x` reaches every bit of the result."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK_64
    return x ^ x >> 31
