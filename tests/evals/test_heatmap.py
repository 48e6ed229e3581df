"""The picture of a grid: right colours in the right places, and words that never collide."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l4cli.errors import L4Error
from l4cli.evals.canvas import ink_on, luminance, scale_color, text_width, wrap
from l4cli.evals.cells import Cell, TaskGrid
from l4cli.evals.heatmap import Style, draw_heatmap, heatmap

CAPTION = (
    "Model `runs/nano-8k/latest`, 2,345,600 parameters, bf16; 20 samples a cell, seeds 1 to 5; "
    "haystack: generated filler; exact match, greedy. Without a needle 1%, without context 0%."
)


def grid(task: str, num_lengths: int, num_depths: int, samples: int = 20) -> TaskGrid:
    """Cells of every accuracy, with holes."""
    lengths = tuple(512 * 2**i if num_lengths < 12 else 1000 + 441 * i for i in range(num_lengths))
    depths = tuple(round(100 * i / max(1, num_depths - 1)) * 1.0 for i in range(num_depths))
    cells = {}
    for i, (length, depth) in enumerate(itertools.product(lengths, depths or (None,))):
        if i % 7 != 3:
            cells[length, depth] = Cell(i % (samples + 1), samples)
    return TaskGrid(task, lengths, depths, cells)


GRIDS = {
    "one cell": [grid("single", 1, 1)],
    "one row": [grid("cwe", 8, 0)],
    "one column": [grid("single", 1, 11)],
    "usual": [grid("single", 8, 11)],
    "35 by 35": [grid("single", 35, 35)],
    "three tasks": [
        grid("single", 8, 6),
        grid("multikey_3: the whole haystack is made of needles", 5, 11),
        grid("frequent words", 8, 0),
        grid("common words", 4, 0),
    ],
    "narrow with long names": [grid("a_task_whose_name_is_longer_than_its_grid", 1, 2)] * 3,
    "twenty tasks": [grid(f"task_{i}", 8, 0 if i % 4 == 3 else 6) for i in range(20)],
}
STYLES = [Style(train_length=1024), Style(detail="samples", train_length=64), Style(detail="")]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("style", STYLES, ids=["interval", "samples", "plain"])
def test_words_neither_collide_nor_leave_the_page(name: str, style: Style) -> None:
    page = heatmap(GRIDS[name], title="Needle test " * 8, caption=CAPTION, style=style)
    width, height = page.size
    boxes = np.array([box for _, box in page.words])
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height
    boxes += [0.25, 0.25, -0.25, -0.25]  # rims of smoothed letters may touch
    left, top, right, bottom = boxes.T
    collide = (left[:, None] < right) & (left < right[:, None])
    collide &= (top[:, None] < bottom) & (top < bottom[:, None])
    np.fill_diagonal(collide, False)
    pairs = [(page.words[i], page.words[j]) for i, j in np.argwhere(collide)[:3]]
    assert not pairs


def test_cells_have_the_colour_of_their_accuracy_in_their_place(tmp_path: Path) -> None:
    """Two lengths by two depths with four accuracies: position and area of each colour."""
    lengths, depths = (512, 1024), (0.0, 100.0)
    right = {(512, 0.0): 20, (1024, 0.0): 13, (512, 100.0): 7, (1024, 100.0): 0}
    cells = {place: Cell(count, 20) for place, count in right.items()}
    path = tmp_path / "heatmap.png"
    draw_heatmap([TaskGrid("t", lengths, depths, cells)], path, title="T", caption="C")
    pixels = np.asarray(Image.open(path).convert("RGB"))[: 2 * 150]  # above the colour bar
    centres = {}
    for place, count in right.items():
        found = np.argwhere((pixels == scale_color(count / 20)).all(axis=-1))
        assert len(found) > 0.5 * (46 * 2) * (29 * 2), place  # words cover the rest
        centres[place] = found.mean(axis=0)
    (ya, xa), (yb, xb) = centres[512, 0.0], centres[1024, 100.0]
    assert xb - xa == pytest.approx(46 * 2, abs=4)
    assert yb - ya == pytest.approx(29 * 2, abs=4)
    assert centres[1024, 0.0] == pytest.approx([ya, xb], abs=4)
    assert centres[512, 100.0] == pytest.approx([yb, xa], abs=4)


def test_numbers_intervals_and_labels_are_written() -> None:
    cells = {(512, 0.0): Cell(8, 10), (65536, 100.0): Cell(1.5, 4)}
    page = heatmap(
        [TaskGrid("single", (512, 65536), (0.0, 100.0), cells)],
        title="A title",
        caption="A caption",
        style=Style(train_length=512),
    )
    words = [text for text, _ in page.words]
    # Wilson of 8 in 10 is 49.02 to 94.33: outwards 49-95. Once in its cell, once for all depths.
    assert words.count("80") == words.count("49-95") == 2
    assert words.count("38") == 2
    for word in ("single", "512", "64k", "all", "trained to 512", "not measured", "A title"):
        assert word in words, word
    assert "accuracy (%), 95% interval below" in words


def test_what_has_no_room_is_left_out_and_not_promised() -> None:
    words = [text for text, _ in heatmap(GRIDS["35 by 35"], title="T", caption="C").words]
    assert "accuracy (%)" in words
    assert not any("-" in word for word in words)


def test_the_same_cells_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_heatmap(GRIDS["three tasks"], tmp_path / name, title="T", caption=CAPTION)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(L4Error, match="cannot write the figure"):
        draw_heatmap(GRIDS["one cell"], tmp_path / "file" / "h.png", title="T", caption="C")


def test_the_scale_rises_in_lightness_so_that_no_eye_needs_its_hues() -> None:
    shades = [luminance(scale_color(i / 100)) for i in range(101)]
    assert all(a < b for a, b in itertools.pairwise(shades))
    assert shades[0] < 0.03
    assert shades[-1] > 0.7
    for i in range(101):
        color = scale_color(i / 100)
        light, dark = sorted((luminance(color), luminance(ink_on(color))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3.9, i  # large text by WCAG needs 3


def test_wrapping_keeps_every_word_and_the_width() -> None:
    text = "one two " + "x" * 200 + " three\nfour"
    lines = wrap(text, 10, 120)
    assert all(text_width(line, 10) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert lines[-1] == "four"
