"""Binomial intervals against values worked by hand and against brute sums."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from l4cli.evals.intervals import clopper_pearson, upper_tail, wilson


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [
        # z = 1.959964, z^2 = 3.841459; centre (p + z^2/2n) / (1 + z^2/n) worked on paper.
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        (5, 10, 0.236593, 0.763407),
        (8, 10, 0.490162, 0.943318),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, four digits
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_by_hand(correct: int, samples: int, low: float, high: float) -> None:
    tolerance = 2e-6 if samples == 10 else 5.1e-5
    assert wilson(correct, samples) == pytest.approx((low, high), abs=tolerance)


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [
        # With all wrong the upper bound solves (1 - p)^n = alpha / 2.
        (0, 10, 0.0, 1 - 0.025 ** (1 / 10)),
        (10, 10, 0.025 ** (1 / 10), 1.0),
        (1, 1, 0.025, 1.0),
        # One of two right: 1 - (1 - p)^2 = 0.025 below, and mirrored above.
        (1, 2, 1 - math.sqrt(0.975), math.sqrt(0.975)),
        (81, 263, 0.2527, 0.3676),  # Newcombe 1998, table I
        (15, 148, 0.0578, 0.1617),
        (1, 29, 0.0009, 0.1776),
    ],
)
def test_clopper_pearson_by_hand(correct: int, samples: int, low: float, high: float) -> None:
    tolerance = 1e-12 if samples < 20 else 5.1e-5  # the table has four digits
    assert clopper_pearson(correct, samples) == pytest.approx((low, high), abs=tolerance)


@pytest.mark.parametrize("share", [Fraction(1, 100), Fraction(1, 3), Fraction(19, 20)])
def test_the_tail_equals_an_exact_sum(share: Fraction) -> None:
    for samples in (1, 7, 60):
        for correct in range(samples + 1):
            exact = sum(
                math.comb(samples, k) * share**k * (1 - share) ** (samples - k)
                for k in range(correct, samples + 1)
            )
            assert upper_tail(correct, samples, float(share)) == pytest.approx(
                float(exact), rel=1e-12, abs=1e-300
            )


def test_the_exact_interval_covers_and_wilson_lies_near() -> None:
    """For every true share the exact interval holds it at least 95% of the time."""
    samples = 12
    exact = [clopper_pearson(k, samples) for k in range(samples + 1)]
    score = [wilson(k, samples) for k in range(samples + 1)]
    covered_by_score = []
    for share in (step / 97 for step in range(1, 97)):
        weights = [
            math.comb(samples, k) * share**k * (1 - share) ** (samples - k)
            for k in range(samples + 1)
        ]
        assert sum(w for w, (a, b) in zip(weights, exact, strict=True) if a <= share <= b) >= 0.95
        covered_by_score.append(
            sum(w for w, (a, b) in zip(weights, score, strict=True) if a <= share <= b)
        )
    assert sum(covered_by_score) / len(covered_by_score) == pytest.approx(0.95, abs=0.02)


def test_a_large_grid_neither_overflows_nor_takes_long() -> None:
    low, high = clopper_pearson(4990, 5000)
    assert 0.996 < low < 0.998 < high < 0.9991
    assert wilson(4990, 5000) == pytest.approx((low, high), abs=3e-4)


def test_partial_scores_may_be_summed() -> None:
    assert wilson(2.5, 10)[0] < 0.25 < wilson(2.5, 10)[1]
