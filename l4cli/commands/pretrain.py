"""Train a model on packed shards: text, or text and pictures, from scratch or from a checkpoint.

The same command again continues where the run was cut off, bit for bit; a finished run says so.
More `--steps` continue it on the schedule of the new total. Ctrl-C or SIGTERM finish the step,
save and leave (a second one stops at once).

examples:
  l4 pretrain shards/ --preset nano
  l4 pretrain code/:0.3 web/:0.7 --preset mini --tokens 50M --eval-data held-out/ -o runs/mini
  l4 pretrain shards/ --preset nano --set num_local_experts=16 --steps 1000 --dry-run
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4cli import terminal
from l4cli.commands import training_options as train
from l4cli.commands import training_report as report
from l4cli.commands.options import LENGTHS, Device, DeviceOption, Json, Quiet, Seed, parse_number
from l4cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from l4cli.checkpoint import RunFolder
    from l4cli.data.loader import ShardSource
    from l4cli.data.shards import ShardSet
    from l4cli.model import Llama4Config
    from l4cli.planning import TrainingPlan
    from l4cli.training.loop import Evaluation, Loop
    from l4cli.training.schedule import Schedule


class Freeze(StrEnum):
    """Which half keeps its weights; the projector between them always learns."""

    text = "text"
    vision = "vision"


class BalanceKind(StrEnum):
    """What keeps the experts equally busy."""

    bias = "bias"
    loss = "loss"
    both = "both"
    none = "none"


def pretrain(
    shards: Annotated[
        list[str], typer.Argument(help="folders of packed shards, each perhaps with `:WEIGHT`")
    ],
    preset: Annotated[
        str | None, typer.Option("--preset", help="shape of the model  [default: nano]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="shape from a Hugging Face `config.json`")
    ] = None,
    set_: train.Set = None,
    init_from: train.InitFrom = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="run folder  [default: runs/PRESET]")
    ] = None,
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
    balance: Annotated[
        BalanceKind, typer.Option("--balance", help="what keeps the experts equally busy")
    ] = BalanceKind.both,
    balance_rate: Annotated[
        float, typer.Option("--balance-rate", min=0.0, help="change of the bias per step")
    ] = 1e-3,
    freeze: Annotated[
        Freeze | None, typer.Option("--freeze", help="keep the weights of one half")
    ] = None,
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
    prepared = prepare(request)
    if dry_run:
        report.show_dry_run(
            prepared.plan, prepared.source, prepared.schedule, dtype.value, prepared.device
        )
    else:
        run(request, prepared)


@dataclass(frozen=True)
class Request:
    """What the command line said; the fields are the parameters of `pretrain`."""

    shards: list[str]
    preset: str | None
    config: Path | None
    set_: list[str] | None
    init_from: Path | None
    out: Path | None
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
    balance: BalanceKind
    balance_rate: float
    freeze: Freeze | None
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
    def rate(self) -> train.LearningRate:
        return train.LearningRate(
            self.lr, self.min_lr, self.warmup, self.schedule, self.decay_frac, self.decay_shape
        )

    @property
    def model_name(self) -> str:
        return str(self.config or self.init_from or self.preset or "nano")

    @property
    def sets_vocab_size(self) -> bool:
        """Whether `--set` names the size, so that it does not follow the tokenizer."""
        return any(word.split("=")[0].endswith("vocab_size") for word in self.set_ or [])

    @property
    def folder(self) -> Path:
        has_own_shape = self.config is not None or self.init_from is not None
        return self.out or Path("runs") / ("pretrain" if has_own_shape else self.model_name)

    def check(self) -> None:
        """Refuse what needs no look at any file."""
        train.require_one_rank()
        shapes = {"--preset": self.preset, "--config": self.config, "--init-from": self.init_from}
        given = [f"`{name}`" for name, value in shapes.items() if value is not None]
        if len(given) > 1:
            why = "each brings a shape of its own"
            raise UsageError(" and ".join(given) + " given", why=why, fix="give one of them")
        self.length.check()
        self.rate.check()


@dataclass(frozen=True)
class Prepared:
    """What follows from the request and the data, before anything large is allocated."""

    source: ShardSource
    held_out: ShardSet | None
    config: Llama4Config
    schedule: Schedule
    plan: TrainingPlan
    device: torch.device


def prepare(request: Request) -> Prepared:
    """Open the data, make the config, refuse what cannot work."""
    from l4cli.model import count_parameters
    from l4cli.training import data_setup, model_setup
    from l4cli.training.device import num_threads, torch_device
    from l4cli.training.passes import num_at_once

    device = torch_device(request.device.value)
    config = model_setup.base_config(request.preset, request.config, request.init_from)
    config = model_setup.apply_overrides(config, request.set_ or [])
    if request.freeze and config.vision is None:
        why = "the model has no vision, so nothing of it would be left to train apart"
        raise UsageError(f"cannot use `--freeze {request.freeze}`", why=why, fix="leave it out")
    source = data_setup.open_source(
        request.shards,
        seq_len=request.row_tokens,
        batch_size=request.batch_size,
        micro_batch_size=request.micro_batch_size,
        seed=request.seed,
        attention_chunk_size=config.text.attention_chunk_size,
        passes_at_once=num_at_once(count_parameters(config).total, device, num_threads()),
    )
    if request.freeze is Freeze.text and not source.num_media:
        why = "the shards hold no pictures, so nothing would learn"
        raise UsageError("cannot use `--freeze text`", why=why, fix="leave it out")
    if request.init_from is not None:
        model_setup.require_same_tokenizer(request.init_from, source.tokenizer())
    name = request.model_name
    grows = name in model_setup.GROWING_PRESETS and not request.sets_vocab_size
    config = model_setup.fit_vocabulary(config, source.tokenizer(), name=name, grows=grows)
    data_setup.require_geometry(config, source.datasets)
    data_setup.require_context(config, source.seq_len)
    if request.init_from is not None:
        model_setup.require_weights(request.init_from, config, changed=request.set_ or [])
    plan = _plan(request, config, source, device)
    held_out = None
    if request.eval_data is not None:
        held_out = data_setup.open_held_out(request.eval_data, source, config)
    num_steps = request.length.num_steps(source.num_rows, source.batch_size, source.seq_len)
    schedule = request.rate.for_steps(num_steps, config.text.hidden_size)
    return Prepared(source, held_out, config, schedule, plan, device)


def _plan(
    request: Request, config: Llama4Config, source: ShardSource, device: torch.device
) -> TrainingPlan:
    """Work out what the run needs, and refuse to begin one that does not fit."""
    from l4cli.planning import plan_training, require_training_fits

    shape: dict[str, Any] = {
        "optim": request.optim.value,
        "dtype": request.dtype.value,
        "micro_batch_size": source.micro_batch_size,
        "seq_len": source.seq_len,
        "checkpoint_layers": request.activation_checkpointing,
    }
    num_documents = sum(shards.index["num_documents"] for shards in source.datasets)
    plan = plan_training(
        config,
        batch_size=source.batch_size,
        mean_document_length=source.num_tokens / max(1, num_documents),
        # A picture is one tile or more; how many shows only when it is decoded.
        tiles=round(source.num_media / source.num_rows * source.micro_batch_size),
        passes_at_once=source.passes_at_once,
        device=str(device),
        **shape,
    )
    if not request.dry_run:
        require_training_fits(plan, request.model_name, **shape)
    return plan


def run(request: Request, prepared: Prepared) -> None:
    """Train, from the beginning or from where the folder's run stands."""
    from l4cli.checkpoint import load_weights
    from l4cli.training.device import make_repeatable
    from l4cli.training.run import Run

    make_repeatable(request.seed, prepared.device)
    options = _identity(request, prepared)
    settings = {
        "data_paths": request.shards,
        "eval_data": None if request.eval_data is None else str(request.eval_data),
        "save_every": request.save_every,
        "keep": request.keep,
        "eval_every": request.eval_every,
        "log_every": request.log_every,
    }
    training = Run(
        "pretrain",
        request.folder,
        options,
        settings,
        prepared.schedule.num_steps,
        prepared.device,
        fresh=request.fresh,
    )

    def start(loop: Loop) -> None:
        if request.init_from is not None:
            load_weights(loop.trainees[0].model, request.init_from)

    report.describe(request.model_name, prepared.plan, prepared.source, prepared.schedule)
    terminal.say(
        f"{request.optim.value}, {request.dtype.value}, {prepared.device.type}; "
        f"run folder `{request.folder}`"
    )
    try:
        training.train(lambda folder: _build_loop(request, prepared, folder), start)
    finally:
        prepared.source.close()


