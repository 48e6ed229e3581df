"""A training run on packed shards, the same for every command that makes one.

in: how to train, opened shards, a config, a schedule; out: a plan, an identity, a `Loop`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands import training_options as train
from l4cli.commands.options import LENGTHS, Device, parse_number
from l4cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from l4cli.checkpoint import RunFolder
    from l4cli.data.loader import ShardSource
    from l4cli.data.shards import ShardSet
    from l4cli.model import Llama4Config
    from l4cli.planning import TrainingPlan
    from l4cli.training.loop import Evaluation, Loop, LoopOptions
    from l4cli.training.schedule import Schedule
    from l4cli.training.trainee import Trainee


@dataclass(frozen=True)
class Recipe:
    """How to train, apart from the data, the shape and the schedule."""

    optim: str
    dtype: str
    weight_decay: float
    clip_grad: float
    balance: str
    balance_rate: float
    activation_checkpointing: bool
    seed: int
    save_every: int | None
    keep: int
    eval_every: int | None
    log_every: int
    freeze: str | None = None

    def settings(self) -> dict[str, Any]:
        """What the weights do not depend on; for `run.toml`."""
        names = ("save_every", "keep", "eval_every", "log_every")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TrainingRequest:
    """What a command line says of training on packed shards; the fields are its parameters."""

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

    def rate_of(self, own: Mapping[str, Any]) -> train.LearningRate:
        """The options of a learning rate; `own`: what one model has instead of them."""
        return train.LearningRate(
            own.get("lr", self.lr),
            own.get("min_lr", self.min_lr),
            own.get("warmup", self.warmup),
            own.get("schedule", self.schedule),
            own.get("decay_frac", self.decay_frac),
            self.decay_shape,
        )

    def recipe_of(self, own: Mapping[str, Any], freeze: str | None = None) -> Recipe:
        """How to train; `own`: what one model has instead of the command's options."""
        return Recipe(
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
            freeze=freeze,
        )


@dataclass(frozen=True)
class Prepared:
    """What follows from the request and the data, before anything large is allocated."""

    source: ShardSource
    held_out: ShardSet | None
    config: Llama4Config
    schedule: Schedule
    plan: TrainingPlan
    device: torch.device


def passes_at_once(config: Llama4Config, device: torch.device) -> int:
    """How many micro-batches of this model run at once here."""
    from l4cli.model import count_parameters
    from l4cli.training.device import num_threads
    from l4cli.training.passes import num_at_once

    return num_at_once(count_parameters(config).total, device, num_threads())


def check_fp8(config: Llama4Config, device: torch.device) -> None:
    """Say where fp8 is only emulated. raises: UsageError where it cannot be computed at all"""
    import torch

    from l4cli.ops.fp8 import BLOCK, FP8_EXPERTS

    text, fix = config.text, "`--dtype bf16`"
    what = "cannot use `--dtype fp8`"
    if not any(text.is_moe(i) for i in range(text.num_hidden_layers)):
        raise UsageError(what, why="experts compute in it, and the model has none", fix=fix)
    widths = (text.hidden_size, text.intermediate_size)
    if any(width % BLOCK for width in widths):
        why = f"the widths {widths[0]} and {widths[1]} of experts are not both multiples of {BLOCK}"
        raise UsageError(what, why=why, fix=fix)
    version, reason = FP8_EXPERTS.choose(device, torch.bfloat16)
    if version.name == "reference":
        terminal.say(f"`--dtype fp8` is emulated here, slower than bf16: {reason}")


