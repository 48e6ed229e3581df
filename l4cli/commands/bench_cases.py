"""What `l4 bench` measures, in rounds in which all sides take turns, and how it is shown.

in: cases, sides, ceilings; out: medians by case and side, a table or JSON lines
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from l4cli import terminal

PREFILL, DECODE, TRAIN = "prefill", "decode", "train"
READ = "reading"  # the ceiling of memory; others are `bf16 products` and the like


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    what: str
    num_tokens: int  # read or written by each sequence; of a training step its length
    depth: int = 0  # tokens read before
    batch: int = 1

    @property
    def name(self) -> str:
        text = f"{self.what} {self.num_tokens}"
        if self.batch > 1:
            text += f" x {self.batch}"
        return f"{text} at {self.depth}" if self.depth else text


class Side(Protocol):
    """One program that is measured."""

    name: str

    def why_not(self, case: Case) -> str | None:
        """Why it cannot do this, in a few words; None when it can."""

    def run(self, case: Case) -> float:
        """Do it once; tokens per second of all sequences together."""


@dataclass
class Figures:
    """Everything measured: rates by case and side, ceilings, one value a round."""

    rates: dict[Case, dict[str, list[float]]] = field(default_factory=dict)
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # "side, case" -> why

    def median(self, case: Case, side: str) -> float | None:
        values = self.rates.get(case, {}).get(side)
        return statistics.median(values) if values else None

    def ceiling(self, name: str) -> float:
        return statistics.median(self.ceilings[name])


def measure(
    cases: Sequence[Case],
    sides: Sequence[Side],
    ceilings: dict[str, Callable[[], float]],
    repeats: int,
    figures: Figures,
) -> None:
    """Run rounds: every case by every side, the ceilings beside them; the first warms up."""
    total = (repeats + 1) * max(1, len(cases))
    with terminal.progress("bench", total) as bar:
        for round_ in range(repeats + 1):
            for name, probe in ceilings.items():
                rate = probe()
                if round_:
                    figures.ceilings.setdefault(name, []).append(rate)
            for i, case in enumerate(cases):
                for side in sides:
                    reason = side.why_not(case)
                    if reason is not None:
                        figures.left_out[f"{side.name}, {case.name}"] = reason
                        continue
                    rate = side.run(case)
                    if round_:
                        figures.rates.setdefault(case, {}).setdefault(side.name, []).append(rate)
                bar.update(round_ * len(cases) + i + 1, round=f"{round_}/{repeats}")


def show(figures: Figures, sides: Sequence[str], shares: dict[Case, tuple[str, float]]) -> None:
    """A table of medians: ours first, each peer with our ratio to it, our share of a ceiling.

    `shares`: which ceiling a case has, and what of it one token a second takes.
    """
    ours, *peers = sides
    columns = ["tokens/s", ours]
    for peer in peers:
        columns += [peer, "ratio"]
    rows = []
    for case in figures.rates:
        mine = figures.median(case, ours)
        row = [case.name, _rate(mine)]
        for peer in peers:
            theirs = figures.median(case, peer)
            row += [_rate(theirs), f"{mine / theirs:.2f}" if mine and theirs else ""]
        rows.append([*row, _share_text(figures, case, mine, shares)])
    terminal.table("", [*columns, "of the ceiling"], rows)


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _share_text(
    figures: Figures, case: Case, rate: float | None, shares: dict[Case, tuple[str, float]]
) -> str:
    if rate is None or case not in shares:
        return ""
    name, per_token = shares[case]
    return f"{rate * per_token / figures.ceiling(name):.0%} of {name}"


def events(figures: Figures, shares: dict[Case, tuple[str, float]]) -> list[dict[str, Any]]:
    """The same as JSON objects, every round's value included."""
    found: list[dict[str, Any]] = []
    for case, by_side in figures.rates.items():
        for side, values in by_side.items():
            event: dict[str, Any] = {"event": "case", "what": case.what, "side": side}
            event |= {"num_tokens": case.num_tokens, "depth": case.depth, "batch": case.batch}
            event |= {"tok_per_sec": statistics.median(values), "rounds": values}
            if case in shares:
                name, per_token = shares[case]
                share = statistics.median(values) * per_token / figures.ceiling(name)
                event |= {"ceiling": name, "share": share}
            found.append(event)
    for name, reason in figures.left_out.items():
        found.append({"event": "left_out", "name": name, "why": reason})
    return found
