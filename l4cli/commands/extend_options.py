"""Options of `l4 extend-context` that no other command has: stages, and what is changed.

in: words on the command line; out: stages, rates and changes, checked (no torch)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from l4cli.commands.options import LENGTHS, parse_number
from l4cli.commands.training_options import parse_count
from l4cli.errors import UsageError, suggest
from l4cli.training.stages import ROPE_KINDS, RopeChange, Stage

MAX_SEQ_LEN = 1 << 24
SYNTHETIC_FRACTION = 0.5  # of a stage's tokens when documents are made and nothing is said
T = TypeVar("T")


class RopeScope(StrEnum):
    """Which RoPE layers are stretched."""

    all = "all"
    full = "full"


Stages = Annotated[
    str, typer.Option("--stages", metavar="LENGTH:TOKENS,...", help="as in `2k:5M,8k:20M`")
]
BatchTokens = Annotated[
    str | None,
    typer.Option(
        "--batch-tokens",
        metavar="N",
        help="tokens per step in every stage, to whole rows  [default: 16 rows of the first stage]",
    ),
]
StageLr = Annotated[
    str | None,
    typer.Option(
        "--lr",
        metavar="LR[,LR...]",
        help="peak learning rate, one or one a stage  [default: 0.75 of the checkpoint's]",
    ),
]
ResetOptimizer = Annotated[
    bool, typer.Option("--reset-optimizer", help="begin without the checkpoint's moments")
]
LongFraction = Annotated[
    float,
    typer.Option(
        "--long-fraction",
        min=0.0,
        max=1.0,
        help="share of tokens from documents of half a row or more",
    ),
]
MixSchedule = Annotated[
    Path | None,
    typer.Option(
        "--mix-schedule",
        metavar="FILE",
        help="TOML: token streams by name in `[data]`, their shares in `[stages.1]`, ...",
    ),
]
SyntheticOption = Annotated[
    str | None,
    typer.Option(
        "--synthetic", metavar="KINDS", help="make documents: `retrieval`, `copies`, ... or `all`"
    ),
]
SyntheticFraction = Annotated[
    float | None,
    typer.Option(
        "--synthetic-fraction",
        min=0.0,
        max=1.0,
        help="share of tokens that are made  [default: 0.5, or all without a stream]",
    ),
]
Hard = Annotated[
    float | None,
    typer.Option("--hard", min=0.0, max=1.0, help="share of `retrieval` documents full of needles"),
]
SyntheticFrom = Annotated[
    str | None,
    typer.Option(
        "--synthetic-from",
        metavar="CKPT|URL",
        help="a model that writes questions about passages of the streams, and checks them",
    ),
]
Passages = Annotated[
    int | None,
    typer.Option(
        "--passages", min=2, help="with `--synthetic-from`: how many to ask about  [default: 200]"
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="with a URL: the model's name there"),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="NAME",
        help="with a URL: the variable that holds the key  [default: OPENAI_API_KEY]",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="with a URL: requests at the same time  [default: 4]"),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="with a URL: tokens to spend in all")
]
GateOption = Annotated[
    float | None,
    typer.Option(
        "--gate",
        min=0.0,
        max=1.0,
        help="needles to find after each stage, at its length and twice it; exit 1 below",
    ),
]
AttnScale = Annotated[
    float | None, typer.Option("--attn-scale", help="strength of attention temperature")
]
FloorScale = Annotated[
    float | None, typer.Option("--floor-scale", help="positions from which temperature acts")
]
Temperature = Annotated[
    bool | None, typer.Option("--temperature/--no-temperature", help="attention temperature")
]
ScalableSoftmax = Annotated[
    bool,
    typer.Option(
        "--scalable-softmax", help="learned s ln(n) in its place; no plain Llama 4 any more"
    ),
]
ChunkSize = Annotated[
    str | None,
    typer.Option(
        "--attention-chunk-size", metavar="N[,N...]", help="of chunked layers, one or one a stage"
    ),
]
RopeTheta = Annotated[float | None, typer.Option("--rope-theta", help="base of RoPE's angles")]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling",
        metavar="KIND[:FACTOR]",
        help="`llama3`, `ntk`, `yarn` or `pi`; without a factor stage length / trained length",
    ),
]
RopeScopeOption = Annotated[
    RopeScope, typer.Option("--rope-scope", help="all RoPE layers, or those without chunks")
]
TrainedLength = Annotated[
    str | None,
    typer.Option(
        "--trained-length", metavar="N", help="of the checkpoint  [default: what it says itself]"
    ),
]


def parse_stages(text: str) -> list[Stage]:
    """Read `2k:5M,8k:20M`. raises: UsageError for what is no stage, or falling lengths"""
    stages = []
    for number, word in enumerate(text.split(","), 1):
        length, colon, tokens = word.strip().partition(":")
        if not colon:
            why = f"`{word}` is no length and number of tokens with `:` between them"
            fix = "write `--stages 2k:5M,8k:20M`"
            raise UsageError(f"cannot read `--stages {text}`", why=why, fix=fix)
        seq_len = parse_number(length, "--stages", "2k:5M", LENGTHS)
        if not 2 <= seq_len <= MAX_SEQ_LEN:
            why = f"rows have from 2 to {MAX_SEQ_LEN} tokens, not {seq_len}"
            raise UsageError(f"cannot use stage `{word}`", why=why, fix="write `--stages 2k:5M`")
        stages.append(Stage(number, seq_len, parse_count(tokens, "--stages")))
    for before, after in itertools.pairwise(stages):
        if after.seq_len < before.seq_len:
            why = f"stage {after.number} has {after.seq_len} tokens after {before.seq_len}"
            fix = "put shorter stages first"
            raise UsageError(f"cannot use `--stages {text}`", why=why, fix=fix)
    return stages


def one_per_stage(
    text: str | None, option: str, num_stages: int, parse: Callable[[str], T]
) -> list[T | None]:
    """Read one value for all stages, or one for each, with commas between."""
    if text is None:
        return [None] * num_stages
    values: list[T | None] = [parse(word.strip()) for word in text.split(",")]
    if len(values) == 1:
        return values * num_stages
    if len(values) != num_stages:
        why = f"it has {len(values)} values for {num_stages} stages"
        fix = "give one value, or one for each stage"
        raise UsageError(f"cannot use `{option} {text}`", why=why, fix=fix)
    return values


def parse_rate(word: str) -> float:
    """A learning rate above 0."""
    try:
        rate = float(word)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        why = "a learning rate is a number above 0"
        raise UsageError(f"cannot use `--lr {word}`", why=why, fix="`--lr 1e-3`")
    return rate


def parse_chunk(word: str) -> int:
    """A chunk of two positions or more."""
    size = parse_number(word, "--attention-chunk-size", "8k", LENGTHS)
    if size < 2:
        why = "a chunk of one position sees nothing but itself"
        fix = "`--attention-chunk-size 8k`"
        raise UsageError(f"cannot use `--attention-chunk-size {word}`", why=why, fix=fix)
    return size


def parse_rope(text: str) -> RopeChange:
    """Read `yarn`, `yarn:auto` or `yarn:4`: a kind, and a factor above 1 if one is given."""
    kind, colon, factor = text.partition(":")
    if kind not in ROPE_KINDS:
        why = "there is no such scaling"
        fix = suggest(kind, ROPE_KINDS)
        raise UsageError(f"cannot use `--rope-scaling {text}`", why=why, fix=fix)
    if not colon or factor == "auto":
        return RopeChange(kind)
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if not 1 < value < math.inf:
        why = f"`{factor}` is not a number above 1"
        fix = f"`--rope-scaling {kind}:4`, or `--rope-scaling {kind}` to follow the stage"
        raise UsageError(f"cannot use `--rope-scaling {text}`", why=why, fix=fix)
    return RopeChange(kind, value)


def rows_per_step(stages: Sequence[Stage], batch_tokens: str | None) -> list[int]:
    """Rows of a step by stage, so that every step has about as many tokens."""
    num_tokens = 16 * stages[0].seq_len
    if batch_tokens is not None:
        num_tokens = parse_count(batch_tokens, "--batch-tokens")
    return [max(1, round(num_tokens / stage.seq_len)) for stage in stages]
