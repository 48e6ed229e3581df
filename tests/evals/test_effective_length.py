"""Effective lengths on curves with known answers."""

from __future__ import annotations

import pytest

from l4cli.evals.effective_length import nolima, ruler_effective_length, weighted_averages

# Llama 4 Scout as NoLiMa's table has it, in percent; the paper's effective length is 1K.
SCOUT = {1024: 0.723, 2048: 0.618, 4096: 0.508, 8192: 0.355, 16384: 0.269, 32768: 0.216}


def test_ruler_takes_the_longest_length_that_passes() -> None:
    assert ruler_effective_length({4096: 0.95, 8192: 0.90, 16384: 0.856, 32768: 0.85}) == 16384
    assert ruler_effective_length({4096: 0.95, 8192: 0.90}) == 8192
    assert ruler_effective_length({4096: 0.80, 8192: 0.75}) is None
    assert ruler_effective_length({4096: 0.80, 8192: 0.75}, threshold=0.8) == 4096


def test_a_pass_beyond_a_failure_does_not_count() -> None:
    assert ruler_effective_length({4096: 0.95, 8192: 0.5, 16384: 0.99}) == 4096
    assert ruler_effective_length({16384: 0.99, 4096: 0.5}) is None


def test_nolima_measures_against_the_short_contexts() -> None:
    # A base of 81.7 comes from 250, 500 and 1K tokens; these two are made to give that mean.
    figures = nolima({250: 0.90, 500: 0.828, **SCOUT})
    assert figures.base_lengths == (250, 500, 1024)
    assert figures.base_score == pytest.approx(0.817)
    assert figures.threshold == pytest.approx(0.69445)
    assert figures.effective_length == 1024


def test_nolima_without_short_lengths_takes_the_shortest() -> None:
    figures = nolima({8192: 0.5, 4096: 0.8, 16384: 0.7})
    assert figures.base_lengths == (4096,)
    assert figures.base_score == 0.8
    assert figures.effective_length == 4096


def test_nolima_of_a_model_that_knows_nothing_is_no_length() -> None:
    assert nolima({512: 0.0, 4096: 0.0}).effective_length is None


def test_weighted_averages_by_hand() -> None:
    rising, falling = weighted_averages({8192: 0.4, 4096: 1.0, 16384: 0.1})
    assert rising == pytest.approx((1 * 1.0 + 2 * 0.4 + 3 * 0.1) / 6)
    assert falling == pytest.approx((3 * 1.0 + 2 * 0.4 + 1 * 0.1) / 6)
    assert weighted_averages({512: 0.7}) == (0.7, 0.7)
