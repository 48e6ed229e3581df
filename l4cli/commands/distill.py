"""Train students on packed shards and on what a teacher predicts there, one forward of it for all.

Students may differ in shape: `--student preset:nano`, a checkpoint, a `config.json`, or `teacher`
(a smaller copy of it); after commas come what is theirs alone: `name=`, `lr=`, `loss=`, `alpha=`,
`layers=0+2+5` to keep, any key of the model's config. The same command again continues.

examples:
  l4 distill shards/ --teacher runs/big/latest --student preset:nano -o runs/small
  l4 distill shards/ --teacher big/ --student preset:nano --student dense.json,lr=4e-3
  l4 distill shards/ --teacher big/ --student teacher,num_hidden_layers=4 --alpha token:0.9
  l4 distill shards/ --teacher preset:mini --codistill --burn-in 0.1 --student preset:nano
  l4 distill shards/ --teacher big/ --write-cache cache/
  l4 distill shards/ --teacher-cache cache/ --student preset:nano --epochs 3
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from l4cli import terminal
from l4cli.commands import shard_training as shared
from l4cli.commands import training_options as train
from l4cli.commands.distill_students import (
    Cut,
    Defaults,
    Student,
    parse_alpha,
    parse_students,
    parse_teacher,
)
from l4cli.commands.options import LENGTHS, Device, DeviceOption, Json, Quiet, Seed, parse_number
from l4cli.errors import UsageError

_STUDENT = "Students"
_LOSS = "Loss"
_CACHE = "Cache"


class LossKind(StrEnum):
    """Which targets a student learns from."""

    hard = "hard"
    soft = "soft"
    hybrid = "hybrid"


class HardTargets(StrEnum):
    """What the hard target of a token is."""

    data = "data"
    teacher = "teacher"


def distill(
    shards: Annotated[
        list[str], typer.Argument(help="folders of packed shards, each perhaps with `:WEIGHT`")
    ],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="checkpoint whose predictions are learned from")
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            "--student",
            metavar="WHAT[,key=value...]",
            help="preset:NAME, a checkpoint, a config.json or `teacher`; once for each",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="run folder; of several students each has one below it"),
    ] = None,
    init_from_teacher: Annotated[
        bool, typer.Option("--init-from-teacher", help="first weights are cut from the teacher's")
    ] = False,
    codistill: Annotated[
        bool,
        typer.Option("--codistill", help="train the teacher, too, from the data: preset or shape"),
    ] = False,
    burn_in: Annotated[
        float,
        typer.Option(
            "--burn-in", min=0.0, max=1.0, help="share of the steps before the teacher counts"
        ),
    ] = 0.0,
    write_cache: Annotated[
        Path | None,
        typer.Option("--write-cache", help="write what the teacher predicts there, train nothing"),
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option("--teacher-cache", help="learn from a cache, without the teacher")
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="likeliest tokens in a cache, beside the true one")
    ] = 15,
    tail_samples: Annotated[
        int, typer.Option("--tail-samples", min=0, help="tokens drawn from all the others")
    ] = 16,
    loss: Annotated[
        LossKind, typer.Option("--loss", help="hard, soft, or hybrid: both")
    ] = LossKind.hybrid,
    alpha: Annotated[
        str | None,
        typer.Option(
            "--alpha",
            metavar="SHARE",
            help="of soft targets in hybrid: 0.9, 0.1..0.9 over the steps, lr:0.9 or token:0.9; "
            "hard ones have the rest  [default: hard + F * soft]",
        ),
    ] = None,
    scaling_factor: Annotated[
        float | None, typer.Option("--scaling-factor", help="F: soft targets count times this")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="of both softmaxes of the soft targets")
    ] = 1.0,
    hard_targets: Annotated[
        HardTargets, typer.Option("--hard-targets", help="the data's, or the teacher's likeliest")
    ] = HardTargets.data,
    match_weight: Annotated[
        float,
        typer.Option("--match-weight", min=0.0, help="of the distance between hidden states"),
    ] = 0.0,
    steps: train.Steps = None,
    tokens: train.Tokens = None,
    epochs: train.Epochs = None,
    seq_len: train.SeqLen = None,
    batch_size: train.BatchSize = 16,
    micro_batch_size: train.MicroBatchSize = None,
    lr: train.Lr = None,
    min_lr: train.MinLr = 0.0,
    warmup: train.Warmup = None,
    schedule: train.ScheduleOption = train.ScheduleKind.wsd,
    decay_frac: train.DecayFrac = 0.2,
    decay_shape: train.DecayShapeOption = train.DecayShape.sqrt,
    weight_decay: train.WeightDecay = 0.1,
    clip_grad: train.ClipGrad = 1.0,
    optim: train.OptimOption = train.Optim.muon,
    dtype: train.DtypeOption = train.Dtype.fp32,
    balance: train.BalanceOption = train.BalanceKind.both,
    balance_rate: train.BalanceRate = 1e-3,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="less memory, a third more time")
    ] = False,
    save_every: train.SaveEvery = None,
    keep: train.Keep = 2,
    eval_every: train.EvalEvery = None,
    eval_data: train.EvalData = None,
    log_every: train.LogEvery = 10,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    fresh: train.Fresh = False,
    dry_run: train.DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    request = Request(**locals())
    terminal.configure(json=json, quiet=quiet)
    request.check()
    if write_cache is not None:
        from l4cli.commands.distill_cache import write

        write(request)
    else:
        from l4cli.commands.distill_run import run

        run(request)


@dataclass(frozen=True)
class Request:
    """What the command line said; the fields are the parameters of `distill`."""

    shards: list[str]
    teacher: str | None
    student: list[str] | None
    out: Path | None
    init_from_teacher: bool
    codistill: bool
    burn_in: float
    write_cache: Path | None
    teacher_cache: Path | None
    top_k: int
    tail_samples: int
    loss: LossKind
    alpha: str | None
    scaling_factor: float | None
    temperature: float
    hard_targets: HardTargets
    match_weight: float
    steps: int | None
    tokens: str | None
    epochs: float | None
    seq_len: str | None
    batch_size: int
    micro_batch_size: int | None
    lr: float | None
    min_lr: float
    warmup: int | None
    schedule: train.ScheduleKind
    decay_frac: float
    decay_shape: train.DecayShape
    weight_decay: float
    clip_grad: float
    optim: train.Optim
    dtype: train.Dtype
    balance: train.BalanceKind
    balance_rate: float
    activation_checkpointing: bool
    save_every: int | None
    keep: int
    eval_every: int | None
    eval_data: Path | None
    log_every: int
    seed: int
    device: Device
    fresh: bool
    dry_run: bool
    json: bool
    quiet: bool

    @property
    def row_tokens(self) -> int | None:
        if self.seq_len is None:
            return None
        return parse_number(self.seq_len, "--seq-len", "4k", LENGTHS)

    @property
    def length(self) -> train.Length:
        return train.Length(self.steps, self.tokens, self.epochs)

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / "distill"

    @property
    def students(self) -> list[Student]:
        """Every `--student`, read."""
        defaults = Defaults(
            loss=self.loss.value,
            alpha=self.alpha,
            factor=self.scaling_factor,
            temperature=self.temperature,
            hard_targets=self.hard_targets.value,
            match_weight=self.match_weight,
            burn_in=self.burn_in,
            cut=Cut() if self.init_from_teacher else None,
        )
        return parse_students(self.student or [], defaults)

    @property
    def new_teacher(self) -> Student | None:
        """The teacher's shape and options where it is in training, too."""
        return parse_teacher(self.teacher) if self.codistill and self.teacher else None

    def rate_of(self, student: Student) -> train.LearningRate:
        """The options of a student's learning rate."""
        own = student.training
        return train.LearningRate(
            own.get("lr", self.lr),
            own.get("min_lr", self.min_lr),
            own.get("warmup", self.warmup),
            own.get("schedule", self.schedule),
            own.get("decay_frac", self.decay_frac),
            self.decay_shape,
        )

    def recipe_of(self, student: Student) -> shared.Recipe:
        """How a student is trained."""
        own = student.training
        return shared.Recipe(
            optim=own.get("optim", self.optim).value,
            dtype=self.dtype.value,
            weight_decay=own.get("weight_decay", self.weight_decay),
            clip_grad=self.clip_grad,
            balance=own.get("balance", self.balance).value,
            balance_rate=self.balance_rate,
            activation_checkpointing=self.activation_checkpointing,
            seed=self.seed,
            save_every=self.save_every,
            keep=self.keep,
            eval_every=self.eval_every,
            log_every=self.log_every,
        )

    def check(self) -> None:
        """Refuse what needs no look at any file."""
        train.require_one_rank()
        self.length.check()
        if not 0 < self.temperature < float("inf"):
            why = "logits are divided by it"
            raise UsageError(
                f"cannot use `--temperature {self.temperature:g}`", why=why, fix="`--temperature 2`"
            )
        if self.scaling_factor is not None and not 0 < self.scaling_factor < float("inf"):
            raise UsageError(
                f"cannot use `--scaling-factor {self.scaling_factor:g}`",
                why="soft targets count times this",
                fix="`--scaling-factor 1`, or `--loss hard` without soft targets",
            )
        if self.alpha is not None:
            parse_alpha(self.alpha)
        self._check_teacher()
        if self.write_cache is not None:
            self._check_writing()
            return
        students = self.students
        if not students:
            why = "nothing would be trained"
            fix = "add `--student preset:nano`, or `--write-cache CACHE`"
            raise UsageError("no student given", why=why, fix=fix)
        for student in students:
            self.rate_of(student).check()
            self._check_needs(student)

    def _check_teacher(self) -> None:
        """One source of targets, and what it can be combined with."""
        if self.teacher is not None and self.teacher_cache is not None:
            why = "both say what the teacher predicts"
            raise UsageError(
                "`--teacher` and `--teacher-cache` given", why=why, fix="give one of them"
            )
        if self.codistill and self.teacher is None:
            why = "`--codistill` trains a teacher"
            raise UsageError("no teacher given", why=why, fix="add `--teacher preset:mini`")
        if self.burn_in and not self.codistill:
            why = "a teacher that is not in training has nothing to learn first"
            raise UsageError(
                f"cannot use `--burn-in {self.burn_in:g}`", why=why, fix="leave it out"
            )

    def _check_writing(self) -> None:
        given = {
            "--student": self.student,
            "--codistill": self.codistill,
            "--steps": self.steps,
            "--tokens": self.tokens,
            "--epochs": self.epochs,
            "--eval-data": self.eval_data,
            "--out": self.out,
        }
        for name, value in given.items():
            if value:
                why = "`--write-cache` trains nothing"
                fix = "write the cache first, then train from it with `--teacher-cache`"
                raise UsageError(f"`{name}` and `--write-cache` given", why=why, fix=fix)
        if self.teacher is None:
            why = "a cache holds what a teacher predicts"
            raise UsageError("no teacher given", why=why, fix="add `--teacher CHECKPOINT`")

    def _check_needs(self, student: Student) -> None:
        """Refuse a student that needs more of a teacher than there is."""
        has_model = self.teacher is not None
        what = f"the student `{student.name}` cannot be trained like this"
        if student.cut is not None and (not has_model or self.codistill):
            why = "its first weights are to be cut from a teacher that is trained already"
            raise UsageError(what, why=why, fix="add `--teacher CHECKPOINT`")
        if student.loss.match_weight and not has_model:
            why = (
                "hidden states are matched with those of a teacher that runs, and a cache has none"
            )
            raise UsageError(what, why=why, fix="add `--teacher CHECKPOINT`")
        if student.loss.needs_teacher and not has_model and self.teacher_cache is None:
            why = "it learns from a teacher's predictions, and no teacher is given"
            fix = "add `--teacher CHECKPOINT` or `--teacher-cache CACHE`, or use `--loss hard`"
            raise UsageError(what, why=why, fix=fix)
