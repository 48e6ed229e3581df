"""Records gathered into cells of (task, length, depth), with intervals.

in: records of the store; out: `Cell`s in the order of the grid, means
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from l4cli.evals.intervals import wilson


@dataclass(frozen=True)
class Outcome:
    """One answered question."""

    role: str
    task: str
    length: int
    sample: int
    depth: float | None
    score: float  # 0 to 1
    is_straddled: bool | None  # None: nobody knows

    @property
    def is_correct(self) -> bool:
        return self.score == 1.0


def outcomes_of(records: Iterable[dict[str, Any]]) -> list[Outcome]:
    """Every answered question of the records."""
    return [
        Outcome(
            record["role"],
            record["task"],
            record["length"],
            record["sample"],
            answer["depth"],
            answer["score"],
            answer["straddled"],
        )
        for record in records
        for answer in record["answers"]
    ]


@dataclass
class Cell:
    """The answers at one place of the grid."""

    task: str
    length: int
    depth: float | None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return len(self.outcomes)

    @property
    def num_correct(self) -> int:
        """Answers that are right in full."""
        return sum(outcome.is_correct for outcome in self.outcomes)

    @property
    def score(self) -> float:
        return mean_score(self.outcomes)

    def as_event(self) -> dict[str, Any]:
        """What is told of the cell under `--json`, and kept in the summary."""
        straddled = [outcome for outcome in self.outcomes if outcome.is_straddled]
        return {
            "task": self.task,
            "length": self.length,
            "depth": self.depth,
            "num_correct": self.num_correct,
            "num_samples": self.num_samples,
            **score_figures(self.outcomes),
            "num_straddled": len(straddled),
            "num_straddled_correct": sum(outcome.is_correct for outcome in straddled),
        }


def collect_cells(outcomes: Iterable[Outcome]) -> list[Cell]:
    """Gather outcomes by place, in the order in which places first appear."""
    cells: dict[tuple[str, int, float | None], Cell] = {}
    for outcome in outcomes:
        place = (outcome.task, outcome.length, outcome.depth)
        cells.setdefault(place, Cell(*place)).outcomes.append(outcome)
    return list(cells.values())


def mean_score(outcomes: Sequence[Outcome]) -> float:
    """The mean of the scores."""
    return sum(outcome.score for outcome in outcomes) / len(outcomes)


def score_figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The mean score and its 95% interval.

    Scores between 0 and 1 vary less than right and wrong of the same mean, so the interval of
    right and wrong is on the safe side for them.
    """
    low, high = wilson(sum(o.score for o in outcomes), len(outcomes))
    return {
        "score": round(mean_score(outcomes), 6),
        "low": round(low, 6),
        "high": round(high, 6),
    }
