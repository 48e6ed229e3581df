"""Lengths and depths as they are typed."""

from __future__ import annotations

import pytest

from l4cli.commands.needle_lists import parse_depths, parse_lengths
from l4cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", (512,)),
        ("1k,4k,16k", (1024, 4096, 16384)),
        ("1k,4k,...,1m", (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)),
        ("500,1k,2k,...,8k,10m", (500, 1024, 2048, 4096, 8192, 10 << 20)),
        ("512, 1k", (512, 1024)),
        ("1k,2k,...,4k", (1024, 2048, 4096)),
    ],
)
def test_lengths_as_typed(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a whole number"),
        ("1k,,4k", "not a whole number"),
        ("0", "not a whole number"),
        ("-4k", "not a whole number"),
        ("4x", "not a whole number"),
        ("1k,...,1m", "two lengths before it"),
        ("1k,2k,...", "one after it"),
        ("...,1k", "two lengths before it"),
        ("1k,2k,...,4k,...,8k", "2 times"),
        ("1k,4k,...,3m", "meets 1m or 4m, not 3m"),
        ("2k,3k,...,9k", "no multiple"),
        ("1k,1k", "twice"),
        ("4k,1k", "ascending"),
        ("4k,1k,...,64k", "no multiple"),
    ],
)
def test_lengths_that_make_no_sense(text: str, why: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_lengths(text)
    assert why in refused.value.why
    assert f"--lengths {text}" in refused.value.what or "whole" in why


def test_unsorted_lengths_are_shown_sorted() -> None:
    with pytest.raises(UsageError) as refused:
        parse_lengths("4k,512,1m")
    assert refused.value.fix == "write `--lengths 512,4k,1m`"


@pytest.mark.parametrize(
    ("text", "depths"),
    [
        ("11", tuple(range(0, 101, 10))),
        ("4", (0, 33.33, 66.67, 100)),
        ("2", (0, 100)),
        ("1", (50,)),
        ("0,25,50", (0, 25, 50)),
        ("50%", (50,)),
        ("12.5,100", (12.5, 100)),
    ],
)
def test_depths_as_typed(text: str, depths: tuple[float, ...]) -> None:
    assert parse_depths(text) == depths


@pytest.mark.parametrize("text", ["", "0", "5000", "0,101", "-1,5", "a", "50,25", "5,5", "0,,5"])
def test_depths_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_depths(text)
    assert f"--depths {text}" in refused.value.what
