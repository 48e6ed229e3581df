"""Every answer that was paid for, on disk before anything else is done with it.

in: records by prompt and sample; out: `answers.jsonl` and `settings.json` in a folder, refusals
to mix the answers of two teachers
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from l4cli.checkpoint import kept_settings
from l4cli.errors import UsageError

ANSWERS = "answers.jsonl"
SUMMARY = "summary.json"  # written last
FORMAT = "l4-answers-1"

Key = tuple[str | int, int]  # the prompt's id, the number of the sample


class AnswerJournal:
    """The answers in one folder; only where they lie is in memory. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ANSWERS
        self._places: dict[Key, int] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @classmethod
    def open(
        cls, folder: Path, settings: Mapping[str, Any], *, only_reads: bool = False
    ) -> AnswerJournal:
        """Begin in a new folder, or go on in one of the same settings.

        A folder without any answer takes other settings. `only_reads`: nothing is written.
        raises: UsageError naming the settings that differ; L4Error for a damaged file
        """
        journal = cls(folder)
        current = json.loads(json.dumps(dict(settings)))  # compare on equal terms
        recorded = settings_of_answers(folder)
        if recorded is not None:
            _require_same(folder, recorded, current)
            journal._find(repairs=not only_reads)
        elif not only_reads:
            kept_settings.write_settings(folder, FORMAT, current)
        return journal

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep one answer; it is on the disk when this returns."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            with self.path.open("ab") as file:
                place = file.tell()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._places[record["id"], record["sample"]] = place

    def read(self, keys: Iterator[Key]) -> Iterator[dict[str, Any]]:
        """Give records in the order of the keys, those that are there."""
        if not self._places:
            return
        with self.path.open("rb") as file:
            for key in keys:
                if key in self._places:
                    file.seek(self._places[key])
                    yield json.loads(file.readline())

    def _find(self, *, repairs: bool) -> None:
        """Note where records begin; `repairs`: a last line that was cut off is taken away."""
        place = 0
        with self.path.open("r+b" if repairs else "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if repairs:
                        file.truncate(place)
                    break
                try:
                    record = json.loads(line)
                    self._places[record["id"], int(record["sample"])] = place
                except (ValueError, KeyError, TypeError):
                    why = f"line {number} is not a record of an answer"
                    raise kept_settings.damaged(self.path, why) from None
                place += len(line)


def require_usable(folder: Path, *, fresh: bool) -> None:
    """Refuse a folder of something else, or with `--fresh` any that is not empty."""
    kept_settings.require_usable(folder, FORMAT, fresh=fresh, needs="answers need")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """How the answers in a folder were asked for, None without any. raises: L4Error if damaged"""
    return kept_settings.read_settings(folder, FORMAT)


def settings_of_answers(folder: Path) -> dict[str, Any] | None:
    """How the answers in a folder were asked for; None while there is none to be mixed up."""
    answers = folder / ANSWERS
    return read_settings(folder) if answers.exists() and answers.stat().st_size else None


def describe_answers(folder: Path) -> dict[str, Any]:
    """What people and tools want to know about a folder of answers. raises: L4Error"""
    settings = read_settings(folder)
    journal = AnswerJournal.open(folder, settings or {}, only_reads=True)
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None  # stopped before it was written
    figures = summary if isinstance(summary, dict) else {}
    return {
        "num_answers": len(journal),
        "is_finished": bool(figures),
        **{k: v for k, v in figures.items() if k.startswith("num_")},
        "shards": figures.get("shards"),
        "settings": settings,
    }


def _require_same(folder: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    if differing := kept_settings.differing(recorded, current):
        raise UsageError(
            f"`{folder}` holds answers to other questions",
            why="; ".join(differing),
            fix="give the same options to continue, or choose another folder with `-o`",
        )
