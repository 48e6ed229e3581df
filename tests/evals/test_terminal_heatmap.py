"""The grid in a terminal: plain where it is data, coloured and folded on a real terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from l4cli import terminal
from l4cli.evals.cells import Cell, TaskGrid
from l4cli.evals.terminal_heatmap import heatmap_lines, show_heatmap

ROOT = Path(__file__).parents[2]
GRIDS = [
    TaskGrid(
        "single",
        (512, 65536),
        (0.0, 50.0),
        {(512, 0.0): Cell(4, 4), (512, 50.0): Cell(3, 4), (65536, 50.0): Cell(0, 4)},
    ),
    TaskGrid("cwe", (512,), (), {(512, None): Cell(1, 3)}),
]
PLAIN = """\
single: % right by context length
depth %  512  64k
      0  100    .
     50   75    0
    all   88    0

tasks without a depth: % right by context length
task  512
 cwe   33
"""


@pytest.fixture(autouse=True)
def usual_settings():
    yield
    terminal.configure()


def test_without_a_terminal_it_is_plain_data_on_stdout(capsys: pytest.CaptureFixture) -> None:
    show_heatmap(GRIDS)
    out, err = capsys.readouterr()
    assert (out, err) == (PLAIN, "")


def test_under_json_it_is_for_people_on_stderr(capsys: pytest.CaptureFixture) -> None:
    terminal.configure(json=True)
    show_heatmap(GRIDS)
    assert capsys.readouterr() == ("", PLAIN)
    terminal.configure(json=True, quiet=True)
    show_heatmap(GRIDS)
    assert capsys.readouterr() == ("", "")


def test_wide_grids_are_folded_and_no_cell_is_lost() -> None:
    lengths = tuple(512 << i for i in range(12))
    cells = {(n, 0.0): Cell(i, 20) for i, n in enumerate(lengths)}
    grid = TaskGrid("single", lengths, (0.0,), cells)
    folded = [line.plain for line in heatmap_lines([grid], 40)]
    assert max(len(line) for line in folded[1:]) <= 40
    numbers = [int(x) for line in folded if line.startswith("      0") for x in line.split()[1:]]
    assert numbers == [5 * i for i in range(12)]
    assert sum(line.startswith("depth %") for line in folded) == 3
    narrow = [line.plain for line in heatmap_lines([grid], 3)]
    assert sum(line.startswith("depth %") for line in narrow) == 12


def on_a_terminal(**environment: str) -> str:
    """Print the grids in a process whose stdout is a terminal; what arrived there."""
    code = "from test_terminal_heatmap import GRIDS, show_heatmap; show_heatmap(GRIDS)"
    drop = ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'evals'}", "TERM": "xterm-256color"}
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=follower, env=env | environment, cwd=ROOT)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.returncode == 0
    return shown.replace("\r\n", "\n")


def test_a_terminal_gets_colours_of_the_same_words() -> None:
    shown = on_a_terminal(COLORTERM="truecolor")
    assert "\x1b[38;2;31;35;40;48;2;190;238;208m" in shown  # 100%: dark on the scale's green
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert [line.rstrip() for line in bare.splitlines()] == PLAIN.splitlines()


def test_no_color_is_obeyed() -> None:
    shown = on_a_terminal(NO_COLOR="1", COLORTERM="truecolor")
    assert "48;2" not in shown
    assert "38;2" not in shown
    assert "100" in shown
