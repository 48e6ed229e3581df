"""The front door: streams that are closed, pipes that nobody reads, names that are no text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

L4 = [sys.executable, "-m", "l4cli"]


def _shell(line: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    words = ["bash", "-o", "pipefail", "-c", line.replace("l4 ", " ".join(L4) + " ")]
    return subprocess.run(words, capture_output=True, env={**os.environ, **variables}, timeout=60)


@pytest.mark.parametrize("line", ["l4 --help", "l4 info --help", "l4 --version"])
def test_help_that_nobody_reads(line: str) -> None:
    # `true` ends at once; what is written after that meets a closed pipe.
    done = _shell(f"( sleep 0.3; exec {line} ) | true")
    assert done.returncode == 141
    assert done.stderr == b""


def test_a_closed_stdout_is_an_error() -> None:
    done = _shell("l4 info preset:nano >&-")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == b"error: cannot write to standard output"


def test_a_closed_stderr_keeps_words_out_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    line = f"l4 tokenize {tmp_path}/a.txt 2>&- | l4 info -"
    done = _shell(line)
    assert done.returncode == 0, done.stderr
    assert b"is_complete" in done.stdout
    assert _shell("l4 nonsense 2>&-").stdout == b""


@pytest.mark.parametrize("command", ["info -", "tokenize -", "pack -o x", "train-tokenizer - -o x"])
def test_a_closed_stdin_is_an_error(tmp_path: Path, command: str) -> None:
    done = _shell(f"cd {tmp_path} && l4 {command} <&-")
    assert done.returncode in (1, 2)
    assert b"error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_name_the_locale_cannot_write(tmp_path: Path) -> None:
    name = tmp_path / "ünï.txt"
    name.write_text("words")
    stream = tmp_path / "ünï.tokens"
    done = _shell(f"l4 tokenize {name} -o {stream} && l4 info {stream}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


def test_a_full_device_is_named_by_what_it_is() -> None:
    done = _shell("l4 info preset:nano > /dev/full")
    assert done.returncode == 1
    assert b"cannot write all of the output" in done.stderr
