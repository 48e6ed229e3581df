"""How hard and soft targets share a student's loss, step by step.

in: words such as `0.9`, `0.1..0.9`, `token:0.9`; out: shares of the soft targets (no torch)
source: constant and WSD shares as in arXiv 2410.16215; schedules either way; shares by token fall
to zero where the teacher has been giving the true tokens less than the student does
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LOSSES = ("hard", "soft", "hybrid")
GAP_SCALE = 0.25  # nats of lead that count as much
GAP_WINDOW = 32  # targets before a token that tell who is ahead


@dataclass(frozen=True)
class SoftShare:
    """The share of the soft targets: from `start` to `end` over the steps."""

    start: float
    end: float
    gap_scale: float | None = None  # by token: times sigmoid(lead of the teacher / this)
    window: int = GAP_WINDOW  # targets the lead is a mean over; 0: of the token itself
    follows_lr: bool = False  # times the learning rate over its peak

    def __post_init__(self) -> None:
        assert 0 <= self.start <= 1
        assert 0 <= self.end <= 1

    def at(self, step: int, num_steps: int, lr_fraction: float = 1.0) -> float:
        """The share of a step, counted from 0; the last step has `end`."""
        progress = step / (num_steps - 1) if num_steps > 1 else 1.0
        share = self.start + (self.end - self.start) * min(1.0, progress)
        return share * lr_fraction if self.follows_lr else share


def parse_share(text: str) -> SoftShare:
    """Read `0.5`, `0.1..0.9`, `lr:0.9`, `token`, `token:0.9` or `token:0.1..0.9:SCALE:WINDOW`.

    raises: ValueError saying what is wrong
    """
    kind, _, rest = text.partition(":")
    if kind == "token":
        share, _, more = rest.partition(":")
        scale, _, window = more.partition(":")
        start, end = _range(share or "1")
        gap_scale = _number(scale) if scale else GAP_SCALE
        if not 0 < gap_scale < math.inf:
            raise ValueError(f"a scale is above 0, not {scale}")
        if window and not window.isdigit():
            raise ValueError(f"a window is a number of tokens, not `{window}`")
        return SoftShare(start, end, gap_scale, int(window) if window else GAP_WINDOW)
    if kind == "lr":
        return SoftShare(*_range(rest), follows_lr=True)
    return SoftShare(*_range(text))


def _range(text: str) -> tuple[float, float]:
    first, dots, last = text.partition("..")
    start = _number(first)
    end = _number(last) if dots else start
    for share in (start, end):
        if not 0 <= share <= 1:
            raise ValueError(f"a share is from 0 to 1, not {share:g}")
    return start, end


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`{text}` is not a number") from None


@dataclass(frozen=True)
class StudentLoss:
    """What one student minimises."""

    loss: str = "hybrid"  # one of LOSSES
    share: SoftShare | None = None  # of hybrid; None: hard + factor * soft
    factor: float = 1.0
    temperature: float = 1.0
    hard_from_teacher: bool = False
    match_weight: float = 0.0  # of the distance between hidden states
    burn_in: float = 0.0  # share of the steps in which data alone teach

    def __post_init__(self) -> None:
        assert self.loss in LOSSES

    @property
    def reads_predictions(self) -> bool:
        """Whether what the teacher predicts is among its targets."""
        return self.loss != "hard" or self.hard_from_teacher

    @property
    def needs_teacher(self) -> bool:
        return self.reads_predictions or self.match_weight > 0

    def is_burning_in(self, step: int, num_steps: int) -> bool:
        """Whether a step, counted from 0, is among the first ones without the teacher."""
        return step < self.burn_in * num_steps

    def soft_share(
        self, step: int, num_steps: int, lr_fraction: Callable[[int], float]
    ) -> float | None:
        """The share of the soft targets in a step; None: soft are added to whole hard ones."""
        if self.loss == "hard" or self.is_burning_in(step, num_steps):
            return 0.0
        if self.loss == "soft":
            return 1.0
        return None if self.share is None else self.share.at(step, num_steps, lr_fraction(step))
