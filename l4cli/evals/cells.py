"""A grid of results as pictures and tables want it: cells by context length and depth.

in: rows as in `results.jsonl`; out: one grid per task, in the order tasks appear
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from l4cli.evals.intervals import wilson


@dataclass(frozen=True)
class Cell:
    """What was measured at one length and depth; scores between 0 and 1 may be summed."""

    num_correct: float
    num_samples: int

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def percent(self) -> str:
        """Whole percent; 100 and 0 only where all and none were right."""
        if self.num_correct in (0, self.num_samples):
            return f"{100 * self.accuracy:.0f}"
        return f"{min(99, max(1, round(100 * self.accuracy)))}"

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval."""
        return wilson(self.num_correct, self.num_samples)


Place = tuple[int, float | None]  # context length in tokens, depth in percent


@dataclass(frozen=True)
class TaskGrid:
    """One task's cells; what is missing was not measured. Without depths it is one row."""

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: Mapping[Place, Cell]

    def at_length(self, length: int) -> Cell | None:
        """All cells of one length together."""
        found = [cell for (n, _), cell in self.cells.items() if n == length]
        if not found:
            return None
        return Cell(sum(c.num_correct for c in found), sum(c.num_samples for c in found))

    def rows(self) -> tuple[float | None, ...]:
        """The depths, or one row where the task has none."""
        return self.depths or (None,)


def grids_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[TaskGrid]:
    """Collect rows with `task`, `length`, `depth` (null: none), `num_correct`, `num_samples`.

    Rows of one place, such as several seeds, are added up.
    """
    by_task: dict[str, dict[Place, Cell]] = {}
    for row in rows:
        if not row["num_samples"]:
            continue
        depth = None if row.get("depth") is None else float(row["depth"])
        place = (int(row["length"]), depth)
        cells = by_task.setdefault(str(row["task"]), {})
        old = cells.get(place, Cell(0, 0))
        cells[place] = Cell(
            old.num_correct + row["num_correct"], old.num_samples + int(row["num_samples"])
        )
    return [grid_of(task, cells) for task, cells in by_task.items()]


def grid_of(task: str, cells: Mapping[Place, Cell]) -> TaskGrid:
    """A grid whose axes are the places that have a cell."""
    lengths = tuple(sorted({length for length, _ in cells}))
    depths = tuple(sorted({depth for _, depth in cells if depth is not None}))
    return TaskGrid(task, lengths, depths, dict(cells))


def length_text(length: int) -> str:
    """A length as options write it, k = 1024: `512`, `64k`, `1m`; others in full."""
    for unit, size in (("m", 1 << 20), ("k", 1 << 10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)
