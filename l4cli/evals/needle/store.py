"""What was read so far, on disk: one JSON line per text, so that a grid can be cut off at any time.

in: records; out: `results.jsonl` and `settings.json` in a folder, refusals to mix two grids
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4cli.checkpoint import kept_settings
from l4cli.errors import UsageError

RESULTS = "results.jsonl"
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
        recorded = kept_settings.read_settings(folder, FORMAT)
        if recorded is None:
            kept_settings.write_settings(folder, FORMAT, current)
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
    kept_settings.require_usable(folder, FORMAT, fresh=fresh, needs="results need")


def _require_same(folder: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    if differing := kept_settings.differing(recorded, current):
        raise UsageError(
            f"`{folder}` holds a test with other options",
            why="; ".join(differing),
            fix="give the same options to continue it, or choose another folder with `-o`",
        )


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
            raise kept_settings.damaged(
                path, f"line {number} is not a record of this test"
            ) from None
        records.append(record)
    return records
