"""Options of every command that trains, spelled once, and what follows from them.

in: words on the command line; out: checked options, numbers of steps, a schedule (no torch)
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from l4cli.errors import UsageError
from l4cli.training.schedule import Schedule


class ScheduleKind(StrEnum):
    """How the learning rate goes."""

    wsd = "wsd"
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class DecayShape(StrEnum):
    """How the tail of `wsd` goes down."""

    sqrt = "sqrt"
    linear = "linear"


class Optim(StrEnum):
    """Which optimizer the hidden matrices get; the rest always gets AdamW."""

    muon = "muon"
    adamw = "adamw"


class Dtype(StrEnum):
    """What is computed in; the weights trained are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class BalanceKind(StrEnum):
    """What keeps the experts equally busy."""

    bias = "bias"
    loss = "loss"
    both = "both"
    none = "none"


Steps = Annotated[int | None, typer.Option("--steps", min=1, help="optimizer steps in all")]
Tokens = Annotated[
    str | None, typer.Option("--tokens", metavar="N", help="tokens in all, as in `5M` or `1.5B`")
]
Epochs = Annotated[
    float | None, typer.Option("--epochs", help="passes over the rows; 1 if nothing is said")
]
SeqLen = Annotated[
    str | None,
    typer.Option("--seq-len", metavar="N", help="must be that of the shards, as in `4k`; a check"),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="sequences per optimizer step, all ranks")
]
MicroBatchSize = Annotated[
    int | None,
    typer.Option("--micro-batch-size", min=1, help="sequences at once  [default: up to 8k tokens]"),
]
Lr = Annotated[
    float | None, typer.Option("--lr", help="peak learning rate  [default: by hidden size]")
]
MinLr = Annotated[float, typer.Option("--min-lr", min=0.0, help="learning rate at the end")]
Warmup = Annotated[
    int | None, typer.Option("--warmup", min=0, help="steps of warm-up  [default: 2% of all]")
]
ScheduleOption = Annotated[ScheduleKind, typer.Option("--schedule", help="learning rate by step")]
DecayFrac = Annotated[
    float, typer.Option("--decay-frac", min=0.0, max=1.0, help="share of steps in wsd's tail")
]
DecayShapeOption = Annotated[DecayShape, typer.Option("--decay-shape", help="wsd's tail")]
WeightDecay = Annotated[
    float, typer.Option("--weight-decay", min=0.0, help="not on norms, biases and embeddings")
]
ClipGrad = Annotated[
    float, typer.Option("--clip-grad", min=0.0, help="largest gradient norm; 0 does not clip")
]
OptimOption = Annotated[Optim, typer.Option("--optim", help="optimizer of the hidden matrices")]
DTYPE_HELP = "compute in; masters stay fp32; fp8: experts' products, the rest in bf16"
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help=DTYPE_HELP)]
BalanceOption = Annotated[
    BalanceKind, typer.Option("--balance", help="what keeps the experts equally busy")
]
BalanceRate = Annotated[
    float, typer.Option("--balance-rate", min=0.0, help="change of the bias per step")
]
SaveEvery = Annotated[
    int | None, typer.Option("--save-every", min=0, help="steps  [default: a tenth of all]")
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="newest checkpoints that stay")]
EvalEvery = Annotated[
    int | None, typer.Option("--eval-every", min=0, help="steps  [default: a tenth of all]")
]
EvalData = Annotated[
    Path | None, typer.Option("--eval-data", help="held-out shards: measures bits per byte")
]
LogEvery = Annotated[int, typer.Option("--log-every", min=1, help="steps per line")]
InitFrom = Annotated[
    Path | None, typer.Option("--init-from", help="checkpoint whose weights to start from")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change one key of the model's config"),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="refuse to continue a run in the folder")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show what it would take, do nothing")]

MAX_EPOCHS = 10**6
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, option: str) -> int:
    """Read `1500`, `5M` or `1.5B`: counts of tokens come in powers of ten."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([kKMBT]?)", text)
    if match and float(match[1]) > 0:
        return math.ceil(float(match[1]) * _UNITS[match[2]])
    why = "it is not a number above 0 with `k`, `M`, `B` or `T`"
    raise UsageError(f"cannot use `{option} {text}`", why=why, fix=f"write `{option} 5M`")


@dataclass(frozen=True)
class Length:
    """How long to train, said in one of three ways."""

    steps: int | None
    tokens: str | None
    epochs: float | None

    def check(self) -> None:
        """Refuse two ways at once, before anything is loaded."""
        ways = {"--steps": self.steps, "--tokens": self.tokens, "--epochs": self.epochs}
        given = [f"`{name}`" for name, value in ways.items() if value is not None]
        if len(given) > 1:
            why = "both say how long to train"
            raise UsageError(" and ".join(given) + " given", why=why, fix="give one of them")
        if self.tokens is not None:
            parse_count(self.tokens, "--tokens")
        if self.epochs is not None and not 0 < self.epochs <= MAX_EPOCHS:
            why = f"it is not a number above 0 and at most {MAX_EPOCHS}"
            raise UsageError(f"cannot use `--epochs {self.epochs}`", why=why, fix="`--epochs 1`")

    def num_steps(self, num_rows: int, batch_size: int, seq_len: int) -> int:
        """Steps in all; a started step counts as one."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return math.ceil(parse_count(self.tokens, "--tokens") / (batch_size * seq_len))
        return max(1, math.ceil(num_rows * (self.epochs or 1.0) / batch_size))


@dataclass(frozen=True)
class LearningRate:
    """The options that make a schedule once the number of steps is known."""

    lr: float | None
    min_lr: float
    warmup: int | None
    schedule: ScheduleKind
    decay_frac: float
    decay_shape: DecayShape

    def check(self) -> None:
        """Refuse rates that cannot be meant."""
        if self.lr is not None and not 0 < self.lr < math.inf:
            why = "a learning rate is above 0"
            raise UsageError(f"cannot use `--lr {self.lr}`", why=why, fix="`--lr 3e-3`")
        if self.lr is not None and self.min_lr > self.lr:
            why = f"`--lr {self.lr:g}` is below it"
            fix = "give a lower `--min-lr`"
            raise UsageError(f"cannot use `--min-lr {self.min_lr:g}`", why=why, fix=fix)

    def for_steps(self, num_steps: int, hidden_size: int) -> Schedule:
        """The schedule of a run."""
        # Wider models want smaller steps; 3e-3 is measured on nano.
        lr = self.lr if self.lr is not None else 3e-3 * (192 / hidden_size) ** 0.5
        warmup = self.warmup if self.warmup is not None else default_warmup(num_steps)
        return Schedule(
            self.schedule.value,
            lr,
            min(self.min_lr, lr),
            num_steps,
            warmup,
            self.decay_frac,
            self.decay_shape.value,
        )


def require_one_rank() -> None:
    """Refuse to be one of several processes: each would train, and write, all of it."""
    num_ranks = os.environ.get("WORLD_SIZE", "1")
    if num_ranks != "1":
        raise UsageError(
            "cannot train on several ranks",
            why=f"`WORLD_SIZE` is {num_ranks}, and one process is all that training uses yet",
            fix="run it without torchrun, or with `--nproc-per-node 1`",
        )


def default_warmup(num_steps: int) -> int:
    """Two percent of the steps, at least one and at most 2000."""
    return min(2000, max(1, num_steps // 50))


def default_interval(num_steps: int) -> int:
    """A tenth of the steps: how often to save and to evaluate when nothing is said."""
    return max(1, num_steps // 10)
