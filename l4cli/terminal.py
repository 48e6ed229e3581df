"""Where words go: data to stdout, people's text to stderr, once.

in: results, events and progress; out: text, or JSON lines under `--json`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from l4cli.errors import L4Error

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL_S = 10.0  # without a terminal, one progress line per interval


@dataclass
class Settings:
    """How this process talks; set once by `configure`, from a command's options."""

    json: bool = False
    quiet: bool = False


_settings = Settings()


def configure(*, json: bool = False, quiet: bool = False) -> None:
    """Set how to talk."""
    _settings.json, _settings.quiet = json, quiet


def wants_json() -> bool:
    """Whether stdout carries JSON lines."""
    return _settings.json


def is_quiet() -> bool:
    """Whether text for people is held back (errors are not)."""
    return _settings.quiet


def console() -> Console:
    """A rich console on stderr; plain without a terminal or with NO_COLOR."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Tell people something, on stderr."""
    if not is_quiet():
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Tell people something they should act on; `--quiet` does not hide it."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def result(text: str) -> None:
    """Write data for people or pipes to stdout; nothing under `--json`, where events speak."""
    if not _settings.json:
        print(_encodable(text), flush=True)


def stream(text: str) -> None:
    """Write a piece of an answer to stdout at once; nothing under `--json`.

    On a terminal control characters are shown, not obeyed: models must not steer it.
    """
    if _settings.json:
        return
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else _spelled(c) for c in text)
    print(_encodable(text), end="", flush=True)


def _encodable(text: str) -> str:
    """The text with what the locale of stdout cannot write replaced, rather than an error."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def _spelled(character: str) -> str:
    is_control = ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0
    return f"\\x{ord(character):02x}" if is_control else character


def emit(event: Mapping[str, Any]) -> None:
    """Write one JSON line to stdout, under `--json` only."""
    if _settings.json:
        print(json.dumps(event, allow_nan=False), flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as data on stdout; plain aligned columns, so that it pipes."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(name)] + [len(row[i]) for row in cells]) for i, name in enumerate(columns)]
    lines = [title] if title else []
    lines += ["  ".join(n.ljust(w) for n, w in zip(columns, widths, strict=True)).rstrip()]
    lines += [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    result("\n".join(lines))


def show_error(error: L4Error) -> None:
    """Print the three lines of an error."""
    lines = f"error: {error.what}\nwhy: {error.why}\nfix: {error.fix}"
    print(lines, file=sys.stderr, flush=True)


class Progress(Protocol):
    """What a long job reports to: how far it is, and figures worth showing."""

    def update(self, completed: float, **figures: str) -> None:
        """Say how much is done in all; figures are shown beside the bar."""


class _Silent:
    def update(self, completed: float, **figures: str) -> None:
        pass


class _PlainLines:
    def __init__(self, label: str, total: float | None) -> None:
        self.label, self.total, self.last = label, total, time.monotonic()

    def update(self, completed: float, **figures: str) -> None:
        now = time.monotonic()
        if now - self.last < PLAIN_INTERVAL_S:
            return
        self.last = now
        done = f"{completed / self.total:.0%}" if self.total else ""
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        say("  ".join(part for part in (self.label, done, shown) if part))


class _Bar:
    def __init__(self, bar: Any, task: Any, line: Any) -> None:
        self.bar, self.task, self.line = bar, task, line

    def update(self, completed: float, **figures: str) -> None:
        # The bar has an eta of its own.
        shown = (f"{name} {value}" for name, value in figures.items() if name != "eta")
        self.line.plain = "  ".join(shown)
        self.bar.update(self.task, completed=completed)


@contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Progress]:
    """A bar with an eta and the figures below, or without a terminal one plain line per interval.

    On stderr.
    """
    if is_quiet():
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _PlainLines(label, total)
    else:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        screen = console()
        bar, line = RichProgress(*columns, console=screen), Text(no_wrap=False, overflow="fold")
        with Live(Group(bar, line), console=screen, transient=True):
            yield _Bar(bar, bar.add_task(label, total=total), line)


def bytes_text(size_bytes: float) -> str:
    """Bytes in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def count_text(count: float) -> str:
    """Counts in powers of ten: `1.5M`."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f}T"


def time_text(time_s: float) -> str:
    """Seconds as `1h02m`, `3m12s` or `4.2s`."""
    if time_s >= 3600:
        return f"{int(time_s // 3600)}h{int(time_s % 3600 // 60):02d}m"
    if time_s >= 60:
        return f"{int(time_s // 60)}m{int(time_s % 60):02d}s"
    return f"{time_s:.1f}s"
