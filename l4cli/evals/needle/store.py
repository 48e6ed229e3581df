"""What was read so far, on disk: one JSON line per text, so that a grid can be cut off at any time.

in: records; out: `results.jsonl` and `settings.json` in a folder, refusals to mix two grids
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4cli.checkpoint.atomic import write_text
from l4cli.errors import L4Error, UsageError

RESULTS = "results.jsonl"
SETTINGS = "settings.json"
FORMAT = "l4-needle-test-1"


class ResultsStore:
    """The results of one grid; `append` has them on disk when it returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []

    @property
    def finished(self) -> set[str]:
        """Keys of the texts that are done."""
        return {record["key"] for record in self.records}

    def num_kept(self) -> int:
        """Texts on disk, whatever moment a signal chose."""
        path = self.folder / RESULTS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> ResultsStore:
        """Begin in a new folder, or go on in one of the same settings.

        raises: UsageError naming the settings that differ; L4Error for a damaged file
        """
        store = cls(folder)
        current = json.loads(json.dumps(dict(settings)))  # compare on equal terms
        recorded = read_settings(folder)
        if recorded is None:
            folder.mkdir(parents=True, exist_ok=True)
            kept = {"format": FORMAT, "settings": current}
            write_text(folder / SETTINGS, json.dumps(kept, indent=2) + "\n")
        else:
            _require_same(folder, recorded, current)
            store.records = _read_records(folder / RESULTS)
        return store

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep one record."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records.append(json.loads(line))


def require_usable(folder: Path, *, fresh: bool) -> None:
    """Refuse a folder of something else, or with `--fresh` any that is not empty."""
    if not folder.exists():
        return
    what, fix = f"cannot write to `{folder}`", "choose another folder with `-o`"
    if not folder.is_dir():
        raise UsageError(what, why="it is a file, and results need a folder", fix=fix)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if fresh and names:
        raise UsageError(
            f"`--fresh` needs a new or empty folder, not `{folder}`",
            why=f"it holds `{names[0]}`" + (f" and {len(names) - 1} more" if names[1:] else ""),
            fix="choose another folder with `-o`, or remove this one",
        )
    if names and read_settings(folder) is None:
        why = f"it holds `{names[0]}` and no `{SETTINGS}`: it belongs to something else"
        raise UsageError(what, why=why, fix=fix)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the grid in a folder, None without one. raises: L4Error if damaged"""
    path = folder / SETTINGS
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, f"it is not JSON: {error}") from None
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise _damaged(path, f"it is not marked as `{FORMAT}`")
    settings: dict[str, Any] = kept["settings"]
    return settings


def _require_same(folder: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    differing = [
        f"`{name}` was {_shown(recorded.get(name))}, now {_shown(current.get(name))}"
        for name in sorted(recorded.keys() | current.keys())
        if recorded.get(name) != current.get(name)
    ]
    if differing:
        raise UsageError(
            f"`{folder}` holds a test with other options",
            why="; ".join(differing),
            fix="give the same options to continue it, or choose another folder with `-o`",
        )


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Read what is whole; a last line that was cut off is taken off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            record = json.loads(line)
            record["key"], record["answers"]
        except (ValueError, KeyError, TypeError):
            raise _damaged(path, f"line {number} is not a record of this test") from None
        records.append(record)
    return records


def _damaged(path: Path, why: str) -> L4Error:
    fix = "restore the file, or begin anew in another folder with `-o`"
    return L4Error(f"cannot use `{path}`", why=why, fix=fix)
