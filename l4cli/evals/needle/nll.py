"""Bits per byte by position over one very long run: does what stands far back still help?

in: documents as ids, in two orders; out: curves in buckets, and whether they fall
source: the curve Llama 4 was introduced with (negative log-likelihood of code by position)

A curve falls with its content too, so the same documents are read a second time in another order.
The first of 64 equal stretches is left out of the trend: there any context at all helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from l4cli.errors import L4Error
from l4cli.inference import Engine

NUM_STRETCHES = 64  # of equal length: what the trend is fitted to
NUM_LINEAR = 16  # equal buckets of the curve
FIRST_EDGE = 128  # where buckets that double begin
SCORED_AT_ONCE = 1 << 15  # tokens whose log-probabilities are held


@dataclass(frozen=True)
class Tally:
    """What each token of a run cost, and the bytes it stands for."""

    nats_T: np.ndarray  # float32 [n]
    bytes_T: np.ndarray  # int64 [n]

    def bits_per_byte(self, first: int, end: int) -> float | None:
        """None where there is no byte of text."""
        num_bytes = int(self.bytes_T[first:end].sum())
        if num_bytes == 0:
            return None
        return float(self.nats_T[first:end].sum(dtype=np.float64)) / math.log(2) / num_bytes


def cut_to_length(documents: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """The first documents that together have `length` tokens, the last one cut; all if too few."""
    taken: list[np.ndarray] = []
    missing = length
    for ids in documents:
        if missing <= 0:
            break
        taken.append(ids[:missing])
        missing -= len(taken[-1])
    return taken


def tally(
    engine: Engine,
    bos_id: int | None,
    documents: Sequence[np.ndarray],
    token_bytes: np.ndarray,
    on_progress: Callable[[int], None] = lambda num_read: None,
) -> Tally:
    """Read the documents as one run; log-probabilities are held for a piece at a time.

    shapes: token_bytes int32 [V], bytes of each token
    """
    ids = np.concatenate(documents).astype(np.int64)
    cache = engine.new_cache()
    start = 0
    if bos_id is not None:
        engine.prefill([bos_id], cache=cache)
    else:  # the first token is given, not foretold
        engine.prefill(ids[:1], cache=cache)
        start = 1
    nats = [np.zeros(start, np.float32)]
    for first in range(start, len(ids), SCORED_AT_ONCE):
        piece = ids[first : first + SCORED_AT_ONCE]
        found = -engine.score(piece, cache=cache).float().cpu().numpy()
        if not np.isfinite(found).all():
            at = first + int(np.flatnonzero(~np.isfinite(found))[0])
            why, fix = (
                f"token {at} has no finite probability",
                "check the weights: `l4 info --verify`",
            )
            raise L4Error("the model gives no numbers", why=why, fix=fix)
        nats.append(found)
        on_progress(first + len(piece))
    num_bytes = token_bytes[ids].astype(np.int64)
    num_bytes[:start] = 0
    return Tally(np.concatenate(nats), num_bytes)


def curve(found: Tally) -> dict[str, Any]:
    """The run in buckets, with the trend over its stretches."""
    length = len(found.nats_T)
    doubling = [0]
    edge = min(FIRST_EDGE, length)
    while edge < length:
        doubling.append(edge)
        edge *= 2
    linear = [length * i // NUM_LINEAR for i in range(NUM_LINEAR)]
    return {
        "num_tokens": length,
        "bits_per_byte": found.bits_per_byte(0, length),
        "doubling": _buckets(found, [*doubling, length]),
        "linear": _buckets(found, [*linear, length]),
        **trend(found),
    }


def _buckets(found: Tally, edges: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"first": first, "end": end, "bits_per_byte": found.bits_per_byte(first, end)}
        for first, end in itertools.pairwise(edges)
        if end > first
    ]


def trend(found: Tally) -> dict[str, Any]:
    """Change of bits per byte with every doubling of the position, and its 95% interval.

    A line through equal stretches, the first left out, against log2 of their middles. The curve
    falls if the whole interval is below zero.
    """
    length = len(found.nats_T)
    edges = [length * i // NUM_STRETCHES for i in range(1, NUM_STRETCHES + 1)]
    points = [
        (math.log2((first + end) / 2), value)
        for first, end in itertools.pairwise(edges)
        if end > first and (value := found.bits_per_byte(first, end)) is not None
    ]
    if len(points) < 8:
        return {"slope": None, "slope_low": None, "slope_high": None, "falls": None}
    x, y = np.array(points, np.float64).T
    dx = x - x.mean()
    slope = float((dx * y).sum() / (dx * dx).sum())
    left = y - y.mean() - slope * dx
    error = math.sqrt(float((left * left).sum()) / (len(points) - 2) / float((dx * dx).sum()))
    low, high = slope - 1.96 * error, slope + 1.96 * error
    return {"slope": slope, "slope_low": low, "slope_high": high, "falls": high < 0}
