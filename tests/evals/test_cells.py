"""Rows of results to grids."""

from __future__ import annotations

from l4cli.evals.cells import Cell, grids_from_rows, length_text


def row(task: str, length: int, depth: float | None, correct: float, samples: int) -> dict:
    names = ("task", "length", "depth", "num_correct", "num_samples")
    return dict(zip(names, (task, length, depth, correct, samples), strict=True))


def test_rows_become_grids_and_seeds_are_added_up() -> None:
    rows = [
        row("single", 1024, 50, 3, 4),
        row("cwe", 512, None, 1.5, 2),
        row("single", 512, 0, 4, 4),
        row("single", 1024, 50, 1, 4),
        row("single", 2048, 0, 0, 0),
    ]
    single, words = grids_from_rows(rows)
    assert (single.task, single.lengths, single.depths) == ("single", (512, 1024), (0.0, 50.0))
    assert single.cells[1024, 50.0] == Cell(4, 8)
    assert (512, 50.0) not in single.cells
    assert (words.lengths, words.depths, words.rows()) == ((512,), (), (None,))
    assert words.cells[512, None].accuracy == 0.75


def test_a_length_over_all_depths() -> None:
    (grid,) = grids_from_rows([row("t", 512, 0, 1, 4), row("t", 512, 100, 4, 4)])
    assert grid.at_length(512) == Cell(5, 8)
    assert grid.at_length(1024) is None


def test_lengths_are_written_as_options_write_them() -> None:
    shown = [length_text(n) for n in (512, 1000, 1024, 1536, 65536, 1 << 20, 10 << 20)]
    assert shown == ["512", "1000", "1k", "1536", "64k", "1m", "10m"]


def test_a_hundred_percent_means_all() -> None:
    shown = [Cell(n, 1000).percent for n in (0, 1, 4, 500, 996, 999, 1000)]
    assert shown == ["0", "1", "1", "50", "99", "99", "100"]
