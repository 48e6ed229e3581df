"""How many frames a needle test in films reads: `--frames 8,64,512`, `--hours 0.1,1,20 --fps 1`.

in: words on the command line; out: numbers of frames in ascending order, or a refusal (no torch)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4cli.commands.options import COUNTS, parse_number
from l4cli.errors import UsageError, suggest

if TYPE_CHECKING:
    from l4cli.commands.needle_options import Request

TASKS = ("video", "video-colour", "pictures")
DEFAULT_FRAMES = "8,32,128"
DEFAULT_TASKS = "single"  # of `--tasks`; with frames it means films
DEFAULT_LENGTHS = "1k,4k,16k"  # of texts
MAX_FRAMES = 10**8


@dataclass(frozen=True)
class Axis:
    """How long the films are."""

    num_frames: tuple[int, ...]
    hours: tuple[float, ...] | None  # where they were given so
    fps: float

    def text(self, num_frames: int) -> str:
        """A length as it was asked for."""
        if self.hours is None:
            return f"{num_frames} frames"
        return f"{self.hours[self.num_frames.index(num_frames)]:g} h"


def is_shown(request: Request) -> bool:
    """Whether films or pictures are asked for."""
    named = [word.strip() for word in request.tasks.split(",")]
    has_axis = request.frames is not None or request.hours is not None
    return has_axis or any(word in TASKS for word in named)


def tasks_of(request: Request) -> tuple[str, ...]:
    """The tasks with frames. raises: UsageError for any other among them"""
    if request.tasks == DEFAULT_TASKS:
        return ("video",)
    words = list(dict.fromkeys(word.strip() for word in request.tasks.split(",")))
    for word in words:
        if word not in TASKS:
            why = "films and pictures are counted in frames, texts in tokens"
            fix = f"{suggest(word, TASKS)}, or test texts in a run of their own"
            raise UsageError(f"`{word}` among tasks with frames", why=why, fix=fix)
    return tuple(words)


def axis_of(request: Request) -> Axis:
    """How many frames. raises: UsageError"""
    if request.hours is None:
        text = request.frames if request.frames is not None else DEFAULT_FRAMES
        counts = [parse_number(w.strip(), "--frames", "8,64", COUNTS) for w in text.split(",")]
        return Axis(_ascending(f"--frames {text}", counts), None, request.fps)
    what = f"--hours {request.hours}"
    hours = [_hours(word.strip(), what) for word in request.hours.split(",")]
    # Bounded first: a float may be too large to be counted.
    counts = [max(1, round(min(hour * 3600 * request.fps, 2.0 * MAX_FRAMES))) for hour in hours]
    return Axis(_ascending(what, counts), tuple(hours), request.fps)


def _hours(word: str, option: str) -> float:
    try:
        hours = float(word)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        why = f"`{word}` is no number of hours above 0"
        raise UsageError(f"cannot use `{option}`", why=why, fix="write `--hours 0.1,1,20`")
    return hours


def _ascending(option: str, counts: list[int]) -> tuple[int, ...]:
    what, fix = f"cannot use `{option}`", "name each length once, the shortest first"
    if sorted(set(counts)) != counts:
        listed = ", ".join(map(str, counts))
        why = f"the lengths are {listed} frames, and should rise"
        raise UsageError(what, why=why, fix=fix)
    if not 2 <= counts[0] <= counts[-1] <= MAX_FRAMES:
        why = f"{counts[0]} to {counts[-1]} frames are not among 2 to {MAX_FRAMES}"
        raise UsageError(what, why=why, fix="hide one frame among at least 2")
    return tuple(counts)


def check(request: Request) -> None:
    """Refuse what films have no use for. raises: UsageError"""
    tasks = tasks_of(request)
    if request.frames is not None and request.hours is not None:
        why = "both say how long the films are"
        raise UsageError("`--frames` and `--hours` given", why=why, fix="give one of them")
    if request.hours is not None and "pictures" in tasks:
        why = "pictures have no length in time"
        raise UsageError("`--hours` with `--tasks pictures`", why=why, fix="give `--frames`")
    if request.lengths != DEFAULT_LENGTHS:
        why = "films and pictures are counted in frames"
        fix = "give `--frames` or `--hours` instead"
        raise UsageError(f"`--lengths {request.lengths}` with frames", why=why, fix=fix)
    axis_of(request)
    others = {
        "--haystack": request.haystack,
        "--qa": request.qa,
        "--needle": request.needle,
        "--keys": request.keys,
        "--values": request.values,
        "--endpoint": request.endpoint,
        "--layer-major": (request.layer_major and not request.dry_run) or None,
    }
    for name, value in others.items():
        if value is not None:
            why = "films and pictures are drawn here and read by a model in this process"
            fix = f"leave `{name}` out, or `--frames`, `--hours` and {', '.join(tasks)}"
            raise UsageError(f"`{name}` with frames", why=why, fix=fix)
