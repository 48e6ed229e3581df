"""The learning rate of every step, as a pure function of the step.

in: a step counted from 0; out: a learning rate
source: WSD, arXiv 2404.06395; tails as in torchtitan's `lr_scheduler.py`
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

KINDS = ("wsd", "cosine", "linear", "constant")
DECAY_SHAPES = ("sqrt", "linear")


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a plateau with a tail (`wsd`), one long decay, or neither.

    The first step has peak / warmup. The minimum would be that of the step after the last: a
    last step at a minimum of 0 would do nothing but cost its time.
    """

    kind: str  # one of KINDS
    peak_lr: float
    min_lr: float
    num_steps: int
    num_warmup: int
    decay_frac: float = 0.2  # share of the steps in the tail of `wsd`
    decay_shape: str = "sqrt"

    def __post_init__(self) -> None:
        assert self.kind in KINDS
        assert self.decay_shape in DECAY_SHAPES
        assert 0 <= self.min_lr <= self.peak_lr
        assert self.num_steps > 0

    def with_steps(self, num_steps: int) -> Schedule:
        """The same options for another length of run."""
        return replace(self, num_steps=num_steps)

    @property
    def first_decay_step(self) -> int:
        """The first step whose learning rate is below the peak for good."""
        if self.kind == "constant":
            return self.num_steps
        if self.kind == "wsd":
            num_decay = round(self.num_steps * self.decay_frac)
            return max(self.num_warmup, self.num_steps - num_decay)
        return min(self.num_warmup, self.num_steps)

    def lr(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        if step < self.num_warmup:
            return self.peak_lr * (step + 1) / self.num_warmup
        first = self.first_decay_step
        if step < first or first >= self.num_steps:
            return self.peak_lr
        progress = min(1.0, (step + 1 - first) / (self.num_steps + 1 - first))
        return self.min_lr + (self.peak_lr - self.min_lr) * self._remaining(progress)

    def _remaining(self, progress: float) -> float:
        """How much of the way down is left: 1 at progress 0, 0 at progress 1."""
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "wsd" and self.decay_shape == "sqrt":
            return 1 - math.sqrt(progress)
        return 1 - progress
