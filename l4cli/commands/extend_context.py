"""Train a model further on longer and longer rows, and teach it to use them.

Each stage is a run of its own in `OUT/stage-N-LENGTH/`, from the checkpoint of the stage before:
weights and optimizer state carry over, the learning rate warms up again and decays. Token
streams are packed to each stage's length, long documents apart from short ones. Whatever is
changed to stretch the model stands in its `config.json`. The same command again continues where
it was cut off; `OUT/latest` is the last checkpoint.

Documents can be made as well: needles and other lessons (`--synthetic`), or questions that a
model writes about passages of the streams (`--synthetic-from`), kept when it answers them with
the passage and not without. `--mix-schedule FILE` gives every stage its own shares: a table
`[data]` of names and streams, then `[stages.1]`, `[stages.2]`, ... of names (and `synthetic`) and
shares.

examples:
  l4 extend-context runs/nano/latest books.tokens --stages 2k:5M,8k:20M -o runs/nano-8k
  l4 extend-context runs/nano books.tokens:0.8 code.tokens:0.2 --stages 8k:20M --floor-scale 512
  l4 extend-context runs/nano books.tokens --stages 4k:5M --synthetic all --hard 0.5 --gate 0.95
  l4 extend-context runs/nano books.tokens --stages 4k:5M --synthetic-from runs/chat/latest
  l4 extend-context runs/nano books.tokens --stages 4k:2M,16k:4M --rope-scaling yarn --dry-run
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from l4cli import terminal
from l4cli.commands import extend_options as extend
from l4cli.commands import extend_stages as staged
from l4cli.commands import shard_training as shared
from l4cli.commands import training_options as train
from l4cli.commands.extend_gate import Gate
from l4cli.commands.extend_mix import Mix, mix_of_words, read_schedule
from l4cli.commands.extend_questions import Writer
from l4cli.commands.extend_synthetic import Needles, Synthetic
from l4cli.commands.longcontext_options import (
    HaystackOption,
    KeysOption,
    NeedleOption,
    QuestionOption,
    ValuesOption,
)
from l4cli.commands.options import LENGTHS, Device, DeviceOption, Json, Quiet, Seed, parse_number
from l4cli.errors import UsageError
from l4cli.training.stages import Changes

NEEDLE_OPTIONS = ("haystack", "needle", "question", "keys", "values")
# By option, what the writer calls it.
WRITER_OPTIONS = {
    "passages": "num_passages",
    "model": "model",
    "api_key_env": "api_key_env",
    "jobs": "num_jobs",
    "max_tokens": "max_tokens",
}
CHECKPOINTED_LENGTH = 8192  # from here on activations are computed twice unless told otherwise


def extend_context(
    checkpoint: Annotated[Path, typer.Argument(help="the model to extend: a folder, or its run")],
    streams: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STREAM", help="what `l4 tokenize` wrote, each perhaps with `:WEIGHT`"
        ),
    ] = None,
    *,
    stages: extend.Stages,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of all stages")] = Path(
        "runs/extend-context"
    ),
    batch_tokens: extend.BatchTokens = None,
    long_fraction: extend.LongFraction = 0.7,
    mix_schedule: extend.MixSchedule = None,
    synthetic: extend.SyntheticOption = None,
    synthetic_fraction: extend.SyntheticFraction = None,
    hard: extend.Hard = None,
    synthetic_from: extend.SyntheticFrom = None,
    passages: extend.Passages = None,
    model: extend.ModelName = None,
    api_key_env: extend.ApiKeyEnv = None,
    jobs: extend.Jobs = None,
    max_tokens: extend.MaxTokens = None,
    haystack: HaystackOption = None,
    needle: NeedleOption = None,
    question: QuestionOption = None,
    keys: KeysOption = None,
    values: ValuesOption = None,
    gate: extend.GateOption = None,
    attn_scale: extend.AttnScale = None,
    floor_scale: extend.FloorScale = None,
    temperature: extend.Temperature = None,
    scalable_softmax: extend.ScalableSoftmax = False,
    attention_chunk_size: extend.ChunkSize = None,
    rope_theta: extend.RopeTheta = None,
    rope_scaling: extend.RopeScaling = None,
    rope_scope: extend.RopeScopeOption = extend.RopeScope.all,
    trained_length: extend.TrainedLength = None,
    set_: train.Set = None,
    lr: extend.StageLr = None,
    min_lr: train.MinLr = 0.0,
    warmup: train.Warmup = None,
    schedule: train.ScheduleOption = train.ScheduleKind.wsd,
    decay_frac: train.DecayFrac = 0.4,
    decay_shape: train.DecayShapeOption = train.DecayShape.linear,
    reset_optimizer: extend.ResetOptimizer = False,
    optim: Annotated[
        train.Optim | None,
        typer.Option("--optim", help="of the hidden matrices  [default: the checkpoint's]"),
    ] = None,
    weight_decay: train.WeightDecay = 0.1,
    clip_grad: train.ClipGrad = 1.0,
    dtype: train.DtypeOption = train.Dtype.fp32,
    balance: train.BalanceOption = train.BalanceKind.both,
    balance_rate: train.BalanceRate = 1e-3,
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--activation-checkpointing/--no-activation-checkpointing",
            help="less memory, a third more time  [default: from 8k on]",
        ),
    ] = None,
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
    job = request.job()
    if dry_run:
        staged.show_plan(job)
    else:
        staged.extend(job)


@dataclass(frozen=True)
class Request:
    """What the command line said; the fields are the parameters of `extend_context`."""

    checkpoint: Path
    streams: list[str] | None
    stages: str
    out: Path
    batch_tokens: str | None
    long_fraction: float
    mix_schedule: Path | None
    synthetic: str | None
    synthetic_fraction: float | None
    hard: float | None
    synthetic_from: str | None
    passages: int | None
    model: str | None
    api_key_env: str | None
    jobs: int | None
    max_tokens: int | None
    haystack: list[str] | None
    needle: str | None
    question: str | None
    keys: str | None
    values: str | None
    gate: float | None
    attn_scale: float | None
    floor_scale: float | None
    temperature: bool | None
    scalable_softmax: bool
    attention_chunk_size: str | None
    rope_theta: float | None
    rope_scaling: str | None
    rope_scope: extend.RopeScope
    trained_length: str | None
    set_: list[str] | None
    lr: str | None
    min_lr: float
    warmup: int | None
    schedule: train.ScheduleKind
    decay_frac: float
    decay_shape: train.DecayShape
    reset_optimizer: bool
    optim: train.Optim | None
    weight_decay: float
    clip_grad: float
    dtype: train.Dtype
    balance: train.BalanceKind
    balance_rate: float
    activation_checkpointing: bool | None
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

    def job(self) -> staged.Job:
        """Refuse what needs no look at any file; give what is to be done."""
        train.require_one_rank()
        trained_len = None
        if self.trained_length is not None:
            trained_len = parse_number(self.trained_length, "--trained-length", "512", LENGTHS)
            if trained_len < 2:
                what = f"cannot use `--trained-length {self.trained_length}`"
                why = "a model learns from rows of two tokens and more"
                raise UsageError(what, why=why, fix="write `--trained-length 512`")
        return staged.Job(
            checkpoint=self.checkpoint,
            out=self.out,
            stages=self._stages(),
            recipe=self._recipe(),
            optim=self.optim.value if self.optim else None,
            warmup=self.warmup,
            resets_optimizer=self.reset_optimizer,
            trained_len=trained_len,
            long_fraction=self.long_fraction,
            synthetic=self._synthetic(),
            writer=self._writer(),
            gate=None if self.gate is None else Gate(self.gate, self._needles, self.seed),
            eval_data=self.eval_data,
            device=self.device.value,
            fresh=self.fresh,
        )

    def _stages(self) -> list[staged.Wanted]:
        stages = extend.parse_stages(self.stages)
        rates = extend.one_per_stage(self.lr, "--lr", len(stages), extend.parse_rate)
        chunks = extend.one_per_stage(
            self.attention_chunk_size, "--attention-chunk-size", len(stages), extend.parse_chunk
        )
        rows = extend.rows_per_step(stages, self.batch_tokens)
        mixes = self._mixes(len(stages))
        changes = self._changes()
        wanted = []
        for stage, lr, chunk, mix, num_rows in zip(stages, rates, chunks, mixes, rows, strict=True):
            rate = train.LearningRate(
                lr, self.min_lr, self.warmup, self.schedule, self.decay_frac, self.decay_shape
            )
            rate.check()
            own = replace(changes, attention_chunk_size=chunk)
            checkpoints = self.activation_checkpointing
            if checkpoints is None:
                checkpoints = stage.seq_len >= CHECKPOINTED_LENGTH
            wanted.append(staged.Wanted(stage, own, rate, mix, num_rows, checkpoints))
        return wanted

    def _mixes(self, num_stages: int) -> list[Mix]:
        """What each stage reads."""
        has_synthetic = self._makes
        if self.mix_schedule is not None:
            other = self.streams[0] if self.streams else "--synthetic-fraction"
            if self.streams or self.synthetic_fraction is not None:
                why = "the schedule says what each stage reads"
                fix = f"leave `{other}` out, or name it in the schedule"
                raise UsageError(f"`{other}` and `--mix-schedule` given", why=why, fix=fix)
            return read_schedule(self.mix_schedule, num_stages, has_synthetic=has_synthetic)
        if not self.streams and not has_synthetic:
            raise UsageError(
                "no data to extend with",
                why="no token stream was named, and nothing is to be made",
                fix="name what `l4 tokenize FILES -o books.tokens` wrote, or "
                "`--synthetic retrieval`",
            )
        fraction = self.synthetic_fraction
        if fraction is None:
            fraction = extend.SYNTHETIC_FRACTION if has_synthetic else 0.0
        return [mix_of_words(self.streams or (), fraction)] * num_stages

    @property
    def _makes(self) -> bool:
        """Whether anything is made."""
        return self.synthetic is not None or self.synthetic_from is not None

    @property
    def _needles(self) -> Needles:
        return Needles(
            tuple(self.haystack or ()), self.needle, self.question, self.keys, self.values
        )

    def _synthetic(self) -> Synthetic | None:
        """What is to be made. raises: UsageError for options that mean nothing"""
        if self.synthetic is not None:
            made = Synthetic(self.synthetic, self._needles, self.hard or 0.0)
            made.check()
            return made
        given: dict[str, object] = {"hard": self.hard}
        if self.gate is None:
            given |= {name: getattr(self, name) for name in NEEDLE_OPTIONS}
        else:
            self._needles.format()
        if self.synthetic_from is None:
            given["synthetic-fraction"] = self.synthetic_fraction
        _refuse_given(given, "--synthetic", "add `--synthetic retrieval`")
        return None

    def _writer(self) -> Writer | None:
        """Which model writes questions. raises: UsageError for options that mean nothing"""
        given = {name: getattr(self, name) for name in WRITER_OPTIONS}
        if self.synthetic_from is None:
            _refuse_given(given, "--synthetic-from", "add `--synthetic-from CKPT`")
            return None
        if not self.streams and self.mix_schedule is None:
            why = "questions are written about passages of streams, and none is named"
            fix = "name what `l4 tokenize FILES -o books.tokens` wrote"
            raise UsageError("cannot use `--synthetic-from`", why=why, fix=fix)
        said = {WRITER_OPTIONS[name]: value for name, value in given.items() if value is not None}
        return Writer(self.synthetic_from, **said)

    def _changes(self) -> Changes:
        rope = None if self.rope_scaling is None else extend.parse_rope(self.rope_scaling)
        if self.rope_theta is not None and not 0 < self.rope_theta < math.inf:
            why = "a base is a number above 0"
            fix = "`--rope-theta 500000`"
            raise UsageError(f"cannot use `--rope-theta {self.rope_theta}`", why=why, fix=fix)
        if rope is not None and rope.kind == "ntk" and self.rope_theta is not None:
            why = "`--rope-scaling ntk` and `--rope-theta` both set the base"
            raise UsageError("two bases given", why=why, fix="give one of them")
        if self.rope_scope is extend.RopeScope.full and rope is None and self.rope_theta is None:
            why = "nothing of RoPE is changed"
            fix = "add `--rope-scaling yarn` or `--rope-theta X`"
            raise UsageError("cannot use `--rope-scope full`", why=why, fix=fix)
        return Changes(
            overrides=tuple(self.set_ or ()),
            attn_scale=self.attn_scale,
            floor_scale=self.floor_scale,
            temperature=self.temperature,
            rope_theta=self.rope_theta,
            rope=rope,
            only_full_rope=self.rope_scope is extend.RopeScope.full,
            scalable_softmax=self.scalable_softmax,
        )

    def _recipe(self) -> shared.Recipe:
        """How all stages train; each sets its own optimizer and checkpointing."""
        return shared.Recipe(
            optim="",
            dtype=self.dtype.value,
            weight_decay=self.weight_decay,
            clip_grad=self.clip_grad,
            balance=self.balance.value,
            balance_rate=self.balance_rate,
            activation_checkpointing=False,
            seed=self.seed,
            save_every=self.save_every,
            keep=self.keep,
            eval_every=self.eval_every,
            log_every=self.log_every,
        )


def _refuse_given(given: Mapping[str, object], needed: str, fix: str) -> None:
    """Refuse options that speak of what nobody asked for."""
    for name, value in given.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            why = "it speaks of documents that are made, and none are asked for"
            raise UsageError(f"`{option}` needs `{needed}`", why=why, fix=f"{fix}, or leave it out")
