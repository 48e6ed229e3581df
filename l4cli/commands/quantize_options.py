"""Options of `l4 quantize`: formats by part, and what cannot be meant.

in: words on the command line; out: a format for each part, checked (no torch)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated

import typer

from l4cli.errors import UsageError

DEFAULT_GROUP = 32
BLOCK = (128, 128)
DECODER_PARTS = ("attention", "experts", "shared", "dense")


class Format(StrEnum):
    """What quantized weights become."""

    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"


class PartFormat(StrEnum):
    """What one part becomes; bf16 is what is not quantized."""

    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"
    bf16 = "bf16"


class GroupSize(IntEnum):
    """Inputs that share a scale."""

    g32 = 32
    g64 = 64
    g128 = 128


class Method(StrEnum):
    """How codes are chosen."""

    round = "round"
    search = "search"
    gptq = "gptq"


FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format", help="of attention, experts, shared experts and dense MLPs  [default: int4]"
    ),
]
GroupSizeOption = Annotated[
    str | None,
    typer.Option(
        "--group-size",
        metavar="32|64|128",
        help="inputs that share a scale  [default: 32 for int4, all of an output's for int8]",
    ),
]
ZeroPoints = Annotated[
    bool,
    typer.Option(
        "--zero-points/--symmetric",
        help="int4: a zero point a group (vLLM and l4 open it, transformers 5 does not)",
    ),
]
Blocks = Annotated[
    bool, typer.Option("--blocks", help="fp8: a scale for 128x128 weights, not for each output")
]
MethodOption = Annotated[
    Method,
    typer.Option(
        "--method", help="`search` tries scales, `round` takes the range, `gptq` calibrates on text"
    ),
]
Attention = Annotated[
    PartFormat | None, typer.Option("--attention", help="q, k, v and o projections")
]
Experts = Annotated[PartFormat | None, typer.Option("--experts", help="routed experts")]
Shared = Annotated[PartFormat | None, typer.Option("--shared", help="shared experts")]
Dense = Annotated[PartFormat | None, typer.Option("--dense", help="MLPs of dense layers")]
LmHead = Annotated[PartFormat, typer.Option("--lm-head", help="the head")]
Vision = Annotated[PartFormat, typer.Option("--vision", help="encoder, adapter and projector")]

Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="text for gptq: a token stream or shards"),
]
CalibrationTokens = Annotated[
    str | None,
    typer.Option("--calibration-tokens", metavar="N", help="how much of it  [default: 128k]"),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=1.0,
        max=16.0,
        metavar="BITS",
        help="choose formats within so many bits per weight, scales included, of the decoder's "
        "parts without a format of their own; by what they lose on `--calibration`, or by weight",
    ),
]
EvalData = Annotated[
    Path | None,
    typer.Option("--eval-data", metavar="FILE", help="held-out text: measure what was lost on it"),
]
EvalTokens = Annotated[
    str | None, typer.Option("--eval-tokens", metavar="N", help="how much of it  [default: all]")
]


@dataclass(frozen=True)
class FormatWords:
    """How every format that is named shall look."""

    group_size: int | None
    zero_points: bool
    blocks: bool


def parse_group_size(text: str | None) -> int | None:
    """raises: UsageError for other sizes than there are kernels for"""
    if text is None:
        return None
    sizes = [str(int(size)) for size in GroupSize]
    if text not in sizes:
        why = "kernels here and elsewhere take groups of 32, 64 or 128"
        raise UsageError(
            f"cannot use `--group-size {text}`", why=why, fix="choose one of " + ", ".join(sizes)
        )
    return int(text)


def check_words(names: set[str], words: FormatWords) -> None:
    """Refuse what has no effect on any format that is named. raises: UsageError"""
    if words.zero_points and "int4" not in names:
        why = f"only int4 has zero points, and {_named(names)}"
        raise UsageError("cannot use `--zero-points`", why=why, fix="leave it out")
    if words.blocks and "fp8" not in names:
        why = f"only fp8 has blocks, and {_named(names)}"
        raise UsageError("cannot use `--blocks`", why=why, fix="leave it out")
    if words.group_size is not None and not names & {"int4", "int8"}:
        why = f"only int4 and int8 have groups, and {_named(names)}"
        fix = "leave it out; `--blocks` gives fp8 a scale for 128x128 weights"
        raise UsageError(f"cannot use `--group-size {words.group_size}`", why=why, fix=fix)


def _named(names: set[str]) -> str:
    chosen = sorted(names - {"bf16"})
    return f"what is asked for is {' and '.join(chosen)}" if chosen else "all stays bf16"
