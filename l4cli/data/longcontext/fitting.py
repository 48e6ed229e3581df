"""Texts made of as many units as fit, topped up with filler to an exact length.

in: a function that writes n units, a number of tokens; out: pieces that have it exactly
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from l4cli.data.longcontext.sample import Question
from l4cli.data.longcontext.weaving import Setting, fresh_filler, odd_filler, replace

_MAX_TRIES = 32
_FIRST_UNITS = 8
_SLACK = 1e-4  # of a long text, which filler may take: the last units cost many tries


@dataclass
class Built:
    """Pieces of text, and those that hold what each question asks for."""

    pieces: list[str]
    evidence: list[list[int]]


def fill(
    build: Callable[[int], Built],
    questions: Sequence[Question],
    setting: Setting,
    *,
    least: int = 0,
    most: int | None = None,
) -> Built:
    """Build with as many units as fit, and put filler before them for what is left.

    `build` gives the same for the same number, and more tokens for a larger one.
    raises: UsageError where not even `least` units fit
    """
    room = setting.room(questions)
    built = _largest(build, room, setting, least, most)
    left = room - _size(built, setting)
    if left == 0:
        return built
    rest = odd_filler(left, setting)
    shifted = [[place + 1 for place in places] for places in built.evidence]
    return Built([rest, *built.pieces], shifted)


def without(built: Built, setting: Setting) -> tuple[str, ...]:
    """The same text with filler in place of all evidence."""
    places = sorted({place for group in built.evidence for place in group})
    size = sum(setting.count(built.pieces[place]) for place in places)
    return replace(built.pieces, places, fresh_filler(setting, size), setting)


def _size(built: Built, setting: Setting) -> int:
    return sum(map(setting.count, built.pieces))


def _largest(
    build: Callable[[int], Built], room: int, setting: Setting, least: int, most: int | None
) -> Built:
    """Close in on the largest number of units, guessing by their mean size."""
    low, best = least, build(least)
    low_size = _size(best, setting)
    if low_size > room:
        setting.refuse(setting.length - setting.reserve - room + low_size)
    # The smallest number known not to fit; every unit has a token at least.
    high = low + room - low_size + 1 if most is None else most + 1
    high_size: int | None = None
    number = min(low + _FIRST_UNITS, high - 1)
    for _ in range(_MAX_TRIES):
        if number <= low:
            break
        built = build(number)
        size = _size(built, setting)
        if size <= room:
            mean = size / number if high_size is None else (high_size - size) / (high - number)
            low, low_size, best = number, size, built
        else:
            mean = (size - low_size) / (number - low)
            high, high_size = number, size
        if mean > 0 and room - low_size < max(mean, room * _SLACK):  # none fits, or hardly any
            break
        step = int((room - low_size) / mean) if mean > 0 else 1
        number = min(low + max(1, step), high - 1)
    return best
