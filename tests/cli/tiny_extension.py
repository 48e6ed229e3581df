"""A tiny checkpoint and documents of known lengths, for tests of `l4 extend-context`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_pretrain import as_many_threads, pretrain

from l4cli.cli import main

STAGES = "128:1536,256:2048"  # 3 steps of 4 rows, 2 steps of 4 or 2 rows


def make_start(data: Path, folder: Path) -> None:
    """`base/`: a run of four steps at 64 tokens; `books.tokens`: long and short documents."""
    assert pretrain(data, folder / "base", "--steps", "4", "-q") == 0
    lines = []
    for i in range(60):
        # Mostly short ones, and some of three lengths up to more than the longest row.
        words = (4, 4, 9, 20, 70)[i % 5]
        lines.append(" ".join(f"w{(i * 31 + j * j) % 97:02d}" for j in range(words)))
    (folder / "books.txt").write_text("\n".join(lines) + "\n")
    stream = str(folder / "books.tokens")
    words = ["tokenize", str(folder / "books.txt"), "--format", "lines", "-o", stream, "-q"]
    assert main(words) == 0


def options_of(start: Path, out: Path, *more: str) -> list[str]:
    words = [str(start / "base" / "latest"), str(start / "books.tokens"), "-o", str(out)]
    if "--stages" not in more:
        words += ["--stages", STAGES]
    return [*words, "--batch-tokens", "512", "--log-every", "1", *more]


def extend(start: Path, out: Path, *more: str) -> int:
    return main(["extend-context", *options_of(start, out, *more)])


def start_extending(args: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "l4cli", "extend-context", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**as_many_threads(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )


# Needles that a byte vocabulary writes in few tokens, so that short rows hold some.
NEEDLES = ["--needle", "#{key}={value};", "--question", "#{key}=", "--keys", "letters:1"]
NEEDLES += ["--values", "digits:1"]
