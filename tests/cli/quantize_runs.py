"""Run `l4 quantize` through the front door: what it says, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4cli.checkpoint import open_weights, quantized_names, read_quantized
from l4cli.cli import main


def events(capsys: pytest.CaptureFixture[str], *args: str | Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["quantize", *map(str, args), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 1) -> str:
    capsys.readouterr()
    assert main(["quantize", *map(str, args)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-3:]
    assert [line.partition(":")[0] for line in last] == ["error", "why", "fix"]
    return err


def formats_of(folder: Path) -> dict[str, str]:
    stored = open_weights(folder)
    return {name: str(read_quantized(stored, name).format) for name in quantized_names(stored)}