def plan_run(
    recipe: Recipe,
    config: Llama4Config,
    source: ShardSource,
    device: torch.device,
    *,
    name: str,
    must_fit: bool,
) -> TrainingPlan:
    """Work out what the run needs, and refuse to begin one that does not fit."""
    from l4cli.planning import plan_training, require_training_fits

    if recipe.dtype == "fp8":
        check_fp8(config, device)
    shape: dict[str, Any] = {
        "optim": recipe.optim,
        "dtype": recipe.dtype,
        "micro_batch_size": source.micro_batch_size,
        "seq_len": source.seq_len,
        "checkpoint_layers": recipe.activation_checkpointing,
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
    if must_fit:
        require_training_fits(plan, name, **shape)
    return plan


def identity(
    recipe: Recipe, prepared: Prepared, *, warmup: int | None, **more: Any
) -> dict[str, Any]:
    """Everything the weights depend on. The length is compared apart: more steps are welcome."""
    from l4cli.training import data_setup, model_setup

    source, schedule = prepared.source, prepared.schedule
    return {
        "data": data_setup.identity(source),
        "seed": recipe.seed,
        "batch_size": source.batch_size,
        "micro_batch_size": source.micro_batch_size,
        "lr": schedule.peak_lr,
        "min_lr": schedule.min_lr,
        "warmup": warmup,  # None follows the number of steps
        "schedule": schedule.kind,
        "decay_frac": schedule.decay_frac,
        "decay_shape": schedule.decay_shape,
        "weight_decay": recipe.weight_decay,
        "clip_grad": recipe.clip_grad,
        "optim": recipe.optim,
        "dtype": recipe.dtype,
        "balance": recipe.balance,
        "balance_rate": recipe.balance_rate,
        "freeze": recipe.freeze,
        "activation_checkpointing": recipe.activation_checkpointing,
        **more,
        **model_setup.identity(prepared.config),
    }


def build_loop(recipe: Recipe, prepared: Prepared, folder: RunFolder) -> Loop:
    """Make the model with its first weights, and the loop that trains it."""
    from l4cli.planning import gemm_rate
    from l4cli.training.loop import Loop
    from l4cli.training.objectives.language_model import LanguageModel

    trainee = new_trainee(recipe, prepared, folder)
    return Loop(
        [trainee],
        prepared.source,
        LanguageModel(),
        loop_options(recipe, prepared.schedule.num_steps),
        prepared.device,
        passes_at_once=prepared.source.passes_at_once,
        evaluations=[evaluation(trainee, prepared)] if prepared.held_out else [],
        flops_per_token=prepared.plan.flops_per_token,
        flops_per_tile=prepared.plan.flops_per_tile,
        peak_flops=gemm_rate(recipe.dtype, str(prepared.device)),
    )


def new_trainee(
    recipe: Recipe, prepared: Prepared, folder: RunFolder, name: str = "", extra: Any = None
) -> Trainee:
    """A model with its first weights, its optimizer and schedule."""
    from l4cli.training.balance import BalanceOptions
    from l4cli.training.optim import OptimizerOptions
    from l4cli.training.trainee import TraineeOptions, build_trainee

    options = TraineeOptions(
        optimizer=OptimizerOptions(recipe.optim, weight_decay=recipe.weight_decay),
        balance=BalanceOptions(recipe.balance, recipe.balance_rate),
        dtype=recipe.dtype,
        freeze=recipe.freeze,
        activation_checkpointing=recipe.activation_checkpointing,
    )
    return build_trainee(
        prepared.config,
        options,
        prepared.schedule,
        folder,
        prepared.source,
        device=prepared.device,
        seed=recipe.seed,
        name=name,
        extra=extra,
    )


def loop_options(recipe: Recipe, num_steps: int) -> LoopOptions:
    """How often to save, to evaluate and to write a line."""
    from l4cli.training.loop import LoopOptions

    every = train.default_interval(num_steps)
    return LoopOptions(
        num_steps,
        clip_grad=recipe.clip_grad,
        save_every=every if recipe.save_every is None else recipe.save_every,
        keep=recipe.keep,
        eval_every=every if recipe.eval_every is None else recipe.eval_every,
        log_every=recipe.log_every,
    )


def evaluation(trainee: Trainee, prepared: Prepared) -> Evaluation:
    """Measure a model in training on the held-out shards."""
    from l4cli.data.loader import eval_batches
    from l4cli.evals.bits_per_byte import held_out

    shards, source = prepared.held_out, prepared.source
    chunk = prepared.config.text.attention_chunk_size
    token_bytes = source.tokenizer().num_bytes()
    prefix = f"{trainee.name}/" if trainee.name else ""
    assert shards is not None

    def evaluate(between_batches: Callable[[], None]) -> dict[str, float]:
        batches = eval_batches(shards, source.micro_batch_size, chunk)
        found = held_out(trainee.model, batches, token_bytes, between_batches)
        return {
            f"{prefix}bits_per_byte": found.bits_per_byte,
            f"{prefix}eval_loss": found.loss,
        }

    return evaluate
