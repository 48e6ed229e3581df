"""Accuracy by context length and depth as a picture for a report or a paper.

in: one grid per task; out: a PNG: a panel per task, a colour bar, a caption

Tasks without depth share one panel, a row each. Below every grid a row shows all depths together.
Each cell says its accuracy in percent and the 95% interval, as far as it has room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from l4cli.evals import canvas
from l4cli.evals.canvas import Canvas, line_height, text_width, wrap
from l4cli.evals.cells import Cell, TaskGrid, length_text

TITLE, NAME, AXIS, TICK, CAPTION = 15.0, 11.0, 9.5, 8.5, 8.5  # sizes of words
_MARGIN = 20.0
_GAP = 26.0  # between panels
_PAGE_WIDTH = 1100.0  # panels are set side by side up to this
_MIN_PAGE = 420.0
_LARGEST_NUMBER, _SMALLEST_NUMBER = 11.0, 5.5
_SMALL_SHARE = 0.68  # the interval's size against the number's
_STRIP_GAP = 5.0  # above the row of all depths
_MARK_BAND = 15.0  # where `trained to` stands

X_TITLE = "context length (tokens)"
Y_TITLE = "depth of the evidence (% of the context)"
ALL_DEPTHS = "all"


T = TypeVar("T")


@dataclass(frozen=True)
class Style:
    """What a reader may want otherwise."""

    detail: str = "interval"  # below each number: `interval`, `samples` or nothing
    train_length: int | None = None  # marked with a dashed line
    x_title: str = X_TITLE  # what the lengths count


@dataclass(frozen=True)
class _Row:
    label: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class _Panel:
    """One grid as it is drawn: rows of cells, and rows set apart below."""

    name: str
    lengths: tuple[int, ...]
    rows: tuple[_Row, ...]
    strip: tuple[_Row, ...]
    has_depth: bool
    cell_width: float = 0
    cell_height: float = 0
    label_width: float = 0  # room left of the grid

    @property
    def grid_width(self) -> float:
        return self.cell_width * len(self.lengths)

    @property
    def rows_height(self) -> float:
        return self.cell_height * len(self.rows)

    @property
    def grid_height(self) -> float:
        strip = (_STRIP_GAP + self.strip_height) if self.strip else 0
        return self.rows_height + strip

    @property
    def largest_cell(self) -> tuple[float, float]:
        return self.cell_width, max(self.cell_height, self.strip_height)

    @property
    def strip_height(self) -> float:
        # Room for a number, however low the cells are.
        return max(self.cell_height, 12.0) if self.strip else 0


def draw_heatmap(
    grids: Sequence[TaskGrid], path: Path, *, title: str, caption: str, style: Style | None = None
) -> None:
    """Write the picture; `caption` should name model, settings, seeds and samples."""
    heatmap(grids, title=title, caption=caption, style=style).save(path)


def heatmap(
    grids: Sequence[TaskGrid], *, title: str, caption: str, style: Style | None = None
) -> Canvas:
    """The picture, not yet written."""
    assert any(grid.cells for grid in grids), "nothing to draw"
    panels = [_sized(panel) for panel in _panels(grids)]
    return _Page(panels, title, caption, style or Style()).draw()


def _panels(grids: Sequence[TaskGrid]) -> list[_Panel]:
    panels = []
    for grid in grids:
        if grid.depths:
            rows = tuple(
                _Row(f"{depth:g}", tuple(grid.cells.get((n, depth)) for n in grid.lengths))
                for depth in grid.depths
            )
            everything = _Row(ALL_DEPTHS, tuple(grid.at_length(n) for n in grid.lengths))
            strip = (everything,) if len(rows) > 1 else ()
            panels.append(_Panel(grid.task, grid.lengths, rows, strip, has_depth=True))
    flat = [grid for grid in grids if not grid.depths]
    if flat:
        lengths = tuple(sorted({n for grid in flat for n in grid.lengths}))
        rows = tuple(_Row(g.task, tuple(g.at_length(n) for n in lengths)) for g in flat)
        name = "tasks without a depth" if panels or len(flat) > 1 else ""
        panels.append(_Panel(name, lengths, rows, (), has_depth=False))
    return panels


def _sized(panel: _Panel) -> _Panel:
    """Choose the size of the cells: large for a few, small for many."""
    width = min(46.0, max(13.0, 620 / len(panel.lengths)))
    height = min(29.0, max(10.0, 400 / len(panel.rows)))
    rows = panel.rows + panel.strip
    labels = max(text_width(row.label, TICK) for row in rows) + 6
    return replace(panel, cell_width=width, cell_height=height, label_width=labels)


class _Page:
    """Where everything goes; measured first, then drawn."""

    def __init__(self, panels: list[_Panel], title: str, caption: str, style: Style) -> None:
        self.panels, self.style = panels, style
        self.y_title = 16.0 if any(panel.has_depth for panel in panels) else 0.0
        self.slot_width = max(panel.label_width + panel.grid_width for panel in panels)
        self.slot_width = max(self.slot_width, 120.0) + self.y_title
        # Many panels make a page of about four by three.
        slot_height = max(panel.grid_height for panel in panels) + 60
        area = len(panels) * (self.slot_width + _GAP) * slot_height
        across = int((max(_PAGE_WIDTH, math.sqrt(4 / 3 * area)) + _GAP) // (self.slot_width + _GAP))
        self.num_down = math.ceil(len(panels) / max(1, across))
        self.num_across = math.ceil(len(panels) / self.num_down)
        body = self.num_across * (self.slot_width + _GAP) - _GAP
        self.width = max(body, _MIN_PAGE) + 2 * _MARGIN
        inner = self.width - 2 * _MARGIN
        self.title, self.caption = wrap(title, TITLE, inner), wrap(caption, CAPTION, inner)
        self.names = [wrap(panel.name, NAME, self.slot_width) for panel in panels]
        lines = [
            max(len(name) for name in self._line(self.names, down)) for down in range(self.num_down)
        ]
        self.mark = _MARK_BAND if style.train_length is not None else 2.0
        self.heads = [count * line_height(NAME) + self.mark for count in lines]
        # Tick labels and the title of the x axis.
        self.foot = line_height(TICK) + line_height(AXIS) + 6
        self.grid_heights = [
            max(panel.grid_height for panel in self._line(panels, down))
            for down in range(self.num_down)
        ]
        self.top = _MARGIN + len(self.title) * line_height(TITLE) + 10
        body_height = sum(self.heads) + sum(self.grid_heights) + self.num_down * (self.foot + 12)
        self.bar_top = self.top + body_height + 8
        self.caption_top = self.bar_top + 42
        end = self.caption_top + len(self.caption) * line_height(CAPTION)
        self.height = end + _MARGIN

    def _line(self, items: list[T], down: int) -> list[T]:
        return items[down * self.num_across : (down + 1) * self.num_across]

    def draw(self) -> Canvas:
        page = Canvas(self.width, self.height)
        for i, line in enumerate(self.title):
            page.text(_MARGIN, _MARGIN + (i + 0.5) * line_height(TITLE), line, TITLE)
        y = self.top
        for down in range(self.num_down):
            for across, panel in enumerate(self._line(self.panels, down)):
                x = _MARGIN + across * (self.slot_width + _GAP)
                names = self._line(self.names, down)[across]
                for i, line in enumerate(names):
                    page.text(x, y + (i + 0.5) * line_height(NAME), line, NAME)
                left = x + self.y_title + panel.label_width
                self._draw_panel(page, panel, left, y + self.heads[down])
            y += self.heads[down] + self.grid_heights[down] + self.foot + 12
        self._draw_bar(page)
        for i, line in enumerate(self.caption):
            place = self.caption_top + (i + 0.5) * line_height(CAPTION)
            page.text(_MARGIN, place, line, CAPTION, canvas.GREY)
        return page

    def _draw_panel(self, page: Canvas, panel: _Panel, left: float, top: float) -> None:
        detail = self.style.detail
        for i, row in enumerate(panel.rows):
            y = top + i * panel.cell_height
            _draw_row(page, panel, row, left, y, panel.cell_height, detail)
        if panel.strip:
            y = top + panel.rows_height + _STRIP_GAP
            for row in panel.strip:
                _draw_row(page, panel, row, left, y, panel.strip_height, detail)
                page.text(left - 5, y + panel.strip_height / 2, row.label, TICK, anchor="rm")
        step = math.ceil(line_height(TICK) * 0.95 / panel.cell_height)
        for i in _ticks(len(panel.rows), step):
            y = top + (i + 0.5) * panel.cell_height
            page.text(left - 5, y, panel.rows[i].label, TICK, anchor="rm")
        if panel.has_depth:
            _draw_y_title(page, left - panel.label_width - 8, top, panel)
        self._draw_x_axis(page, panel, left, top)

    def _draw_x_axis(self, page: Canvas, panel: _Panel, left: float, top: float) -> None:
        labels = [length_text(n) for n in panel.lengths]
        widest = max(text_width(label, TICK) for label in labels) + 5
        y = top + panel.grid_height + 4 + line_height(TICK) / 2
        for i in _ticks(len(labels), math.ceil(widest / panel.cell_width)):
            page.text(left + (i + 0.5) * panel.cell_width, y, labels[i], TICK, anchor="mm")
        y += (line_height(TICK) + line_height(AXIS)) / 2 + 1
        half = text_width(self.style.x_title, AXIS) / 2
        # Centred, unless the grid is narrower than the words.
        centre = max(left + panel.grid_width / 2, left - panel.label_width + half)
        page.text(centre, y, self.style.x_title, AXIS, canvas.GREY, anchor="mm")
        if self.style.train_length is not None:
            self._draw_mark(page, panel, left, top, self.style.train_length)

    def _draw_mark(self, page: Canvas, panel: _Panel, left: float, top: float, length: int) -> None:
        """A line right of the last length that was trained on."""
        x = left + panel.cell_width * sum(n <= length for n in panel.lengths)
        page.dashed((x, top - 2), (x, top + panel.grid_height), canvas.INK, 1.2)
        label = f"trained to {length_text(length)}"
        width = text_width(label, TICK)
        start = left - panel.label_width
        end = max(left + panel.grid_width, start + width)
        place = min(max(x - width / 2, start), end - width)
        page.text(place, top - _MARK_BAND / 2 - 1, label, TICK, canvas.INK, anchor="lm")

    def _draw_bar(self, page: Canvas) -> None:
        """The colour bar with its ticks, and what hatching means."""
        width, height, y = 200.0, 9.0, self.bar_top + line_height(TICK)
        label = "accuracy (%)"
        if any(_sizes(*panel.largest_cell, self.style.detail)[1] for panel in self.panels):
            label += {"interval": ", 95% interval below", "samples": ", samples below"}[
                self.style.detail
            ]
        page.text(_MARGIN, self.bar_top + line_height(TICK) / 2 - 2, label, TICK, canvas.GREY)
        for i in range(200):
            color = canvas.scale_color((i + 0.5) / 200)
            page.rectangle(_MARGIN + i * width / 200, y, width / 200, height, color)
        for percent in (0, 25, 50, 75, 100):
            x = _MARGIN + width * percent / 100
            page.line([(x, y + height), (x, y + height + 3)], canvas.GREY, 0.7)
            page.text(x, y + height + 9, str(percent), TICK, canvas.GREY, anchor="mm")
        rows = [row for panel in self.panels for row in panel.rows]
        if not any(cell is None for row in rows for cell in row.cells):
            return
        x = _MARGIN + width + 26
        page.hatched(x, y, 14, height)
        page.text(x + 20, y + height / 2, "not measured", TICK, canvas.GREY)


def _draw_y_title(page: Canvas, x: float, top: float, panel: _Panel) -> None:
    for words in (Y_TITLE, "depth (% of context)", "depth (%)", "depth"):
        if text_width(words, AXIS) <= panel.grid_height:
            break
    page.upright(x, top + panel.grid_height / 2, words, AXIS, canvas.GREY)


def _ticks(count: int, step: int) -> range:
    """Which of `count` labels are written: every `step`-th."""
    return range(0, count, max(1, step))


def _draw_row(
    page: Canvas, panel: _Panel, row: _Row, left: float, y: float, height: float, detail: str
) -> None:
    # A hair of white between cells that are large enough for it.
    gap = 1.0 if min(panel.cell_width, height) >= 12 else 0.5
    sizes = _sizes(panel.cell_width, height, detail)
    for i, cell in enumerate(row.cells):
        x = left + i * panel.cell_width
        box = (x, y, panel.cell_width - gap, height - gap)
        if cell is None:
            page.hatched(*box)
            continue
        color = canvas.scale_color(cell.accuracy)
        page.rectangle(*box, color)
        _write_in_cell(page, box, cell, canvas.ink_on(color), sizes, detail)


def _sizes(width: float, height: float, detail: str) -> tuple[float, float]:
    """Sizes of the number and of the detail below it; 0 where a cell has no room for it.

    They are those of the widest text, so that all cells of a grid look alike.
    """
    size = min(_LARGEST_NUMBER, (width - 4) / text_width("100", 1), (height - 2) / 1.05)
    if size < _SMALLEST_NUMBER:
        return 0, 0
    small = min(size * _SMALL_SHARE, (width - 4) / text_width("100-100", 1))
    has_room = small >= _SMALLEST_NUMBER and 0.95 * size + 1.15 * small <= height - 3
    return size, small if has_room and detail else 0


def _write_in_cell(
    page: Canvas,
    box: canvas.Box,
    cell: Cell,
    ink: canvas.Color,
    sizes: tuple[float, float],
    detail: str,
) -> None:
    x, y, width, height = box
    size, small = sizes
    centre = x + width / 2
    if size and not small:
        page.text(centre, y + height / 2, cell.percent, size, ink, anchor="mm")
    elif size:
        top = y + (height - 0.95 * size - 1.15 * small) / 2
        page.text(centre, top + 0.475 * size, cell.percent, size, ink, anchor="mm")
        below = top + 0.95 * size + 0.6 * small
        page.text(centre, below, _detail_text(cell, detail), small, ink, anchor="mm")


def _detail_text(cell: Cell, detail: str) -> str:
    if detail == "samples":
        return f"n {cell.num_samples}"
    if detail == "interval":
        low, high = cell.interval
        # Outwards, so that rounding never claims more than was measured.
        return f"{math.floor(100 * low)}-{math.ceil(100 * high)}"
    return ""
