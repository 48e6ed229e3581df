"""Curves over context length as a picture: several series, with intervals, on a log2 axis.

in: series of (length, value); out: a PNG with axes, bands, a legend and a caption
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from l4cli.evals import canvas
from l4cli.evals.canvas import Canvas, Color, line_height, text_width, wrap
from l4cli.evals.cells import Cell, length_text
from l4cli.evals.heatmap import AXIS, CAPTION, TICK, TITLE

_MARGIN = 20.0
_PLOT_WIDTH, _PLOT_HEIGHT = 600.0, 320.0
_MAX_DOTS = 40  # longer series are lines only
_MAX_BANDS = 5
# Okabe and Ito's colours for all eyes, the darker ones first; yellow is too pale on white.
_COLORS: tuple[Color, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (31, 35, 40),
    (86, 180, 233),
    (230, 159, 0),
)


@dataclass(frozen=True)
class Curve:
    """One series. `bands`: an interval per point, or none at all."""

    name: str
    lengths: tuple[int, ...]
    values: tuple[float, ...]
    bands: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of_cells(cls, name: str, cells: Mapping[int, Cell]) -> Curve:
        """Accuracy by length with its 95% Wilson intervals."""
        lengths = tuple(sorted(cells))
        values = tuple(cells[n].accuracy for n in lengths)
        return cls(name, lengths, values, tuple(cells[n].interval for n in lengths))


@dataclass(frozen=True)
class Axes:
    """What the axes say. `is_share`: 0 to 1, written in percent."""

    y_title: str = "accuracy (%)"
    x_title: str = "context length (tokens)"
    is_share: bool = True
    train_length: int | None = None  # marked with a dashed line


def draw_curves(
    curves: Sequence[Curve], path: Path, *, title: str, caption: str, axes: Axes | None = None
) -> None:
    """Write the picture; `caption` should name models, settings, seeds and samples."""
    plot(curves, title=title, caption=caption, axes=axes).save(path)


def plot(curves: Sequence[Curve], *, title: str, caption: str, axes: Axes | None = None) -> Canvas:
    """The picture, not yet written."""
    assert any(curve.lengths for curve in curves), "nothing to draw"
    axes = axes or Axes()
    y_labels = [_y_label(y, axes) for y in _y_ticks(curves, axes)]
    left = _MARGIN + 18 + max(text_width(label, TICK) for label in y_labels) + 6
    width = left + _PLOT_WIDTH + _MARGIN + 6
    titles = wrap(title, TITLE, width - 2 * _MARGIN)
    captions = wrap(caption, CAPTION, width - 2 * _MARGIN)
    legend = _legend_rows([curve.name for curve in curves], width - 2 * _MARGIN)
    legend_top = _MARGIN + len(titles) * line_height(TITLE) + 6
    top = legend_top + len(legend) * line_height(AXIS) + (24 if axes.train_length else 10)
    caption_top = top + _PLOT_HEIGHT + line_height(TICK) + line_height(AXIS) + 20
    page = Canvas(width, caption_top + len(captions) * line_height(CAPTION) + _MARGIN)
    for i, line in enumerate(titles):
        page.text(_MARGIN, _MARGIN + (i + 0.5) * line_height(TITLE), line, TITLE)
    _draw_legend(page, legend, curves, legend_top)
    _Plot(page, curves, axes, left, top).draw()
    for i, line in enumerate(captions):
        y = caption_top + (i + 0.5) * line_height(CAPTION)
        page.text(_MARGIN, y, line, CAPTION, canvas.GREY)
    return page


def _look(i: int) -> tuple[Color, bool]:
    """Colour of the i-th series, and whether it is dashed: colours come round again dashed."""
    return _COLORS[i % len(_COLORS)], (i // len(_COLORS)) % 2 == 1


class _Plot:
    """The area between the axes."""

    def __init__(
        self, page: Canvas, curves: Sequence[Curve], axes: Axes, left: float, top: float
    ) -> None:
        self.page, self.curves, self.axes, self.left, self.top = page, curves, axes, left, top
        self.y_ticks = _y_ticks(curves, axes)
        lengths = [n for curve in curves for n in curve.lengths]
        if axes.train_length:
            lengths.append(axes.train_length)
        low, high = math.log2(min(lengths)), math.log2(max(lengths))
        pad = max(0.04 * (high - low), 0.15)
        self.x_range = (low - pad, high + pad)

    def x(self, length: float) -> float:
        low, high = self.x_range
        return self.left + _PLOT_WIDTH * (math.log2(length) - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.top + _PLOT_HEIGHT * (high - value) / (high - low)

    def draw(self) -> None:
        self._draw_axes()
        # Bands first: no line is veiled by another's band.
        for i, curve in enumerate(self.curves):
            if curve.bands and self._has_bands(curve):
                self._draw_band(curve, _look(i)[0])
        for i, curve in enumerate(self.curves):
            self._draw_curve(curve, *_look(i))

    def _has_bands(self, curve: Curve) -> bool:
        """Bands of many curves hide each other; those and single points have whiskers."""
        return len(self.curves) <= _MAX_BANDS and len(curve.lengths) > 1

    def _draw_axes(self) -> None:
        page, right, bottom = self.page, self.left + _PLOT_WIDTH, self.top + _PLOT_HEIGHT
        for value in self.y_ticks:
            y = self.y(value)
            page.line([(self.left, y), (right, y)], canvas.RULE, 0.6)
            page.text(self.left - 6, y, _y_label(value, self.axes), TICK, anchor="rm")
        for length in self._x_ticks():
            x = self.x(length)
            page.line([(x, bottom), (x, bottom + 4)], canvas.GREY, 0.8)
            y = bottom + 6 + line_height(TICK) / 2
            page.text(x, y, length_text(length), TICK, anchor="mm")
        page.line([(self.left, bottom), (right, bottom)], canvas.GREY, 1)
        y = bottom + 8 + line_height(TICK) + line_height(AXIS) / 2
        middle = (self.left + right) / 2
        page.text(middle, y, self.axes.x_title, AXIS, canvas.GREY, anchor="mm")
        page.upright(_MARGIN + 6, (self.top + bottom) / 2, self.axes.y_title, AXIS, canvas.GREY)
        if self.axes.train_length:
            self._draw_mark(self.axes.train_length, right, bottom)

    def _draw_mark(self, length: int, right: float, bottom: float) -> None:
        x, label = self.x(length), f"trained to {length_text(length)}"
        self.page.dashed((x, self.top - 2), (x, bottom), canvas.INK, 1)
        width = text_width(label, TICK)
        place = min(max(x - width / 2, self.left), right - width)
        self.page.text(place, self.top - 10, label, TICK)

    def _x_ticks(self) -> list[int]:
        """Powers of two as far as their labels have room, or the lengths if there are none."""
        low, high = self.x_range
        powers = [1 << k for k in range(max(0, math.ceil(low)), math.floor(high) + 1)]
        ticks = powers or sorted({n for curve in self.curves for n in curve.lengths})[:1]
        for step in range(1, len(ticks) + 1):
            chosen = ticks[::step]
            widths = [text_width(length_text(n), TICK) for n in chosen]
            places = [self.x(n) for n in chosen]
            if all(
                b - a > (v + w) / 2 + 6
                for a, b, v, w in zip(places, places[1:], widths, widths[1:], strict=False)
            ):
                break
        return chosen

    def _draw_band(self, curve: Curve, color: Color) -> None:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        places = [self.x(n) for n in curve.lengths]
        lower = [self.y(max(low, band[0])) for band in curve.bands]
        upper = [self.y(min(high, band[1])) for band in curve.bands]
        outline = list(zip(places, upper, strict=True))
        outline += reversed(list(zip(places, lower, strict=True)))
        self.page.veil(outline, color, 0.14)

    def _draw_curve(self, curve: Curve, color: Color, is_dashed: bool) -> None:
        points = [(self.x(n), self.y(v)) for n, v in zip(curve.lengths, curve.values, strict=True)]
        if not self._has_bands(curve):
            # Side by side where curves share their lengths.
            aside = 2 * (self.curves.index(curve) - (len(self.curves) - 1) / 2)
            for (point, _), (low, high) in zip(points, curve.bands, strict=False):
                x = point + aside
                self.page.line([(x, self.y(low)), (x, self.y(high))], color, 0.8)
        width = 1.8 if len(points) <= _MAX_DOTS else 1.2
        if is_dashed:
            for start, end in itertools.pairwise(points):
                self.page.dashed(start, end, color, width)
        elif len(points) > 1:
            self.page.line(points, color, width)
        if len(points) <= _MAX_DOTS:
            for x, y in points:
                self.page.dot(x, y, 3, color)


def _y_ticks(curves: Sequence[Curve], axes: Axes) -> list[float]:
    """Round values that hold every point and band."""
    if axes.is_share:
        return [i / 5 for i in range(6)]
    values = [v for curve in curves for v in curve.values]
    values += [v for curve in curves for band in curve.bands for v in band]
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    rough = spread / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _y_label(value: float, axes: Axes) -> str:
    return f"{100 * value:.0f}" if axes.is_share else f"{value:.6g}"


_SWATCH, _LEGEND_GAP = 29.0, 18.0


def _legend_rows(names: Sequence[str], width: float) -> list[list[tuple[float, int, str]]]:
    """Names set into lines: (x, number of the series, name), a name too long cut."""
    rows: list[list[tuple[float, int, str]]] = [[]]
    x = 0.0
    for i, name in enumerate(names):
        shown = wrap(name, AXIS, width - _SWATCH)
        label = shown[0] + ("..." if len(shown) > 1 else "") if shown else ""
        needed = _SWATCH + text_width(label, AXIS) + _LEGEND_GAP
        if rows[-1] and x + needed - _LEGEND_GAP > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, i, label))
        x += needed
    return rows


def _draw_legend(
    page: Canvas,
    rows: Sequence[Sequence[tuple[float, int, str]]],
    curves: Sequence[Curve],
    top: float,
) -> None:
    for down, row in enumerate(rows):
        y = top + (down + 0.5) * line_height(AXIS)
        for x, i, name in row:
            color, is_dashed = _look(i)
            ends = ((_MARGIN + x, y), (_MARGIN + x + 24, y))
            if is_dashed:
                page.dashed(*ends, color, 1.8)
            else:
                page.line(ends, color, 1.8)
            if len(curves[i].lengths) <= _MAX_DOTS:
                page.dot(_MARGIN + x + 12, y, 3, color)
            page.text(_MARGIN + x + _SWATCH, y, name, AXIS)
