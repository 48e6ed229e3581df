"""Lists of lengths and depths as they are typed: `1k,4k,...,1m`, `11`, `0,25,50`.

in: words on the command line; out: numbers in ascending order, or a refusal (no torch)
"""

from __future__ import annotations

import math
import re

from l4cli.commands.options import LENGTHS, parse_number
from l4cli.errors import UsageError
from l4cli.evals.cells import length_text

DOTS = "..."
MAX_LENGTHS = 64
MAX_DEPTHS = 1001
_DEPTH = re.compile(r"(\d{1,3}(?:\.\d{1,4})?)%?")


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read `512,1k,4k` or `1k,4k,...,1m`, where dots go on with the same factor."""
    words = [word.strip() for word in text.split(",")]
    if words.count(DOTS) > 1:
        raise _bad_lengths(text, f"`{DOTS}` stands in it {words.count(DOTS)} times")
    lengths = [
        DOTS if word == DOTS else parse_number(word, "--lengths", "1k,4k,16k", LENGTHS)
        for word in words
    ]
    numbers = _filled_in(text, lengths)
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise _bad_lengths(text, f"{twice} stands in it twice")
    if sorted(numbers) != numbers:
        fix = "write `--lengths " + ",".join(map(length_text, sorted(numbers))) + "`"
        raise _bad_lengths(text, "they are not in ascending order", fix)
    if len(numbers) > MAX_LENGTHS:
        raise _bad_lengths(text, f"it comes to {len(numbers)} lengths, more than {MAX_LENGTHS}")
    return tuple(numbers)


def _filled_in(text: str, lengths: list[int | str]) -> list[int]:
    """Replace the dots by what goes on with the factor of the two lengths before them."""
    before: list[int] = []
    for place, length in enumerate(lengths):
        if isinstance(length, int):
            before.append(length)
            continue
        if len(before) < 2 or place + 1 == len(lengths):
            raise _bad_lengths(text, f"`{DOTS}` needs two lengths before it and one after it")
        end = lengths[place + 1]
        assert isinstance(end, int)
        first, last = before[-2:]
        if last <= first or last % first:
            raise _bad_lengths(text, f"{last} is no multiple of {first} for `{DOTS}` to go on with")
        factor = last // first
        while before[-1] * factor < end:
            before.append(before[-1] * factor)
        if before[-1] * factor != end:
            nearest = f"{length_text(before[-1])} or {length_text(before[-1] * factor)}"
            why = f"going on by {factor} meets {nearest}, not {length_text(end)}"
            raise _bad_lengths(text, why)
    return before


def _bad_lengths(text: str, why: str, fix: str | None = None) -> UsageError:
    fix = fix or "write `--lengths 1k,4k,16k` or `--lengths 1k,4k,...,1m`"
    return UsageError(f"cannot use `--lengths {text}`", why=why, fix=fix)


def parse_depths(text: str) -> tuple[float, ...]:
    """Read how many depths, evenly from 0 to 100, or the depths: `0,25,50` or `50%`, in percent."""
    what = f"cannot use `--depths {text}`"
    fix = "write a number of depths, `--depths 11`, or percents, `--depths 0,25,50`"
    if re.fullmatch(r"\d{1,9}", text):
        count = int(text)
        if not 1 <= count <= MAX_DEPTHS:
            why = f"a number of depths is from 1 to {MAX_DEPTHS}"
            raise UsageError(what, why=why, fix=fix)
        if count == 1:
            return (50.0,)
        return tuple(round(100 * i / (count - 1), 2) for i in range(count))
    depths = []
    for word in text.split(","):
        match = _DEPTH.fullmatch(word.strip())
        depth = float(match[1]) if match else math.nan
        if not 0 <= depth <= 100:
            why = f"`{word.strip()}` is not a percentage from 0 to 100"
            raise UsageError(what, why=why, fix=fix)
        depths.append(depth)
    if len(set(depths)) < len(depths):
        raise UsageError(what, why="a depth stands in it twice", fix=fix)
    if sorted(depths) != depths:
        fix = "write `--depths " + ",".join(f"{depth:g}" for depth in sorted(depths)) + "`"
        raise UsageError(what, why="they are not in ascending order", fix=fix)
    return tuple(depths)
