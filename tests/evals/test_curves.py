"""Curves over length: points where they belong, words that do not collide."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l4cli.evals.cells import Cell
from l4cli.evals.curves import Axes, Curve, draw_curves, plot

LENGTHS = tuple(512 << i for i in range(12))
CAPTION = "Three seeds, 20 needles a length; bands are 95% Wilson intervals. " * 3


def curve(name: str, fall: float) -> Curve:
    return Curve.of_cells(name, {n: Cell(max(0, 20 - fall * i), 20) for i, n in enumerate(LENGTHS)})


def positions(slope: float) -> Curve:
    lengths = tuple(256 * (i + 1) for i in range(200))
    return Curve(f"slope {slope}", lengths, tuple(2 - slope * math.log2(n) for n in lengths))


BITS = Axes(y_title="bits per byte", x_title="position (tokens)", is_share=False, train_length=2048)
PLOTS = {
    "one point": ([Curve.of_cells("one", {700: Cell(3, 9)})], Axes()),
    "five": ([curve(f"series {i}", i / 2) for i in range(5)], Axes(train_length=512)),
    "twenty": ([curve(f"a series with number {i}", i / 10) for i in range(20)], Axes()),
    "long name": ([curve("name " * 80, 1), curve("short", 2)], Axes(train_length=1 << 23)),
    "bits": ([positions(0.0625), positions(0.0)], BITS),
    "flat": ([Curve("flat", (512, 1024), (1.5, 1.5))], BITS),
}


@pytest.mark.parametrize("name", PLOTS)
def test_words_neither_collide_nor_leave_the_page(name: str) -> None:
    curves, axes = PLOTS[name]
    page = plot(curves, title="From 512 tokens to a million " * 4, caption=CAPTION, axes=axes)
    width, height = page.size
    for i, (text, (left, top, right, bottom)) in enumerate(page.words):
        assert 0 <= left < right <= width, text
        assert 0 <= top < bottom <= height, text
        for other, (a, b, c, d) in page.words[:i]:
            apart = left >= c - 0.3 or a >= right - 0.3 or top >= d - 0.3 or b >= bottom - 0.3
            assert apart, (text, other)


def test_points_stand_on_a_log2_axis_at_their_height(tmp_path: Path) -> None:
    """Three dots: equal ratios of length are equal steps; heights are in proportion."""
    path = tmp_path / "curve.png"
    blue = Curve("", (1024, 4096, 16384), (1.0, 0.5, 0.0))
    draw_curves([blue], path, title="T", caption="C", axes=Axes())
    page = plot([blue], title="T", caption="C", axes=Axes())
    words = {text: box for text, box in page.words}
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    is_blue = (pixels == (0, 114, 178)).all(axis=-1)
    for length, value in zip(("1k", "4k", "16k"), ("100", "50", "0"), strict=True):
        x = round(words[length][0] + words[length][2])  # two pixels a unit: twice the middle
        if value == "50":
            y = round((words["40"][1] + words["40"][3] + words["60"][1] + words["60"][3]) / 2)
        else:
            y = round(words[value][1] + words[value][3])
        around = is_blue[y - 9 : y + 10, x - 9 : x + 10]
        centre = np.argwhere(around).mean(axis=0)
        assert around.sum() > 60, (length, value)  # a dot of radius 6 pixels, not a line
        assert centre == pytest.approx([9, 9], abs=2.5)
    assert words["4k"][0] - words["1k"][0] == pytest.approx(
        words["16k"][0] - words["4k"][0], abs=3.5
    )


def test_bands_are_the_intervals_of_the_cells() -> None:
    made = Curve.of_cells("x", {1024: Cell(8, 10), 512: Cell(10, 10)})
    assert made.lengths == (512, 1024)
    assert made.values == (1.0, 0.8)
    assert made.bands[1] == pytest.approx((0.490162, 0.943318), abs=1e-6)


def test_axes_hold_every_point_with_round_numbers() -> None:
    page = plot([positions(0.0625), positions(0.0)], title="T", caption="", axes=BITS)
    words = [text for text, _ in page.words]
    assert {"1", "1.2", "1.4", "1.6", "1.8", "2"} <= set(words)
    assert {"256", "2k", "32k", "bits per byte", "trained to 2k"} <= set(words)


def test_the_same_curves_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_curves(PLOTS["five"][0], tmp_path / name, title="T", caption=CAPTION)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