def _identity(request: Request, prepared: Prepared) -> dict[str, Any]:
    """Everything the weights depend on. The length is compared apart: more steps are welcome."""
    from l4cli.training import data_setup, model_setup

    source, schedule = prepared.source, prepared.schedule
    return {
        "data": data_setup.identity(source),
        "seed": request.seed,
        "batch_size": source.batch_size,
        "micro_batch_size": source.micro_batch_size,
        "lr": schedule.peak_lr,
        "min_lr": schedule.min_lr,
        "warmup": request.warmup,  # None follows the number of steps
        "schedule": schedule.kind,
        "decay_frac": schedule.decay_frac,
        "decay_shape": schedule.decay_shape,
        "weight_decay": request.weight_decay,
        "clip_grad": request.clip_grad,
        "optim": request.optim.value,
        "dtype": request.dtype.value,
        "balance": request.balance.value,
        "balance_rate": request.balance_rate,
        "freeze": request.freeze.value if request.freeze else None,
        "activation_checkpointing": request.activation_checkpointing,
        "init_from": str(request.init_from) if request.init_from else None,
        **model_setup.identity(prepared.config),
    }


def _build_loop(request: Request, prepared: Prepared, folder: RunFolder) -> Loop:
    from l4cli.planning import gemm_rate
    from l4cli.training.balance import BalanceOptions
    from l4cli.training.loop import Loop, LoopOptions
    from l4cli.training.objectives.language_model import LanguageModel
    from l4cli.training.optim import OptimizerOptions
    from l4cli.training.trainee import TraineeOptions, build_trainee

    config, device, source = prepared.config, prepared.device, prepared.source
    options = TraineeOptions(
        optimizer=OptimizerOptions(request.optim.value, weight_decay=request.weight_decay),
        balance=BalanceOptions(request.balance.value, request.balance_rate),
        dtype=request.dtype.value,
        freeze=request.freeze.value if request.freeze else None,
        activation_checkpointing=request.activation_checkpointing,
    )
    trainee = build_trainee(
        config, options, prepared.schedule, folder, source, device=device, seed=request.seed
    )
    num_steps = prepared.schedule.num_steps
    every = train.default_interval(num_steps)
    return Loop(
        [trainee],
        source,
        LanguageModel(),
        LoopOptions(
            num_steps,
            clip_grad=request.clip_grad,
            save_every=every if request.save_every is None else request.save_every,
            keep=request.keep,
            eval_every=every if request.eval_every is None else request.eval_every,
            log_every=request.log_every,
        ),
        device,
        passes_at_once=source.passes_at_once,
        evaluations=[_evaluation(trainee.model, prepared)] if prepared.held_out else [],
        flops_per_token=prepared.plan.flops_per_token,
        flops_per_tile=prepared.plan.flops_per_tile,
        peak_flops=gemm_rate(request.dtype.value, str(device)),
    )


def _evaluation(model: Any, prepared: Prepared) -> Evaluation:
    from l4cli.data.loader import eval_batches
    from l4cli.evals.bits_per_byte import held_out

    shards, source = prepared.held_out, prepared.source
    chunk = prepared.config.text.attention_chunk_size
    token_bytes = source.tokenizer().num_bytes()
    assert shards is not None

    def evaluate(between_batches: Callable[[], None]) -> dict[str, float]:
        batches = eval_batches(shards, source.micro_batch_size, chunk)
        found = held_out(model, batches, token_bytes, between_batches)
        return {"bits_per_byte": found.bits_per_byte, "eval_loss": found.loss}

    return evaluate
