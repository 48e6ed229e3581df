"""Names of invented people and towns: enough of them for very long texts.

in: a random generator; out: distinct names
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from l4cli.data.longcontext.associations import PEOPLE

_SYLLABLES = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
_ENDS = ("ling", "mann", "sen", "ter", "vik", "well", "dorf", "rick")
_TOWN_ENDS = ("burg", "ford", "ham", "stad", "ton", "mouth", "field", "haven")


def full_names(count: int, rng: np.random.Generator, without: Collection[str] = ()) -> list[str]:
    """Draw distinct names: a first one and an invented second one."""
    return _distinct(count, rng, PEOPLE, _ENDS, without)


def towns(count: int, rng: np.random.Generator, without: Collection[str] = ()) -> list[str]:
    """Draw distinct invented towns."""
    return _distinct(count, rng, (), _TOWN_ENDS, without)


def _distinct(
    count: int,
    rng: np.random.Generator,
    first: tuple[str, ...],
    ends: tuple[str, ...],
    without: Collection[str],
) -> list[str]:
    found = dict.fromkeys(without)
    total = count + len(found)
    while len(found) < total:
        missing = total - len(found)
        parts = rng.integers(len(_SYLLABLES), size=(missing, 3)).tolist()
        firsts = rng.integers(max(1, len(first)), size=missing).tolist()
        last = rng.integers(len(ends), size=missing).tolist()
        for (a, b, c), i, end in zip(parts, firsts, last, strict=True):
            word = (_SYLLABLES[a] + _SYLLABLES[b] + _SYLLABLES[c]).capitalize() + ends[end]
            found[f"{first[i]} {word}" if first else word] = None
    return list(found)[total - count :]
