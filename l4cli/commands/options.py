"""Options that mean the same everywhere, defined once."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from l4cli.errors import UsageError

LENGTHS = {"": 1, "k": 1 << 10, "m": 1 << 20}  # of rows and contexts
WINDOW_ROWS = 16  # long rows need a larger window to find fitting pieces
_WINDOW_TOKENS = 1 << 21
COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6}  # of tokens


DEFAULT_FPS = 1.0  # frames a second of a video
DEFAULT_MAX_FRAMES = 64


class Device(StrEnum):
    """Where tensors live; `auto` is cuda where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WeightsDtype(StrEnum):
    """Precision of the weights; `auto` is as stored."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


Json = Annotated[bool, typer.Option("--json", help="JSON lines on stdout")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="only errors and warnings on stderr")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="seed of everything random")
]
Fps = Annotated[
    float, typer.Option("--fps", min=0.001, max=1000, help="frames to take a second of a video")
]
MaxFrames = Annotated[
    int, typer.Option("--max-frames", min=1, help="most frames of a video, then spread evenly")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="where to compute")]


def default_window(seq_len: int) -> int:
    """Tokens packed and shuffled at a time when nothing is said."""
    return max(_WINDOW_TOKENS, WINDOW_ROWS * seq_len)


def parse_number(text: str, option: str, example: str, units: dict[str, int]) -> int:
    """Read `1024` or `4k`: k is 1024 in lengths and 1000 in counts of tokens."""
    match = re.fullmatch(r"(\d{1,15})([a-zA-Z]?)", text)
    if match and match[2] in units and int(match[1]) > 0:
        return int(match[1]) * units[match[2]]
    known = ", ".join(f"`{unit}`" for unit in units if unit)
    raise UsageError(
        f"cannot use `{option} {text}`",
        why=f"it is not a whole number above 0, perhaps with {known}",
        fix=f"write `{option} {example}`",
    )
