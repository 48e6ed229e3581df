"""Figures of a run: token-weighted means, speed, memory, and the file they go to.

in: sums and weights of losses; out: lines of `metrics.jsonl` (DESIGN "machine-readable names")
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4cli.errors import L4Error

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class LossSum:
    """A loss before it is divided: its sum and what to divide by (summed over the whole step)."""

    sum: Tensor  # fp32 scalar, differentiable
    weight: float
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # further sums of the same weight


class Means:
    """Weighted means over the steps since the last line; travels with a checkpoint."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, value_sum: float, weight: float) -> None:
        """Add a sum and its weight."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value_sum
        entry[1] += weight

    def take(self) -> dict[str, float]:
        """The mean of everything added, then nothing."""
        means = {name: s / w for name, (s, w) in self._sums.items() if w}
        self._sums = {}
        return means

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(entry) for name, entry in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self._sums = {name: list(entry) for name, entry in state.items()}


class Stopwatch:
    """Wall time since the last reading, without what ran under `paused`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave this block out of the next reading."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began

    def read(self) -> float:
        """Seconds since the last reading, which this one becomes."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed


class MetricsFile:
    """`metrics.jsonl` of one run: one JSON object a line, whole lines only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def rewind(self, step: int, *, keeps_evaluation: bool = True) -> None:
        """Keep only lines up to a step, so that a resumed run's file is that of a straight run.

        An evaluation of that very step stays unless it is about to be done again.
        """
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
                line_step, is_evaluation = event["step"], event["event"] == "eval"
            except (ValueError, KeyError, TypeError):
                break  # torn by a kill: it and what follows are written again
            if line_step < step or (line_step == step and (keeps_evaluation or not is_evaluation)):
                kept.append(line)
        temporary = self.path.with_name(f".{FILE}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one line. raises: L4Error when the disk refuses"""
        line = (json.dumps(event, allow_nan=False) + "\n").encode()
        try:
            # One write of one line: a kill leaves the line whole or leaves nothing.
            with self.path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            raise L4Error(
                f"cannot write `{self.path}`",
                why=(error.strerror or str(error)).lower(),
                fix="make room or check the permissions; the same command then continues",
            ) from error

    def sync(self) -> None:
        """Make the lines durable before a checkpoint that counts on them."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far, on the device or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
