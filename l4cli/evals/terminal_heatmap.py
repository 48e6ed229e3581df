"""The grid of a needle test in a terminal: percent right by length and depth.

in: one grid per task; out: a table on stdout, coloured on a terminal; stderr under `--json`
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from l4cli import terminal
from l4cli.evals.canvas import ink_on, scale_color
from l4cli.evals.cells import Cell, TaskGrid, length_text

if TYPE_CHECKING:
    from rich.text import Text

NOT_MEASURED = "."
_Rows = list[tuple[str, list[Cell | None]]]


def show_heatmap(grids: Sequence[TaskGrid]) -> None:
    """Print every grid; wide ones are folded to the terminal, never in a file or a pipe."""
    if terminal.wants_json() and terminal.is_quiet():
        return
    stream = sys.stderr if terminal.wants_json() else sys.stdout
    if not stream.isatty():
        words = "\n".join(text.plain.rstrip() for text in heatmap_lines(grids, None))
        (terminal.say if terminal.wants_json() else terminal.result)(words)
        return
    from rich.console import Console

    screen = Console(file=stream, highlight=False)
    for line in heatmap_lines(grids, shutil.get_terminal_size().columns):
        screen.print(line, soft_wrap=True)


def heatmap_lines(grids: Sequence[TaskGrid], width: int | None) -> Iterator[Text]:
    """The lines of all tables, a blank one between them; `width` in characters, None: any."""
    from rich.text import Text

    is_first = True
    for title, corner, lengths, rows in _tables(grids):
        if not is_first:
            yield Text("")
        is_first = False
        yield Text(title, style="bold")
        label_width = max(len(label) for label in (corner, *(label for label, _ in rows)))
        labels = [length_text(n) for n in lengths]
        cell_width = max(5, *(len(label) + 2 for label in labels))
        step = len(labels)
        if width is not None:
            step = max(1, (width - label_width - 1) // cell_width)
        for start in range(0, len(labels), step):
            yield from _block(
                corner, labels[start : start + step], rows, start, label_width, cell_width
            )


def _tables(
    grids: Sequence[TaskGrid],
) -> Iterator[tuple[str, str, tuple[int, ...], _Rows]]:
    """Title, the corner's word, lengths and labelled rows; tasks without depth share a table."""
    for grid in grids:
        if grid.depths:
            rows: _Rows = [
                (f"{depth:g}", [grid.cells.get((n, depth)) for n in grid.lengths])
                for depth in grid.depths
            ]
            if len(rows) > 1:
                rows.append(("all", [grid.at_length(n) for n in grid.lengths]))
            yield f"{grid.task}: % right by context length", "depth %", grid.lengths, rows
    flat = [grid for grid in grids if not grid.depths]
    if flat:
        lengths = tuple(sorted({n for grid in flat for n in grid.lengths}))
        rows = [(grid.task, [grid.at_length(n) for n in lengths]) for grid in flat]
        yield "tasks without a depth: % right by context length", "task", lengths, rows


def _block(
    corner: str, labels: Sequence[str], rows: _Rows, start: int, label_width: int, cell_width: int
) -> Iterator[Text]:
    from rich.text import Text

    head = f"{corner:>{label_width}} "
    yield Text(head + "".join(f"{label} ".rjust(cell_width) for label in labels))
    for name, cells in rows:
        line = Text(f"{name:>{label_width}} ")
        for cell in cells[start : start + len(labels)]:
            words = f"{NOT_MEASURED if cell is None else cell.percent} ".rjust(cell_width)
            line.append(words, style=_style(cell))
        yield line


def _style(cell: Cell | None) -> str:
    if cell is None:
        return "dim"
    color = scale_color(cell.accuracy)
    ink, ground = ("#{:02x}{:02x}{:02x}".format(*c) for c in (ink_on(color), color))
    return f"{ink} on {ground}"
