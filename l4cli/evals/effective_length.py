"""Up to which length a model can be said to read: three published figures from one curve.

in: the mean score, 0 to 1, by context length; out: lengths and weighted means
source: RULER (arXiv 2404.06654): threshold 85.6, what Llama-2-7B-chat reached at 4K, wAvg;
NoLiMa (arXiv 2502.05167): 0.85 of the score at short contexts

Curves are not always monotone. Here a length counts only if it and every shorter length tested
pass, so that a lucky far cell proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RULER_THRESHOLD = 0.856
NOLIMA_SHARE = 0.85
NOLIMA_BASE_LENGTH = 1024


def longest_passing(scores: Mapping[int, float], threshold: float) -> int | None:
    """The longest length that passes with every shorter one; None if the shortest fails."""
    longest = None
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        longest = length
    return longest


def ruler_effective_length(
    scores: Mapping[int, float], threshold: float = RULER_THRESHOLD
) -> int | None:
    """RULER's effective length: mean scores over tasks against a fixed threshold."""
    return longest_passing(scores, threshold)


@dataclass(frozen=True)
class NoLiMa:
    """NoLiMa's figures: what the model can do at short contexts, and how long it keeps to it."""

    base_score: float
    base_lengths: tuple[int, ...]  # the lengths the base score is the mean of
    threshold: float
    effective_length: int | None


def nolima(scores: Mapping[int, float], share: float = NOLIMA_SHARE) -> NoLiMa:
    """Base score: the mean over lengths to 1K, or the shortest length where none is so short.

    A base of zero has no effective length: nothing was learned that could be kept.
    """
    assert scores, "no lengths"
    short = tuple(n for n in sorted(scores) if n <= NOLIMA_BASE_LENGTH) or (min(scores),)
    base = sum(scores[n] for n in short) / len(short)
    length = longest_passing(scores, share * base) if base > 0 else None
    return NoLiMa(base, short, share * base, length)


def weighted_averages(scores: Mapping[int, float]) -> tuple[float, float]:
    """RULER's wAvg(inc) and wAvg(dec): weights 1 to n by length, rising and falling.

    The first ranks models for use at long contexts, the second for use at short ones.
    """
    assert scores, "no lengths"
    ordered = [scores[length] for length in sorted(scores)]
    total = len(ordered) * (len(ordered) + 1) / 2
    rising = sum(weight * score for weight, score in enumerate(ordered, 1)) / total
    falling = sum(weight * score for weight, score in enumerate(reversed(ordered), 1)) / total
    return rising, falling
