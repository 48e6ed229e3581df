"""How far a share of right answers can be trusted: binomial confidence intervals.

in: right answers of so many; out: the bounds of the true share
source: Wilson 1927 (score interval); Clopper and Pearson 1934 (exact, never too narrow)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist


def wilson(num_correct: float, num_samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval: good for few samples and near 0 and 1, never empty.

    Partial scores may be summed into `num_correct`; they vary less than right-or-wrong ones of
    the same mean, so the interval is then too wide rather than too narrow.
    """
    _check(num_correct, num_samples, confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = num_correct / num_samples, z * z / num_samples
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / num_samples + spread / (4 * num_samples))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    # Exactly 0 and 1 at the ends; rounding leaves 1e-17.
    low = 0.0 if num_correct == 0 else max(0.0, low)
    high = 1.0 if num_correct == num_samples else min(1.0, high)
    return low, high


def clopper_pearson(
    num_correct: int, num_samples: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The exact interval: it holds the true share at least as often as `confidence` says."""
    _check(num_correct, num_samples, confidence)
    tail = (1 - confidence) / 2
    low, high = 0.0, 1.0
    if num_correct > 0:
        # The share at which so many right answers or more are just too rare to believe.
        low = _rising_root(lambda p: upper_tail(num_correct, num_samples, p) - tail)
    if num_correct < num_samples:
        wrong = num_samples - num_correct
        high = 1 - _rising_root(lambda q: upper_tail(wrong, num_samples, q) - tail)
    return low, high


def upper_tail(num_correct: int, num_samples: int, share: float) -> float:
    """The probability of `num_correct` right answers or more; summed in logs, largest first."""
    if num_correct <= 0:
        return 1.0
    if share in (0.0, 1.0):
        return share
    log_p, log_q = math.log(share), math.log1p(-share)
    logs = [
        _log_choose(num_samples, k) + k * log_p + (num_samples - k) * log_q
        for k in range(num_correct, num_samples + 1)
    ]
    largest = max(logs)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(term - largest) for term in logs))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _rising_root(function: Callable[[float], float]) -> float:
    """Where a rising function on 0 to 1 crosses zero, by bisection to the last bits."""
    low, high = 0.0, 1.0
    while high - low > 1e-14:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _check(num_correct: float, num_samples: int, confidence: float) -> None:
    assert num_samples > 0, "an interval needs at least one sample"
    assert 0 <= num_correct <= num_samples, (num_correct, num_samples)
    assert 0 < confidence < 1, confidence
