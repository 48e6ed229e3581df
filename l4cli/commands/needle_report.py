"""What a needle test tells: an event per cell, `summary.json`, pictures, the verdict.

in: records and a summary; out: lines on stdout, files in the results' folder, exit code 1
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l4cli import terminal
from l4cli.checkpoint.atomic import write_text
from l4cli.errors import L4Error
from l4cli.evals.cells import TaskGrid, grids_from_rows, length_text
from l4cli.evals.heatmap import draw_heatmap
from l4cli.evals.needle.cells import Cell
from l4cli.evals.needle.grid import Role
from l4cli.evals.terminal_heatmap import show_heatmap

SUMMARY = "summary.json"
HEATMAP = "heatmap.png"


def emit_cells(cells: Sequence[Cell]) -> None:
    """Tell finished cells, under `--json` one by one, else in one line for all depths."""
    if not cells:
        return
    for cell in cells:
        terminal.emit({"event": "cell", **cell.as_event()})
    correct = sum(cell.num_correct for cell in cells)
    total = sum(cell.num_samples for cell in cells)
    score = sum(cell.score * cell.num_samples for cell in cells) / total
    first = cells[0]
    terminal.say(f"{first.task} {length_text(first.length)}: {score:.3f} ({correct} of {total})")


def task_grids(summary: Mapping[str, Any]) -> list[TaskGrid]:
    """The tested cells by task, then those among distractors; partial scores summed."""
    distractors = summary["controls"].get(Role.distractors.value, {})
    cells = [*summary["cells"], *distractors.get("cells", [])]
    rows = [{**cell, "num_correct": cell["score"] * cell["num_samples"]} for cell in cells]
    return grids_from_rows(rows)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all."""
    write_text(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def draw(folder: Path, summary: Mapping[str, Any], name: str) -> None:
    """Draw the heat map of all tested tasks; what it was made with stands below it."""
    grids = task_grids(summary)
    if not grids:
        return
    settings = summary["settings"]
    haystack = ", ".join(settings["haystack"] or ["generated filler"])
    where = settings.get("endpoint") or f"weights {settings['weights']}, {settings['dtype']}"
    place = "one needle a text" if settings["separate"] else "all depths in one text"
    place += ", chat format" if settings["chat"] else ""
    place += f"; with {', '.join(settings['set'])}" if settings["set"] else ""
    if "endpoint" in summary:
        place += f"; tokens counted with {summary['endpoint']['tokens_counted_with']}"
    caption = (
        f"Model: {summary['model']} ({where}). "
        f"Haystack: {haystack}. {settings['samples']} texts at each length, seed "
        f"{settings['seed']}, {place}. Intervals: 95% Wilson."
    )
    draw_heatmap(grids, folder / HEATMAP, title=f"Needle test of {name}", caption=caption)


def show(summary: Mapping[str, Any]) -> None:
    """The grid, then means by length with their intervals, controls, effective lengths."""
    grids = task_grids(summary)
    if grids:
        show_heatmap(grids)
        terminal.result("")
    lengths = list(summary["means_by_length"])
    rows: list[list[str]] = []
    for task, by_length in summary["by_task_and_length"].items():
        rows.append([task, *(_with_interval(by_length.get(length)) for length in lengths)])
    for role, control in summary["controls"].items():
        rows.append([_CONTROLS[role], *_control_cells(control, lengths)])
    if rows:
        columns = ["task", *(length_text(int(length)) for length in lengths)]
        terminal.table("", columns, rows)
    for line in _facts(summary):
        terminal.result(line)


_CONTROLS = {
    Role.no_needle.value: "(no needle)",
    Role.closed_book.value: "(no text)",
    Role.distractors.value: "(among needles)",
}


def _with_interval(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    return f"{figures['score']:.3f} [{figures['low']:.2f}, {figures['high']:.2f}]"


def _control_cells(control: Mapping[str, Any], lengths: Sequence[str]) -> list[str]:
    if "by_length" not in control:
        return [_with_interval(control)] + [""] * (len(lengths) - 1)
    return [_with_interval(control["by_length"].get(length)) for length in lengths]


def _facts(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    found = summary["effective_length"]
    if found:
        ruler, nolima = (_length_or_none(found[name]) for name in ("ruler", "nolima"))
        lines.append(
            f"effective length: {ruler} (RULER: mean at least {found['ruler_threshold']:g}), "
            f"{nolima} (NoLiMa: at least 0.85 of the base score {found['nolima_base_score']:.3f})"
        )
    for length, recall in summary.get("sparse_recall", {}).items():
        lines.append(
            f"sparse reading at {length_text(int(length))} holds {recall['mean']:.4f} of exact "
            f"attention, in no text's layer less than {recall['least']:.4f}"
        )
    apart = summary["straddled"]
    if apart["num_straddled"]:
        lines.append(
            f"needles across a border of chunks: {apart['num_straddled_correct']} of "
            f"{apart['num_straddled']} right; whole ones: {apart['num_whole_correct']} of "
            f"{apart['num_whole']}"
        )
    return lines


def _length_or_none(length: int | None) -> str:
    return "none" if length is None else length_text(length)


def require(means: Mapping[str, float], least: float | None) -> None:
    """Fail where a task's mean is too low. raises: L4Error"""
    if least is None:
        return
    low = {task: mean for task, mean in means.items() if mean < least}
    if low:
        listed = ", ".join(f"`{task}` {mean:.3f}" for task, mean in low.items())
        raise L4Error(
            f"the mean is below `--require {least:g}`",
            why=listed,
            fix="train longer contexts with `l4 extend-context`, or ask for shorter lengths",
        )
