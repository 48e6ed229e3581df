"""Which streams a stage reads and in which shares: from the command line or a schedule file.

in: `PATH:WEIGHT` words, or a TOML file; out: a mixture a stage, checked

A schedule file names data sets and gives each stage their shares, on any scale:

    [data]
    books = "books.tokens"      # beside this file
    sums = "/data/sums.tokens"

    [stages.1]
    books = 0.9
    sums = 0.1

    [stages.2]
    books = 0.5
    synthetic = 0.5             # what `--synthetic` makes
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4cli.errors import L4Error, UsageError, suggest

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Mix:
    """What one stage reads; the shares of streams are among themselves."""

    streams: Sequence[tuple[Path, float | None]]  # None: they count as one
    synthetic_fraction: float


def mix_of_words(words: Sequence[str], synthetic_fraction: float) -> Mix:
    """The mixture of `PATH` or `PATH:WEIGHT`; the same in every stage."""
    if not words:
        return Mix((), 1.0)
    from l4cli.data.mixing import parse_mixture

    parts = parse_mixture(words)
    streams = [(p.path, None if p.weight is None else float(p.weight)) for p in parts]
    return Mix(streams, synthetic_fraction)


def read_schedule(file: Path, num_stages: int, *, has_synthetic: bool) -> list[Mix]:
    """Read a schedule. raises: UsageError naming the stage or the word that does not fit"""
    tables = _read(file)
    data, stages = tables.get("data", {}), tables.get("stages")
    unknown = [name for name in tables if name not in ("data", "stages")]
    if unknown:
        raise _bad(
            file, f"`[{unknown[0]}]` is no part of it", suggest(unknown[0], ["data", "stages"])
        )
    if not isinstance(stages, dict) or not isinstance(data, dict):
        raise _bad(file, "it needs tables `[data]` and `[stages.1]`, `[stages.2]`, ...")
    for name, path in data.items():
        if not isinstance(path, str):
            raise _bad(file, f"`{name}` in `[data]` is {path!r}, not the path of a token stream")
        if name == SYNTHETIC:
            raise _bad(file, f"`{name}` stands for what `--synthetic` makes", "choose another name")
    numbers = [str(number) for number in range(1, num_stages + 1)]
    missing = [number for number in numbers if number not in stages]
    extra = [number for number in stages if number not in numbers]
    if missing:
        raise _bad(file, f"`[stages.{missing[0]}]` is missing; there are {num_stages} stages")
    if extra:
        raise _bad(file, f"it has `[stages.{extra[0]}]`, and there are {num_stages} stages")
    paths = {name: file.parent / path for name, path in data.items()}
    return [_mix(file, number, stages[number], paths, has_synthetic) for number in numbers]


def _mix(
    file: Path, number: str, shares: Any, paths: Mapping[str, Path], has_synthetic: bool
) -> Mix:
    table = f"`[stages.{number}]`"
    if not isinstance(shares, dict):
        raise _bad(file, f"{table} is no table of shares")
    for name, share in shares.items():
        if name not in paths and name != SYNTHETIC:
            why = f"{table} names `{name}`, which `[data]` does not have"
            raise _bad(file, why, suggest(name, [*paths, SYNTHETIC]))
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not 0 <= share < math.inf:
            raise _bad(file, f"`{name}` in {table} is {share!r}, not a share of 0 or more")
        if name == SYNTHETIC and share and not has_synthetic:
            why = f"{table} takes `{name}` data, and none is asked for"
            raise _bad(file, why, "add `--synthetic retrieval`")
    total = float(sum(shares.values()))
    if total <= 0:
        raise _bad(file, f"the shares in {table} add up to 0", "give one of them a share")
    streams = [(paths[n], float(s)) for n, s in shares.items() if n != SYNTHETIC and s > 0]
    return Mix(streams, shares.get(SYNTHETIC, 0.0) / total)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise L4Error(f"cannot read `{file}`", why=why, fix="check the path") from error
    except ValueError as error:  # TOML or UTF-8
        raise _bad(file, f"it is not TOML: {error}") from error


def _bad(file: Path, why: str, fix: str = "see `l4 extend-context --help`") -> UsageError:
    return UsageError(f"cannot use the schedule `{file}`", why=why, fix=fix)
