"""The stages of an extension, one after the other, each a run of the one loop.

in: what was asked of every stage; out: a run folder a stage, `OUT/latest`, or the plan of all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands import shard_training as shared
from l4cli.commands import training_options as train
from l4cli.commands import training_report as report
from l4cli.commands.extend_gate import Gate
from l4cli.commands.extend_mix import Mix
from l4cli.commands.extend_questions import Writer
from l4cli.commands.extend_supply import Demands, Supply
from l4cli.commands.extend_synthetic import Synthetic
from l4cli.errors import L4Error
from l4cli.training.stages import Changes, Stage

if TYPE_CHECKING:
    import torch

    from l4cli.model import Llama4Config
    from l4cli.planning import TrainingPlan
    from l4cli.training.continuation import Origin
    from l4cli.training.run import Run
    from l4cli.training.schedule import Schedule

COMMAND = "extend-context"
LR_FRACTION = 0.75  # of the peak a checkpoint was trained with; what the study used


@dataclass(frozen=True)
class Wanted:
    """What is asked of one stage."""

    stage: Stage
    changes: Changes
    rate: train.LearningRate
    mix: Mix
    num_rows: int  # of a step
    activation_checkpointing: bool


@dataclass(frozen=True)
class Job:
    """What is asked of all of them."""

    checkpoint: Path
    out: Path
    stages: Sequence[Wanted]
    recipe: shared.Recipe  # without an optimizer's name
    optim: str | None
    warmup: int | None
    resets_optimizer: bool
    trained_len: int | None
    long_fraction: float
    synthetic: Synthetic | None
    writer: Writer | None
    gate: Gate | None
    eval_data: Path | None
    device: str
    fresh: bool


@dataclass(frozen=True)
class Ready:
    """A stage whose data is packed and whose model fits."""

    wanted: Wanted
    recipe: shared.Recipe
    prepared: shared.Prepared
    specs: Sequence[str]


@dataclass(frozen=True)
class Shape:
    """A stage's model and schedule, from the checkpoint and the options alone."""

    wanted: Wanted
    recipe: shared.Recipe
    config: Llama4Config
    schedule: Schedule


def extend(job: Job) -> None:
    """Pack the data of all stages, then train them in order.

    raises: UsageError when the folder holds something else or was begun with other options
    """
    from l4cli.checkpoint import RunFolder
    from l4cli.training import continuation, run_record
    from l4cli.training.device import make_repeatable, torch_device
    from l4cli.training.run import report_done

    origin, shapes = _shapes(job)
    supply = _checked_supply(job, origin)
    device = torch_device(job.device)
    run_record.require_usable(job.out, fresh=job.fresh)
    continuation.require_known_stages(job.out, [wanted.stage.name for wanted in job.stages])
    make_repeatable(job.recipe.seed, device)
    with RunFolder(job.out):
        around = run_record.environment(device)
        run_record.write_record(job.out, COMMAND, _described(job), around)
        supply.write_questions()
        ready = [_prepare(job, shape, supply, device) for shape in shapes]
        checkpoint = origin.folder
        try:
            for stage in ready:
                checkpoint = _train(job, stage, checkpoint, origin)
                if not _later_begun(job, stage.wanted.stage):  # `latest` never goes back
                    continuation.point_to(job.out, checkpoint)
                if job.gate is not None:
                    job.gate.check(job.out, stage.wanted.stage, checkpoint, job.device)
        finally:
            for stage in ready:
                stage.prepared.source.close()
    report_done(checkpoint)


def _later_begun(job: Job, stage: Stage) -> bool:
    """Whether a stage after this one has checkpoints."""
    from l4cli.checkpoint import RunFolder

    later = [other.stage for other in job.stages if other.stage.number > stage.number]
    return any(RunFolder(job.out / other.name).steps() for other in later)


def _checked_supply(job: Job, origin: Origin) -> Supply:
    """Refuse data and gates that cannot work, before anything is written."""
    supply = Supply.check(_demands(job), origin.folder, job.out / "data")
    if job.gate is not None:
        job.gate.try_out([wanted.stage for wanted in job.stages], supply.tokenizer)
    return supply


def _demands(job: Job) -> Demands:
    return Demands(
        stages=[wanted.stage for wanted in job.stages],
        mixes=[wanted.mix for wanted in job.stages],
        long_fraction=job.long_fraction,
        synthetic=job.synthetic,
        writer=job.writer,
        seed=job.recipe.seed,
        device=job.device,
    )


def _shapes(job: Job) -> tuple[Origin, list[Shape]]:
    """Every stage's config and schedule; refuses what the checkpoint cannot become."""
    from l4cli.checkpoint import resolve_checkpoint
    from l4cli.training import continuation, model_setup
    from l4cli.training.stretching import NEW_PARAMETERS, stretch

    origin = continuation.Origin.read(resolve_checkpoint(job.checkpoint))
    optim = job.optim or origin.optim or train.Optim.muon.value
    if not job.resets_optimizer:
        continuation.require_same_optimizer(origin, optim)
    before = model_setup.trainable_config(origin.folder)
    trained_len = job.trained_len or origin.seq_len
    shapes = []
    for wanted in job.stages:
        stage = wanted.stage
        config = stretch(before, wanted.changes, stage.seq_len, trained_len)
        model_setup.require_weights(origin.folder, config, wanted.changes.overrides, NEW_PARAMETERS)
        rate = wanted.rate
        if rate.lr is None and origin.peak_lr is not None:
            rate = replace(rate, lr=LR_FRACTION * origin.peak_lr)
            rate.check()
        num_steps = -(-stage.num_tokens // (wanted.num_rows * stage.seq_len))
        schedule = rate.for_steps(num_steps, config.text.hidden_size)
        recipe = replace(
            job.recipe, optim=optim, activation_checkpointing=wanted.activation_checkpointing
        )
        shapes.append(Shape(wanted, recipe, config, schedule))
    return origin, shapes


def _prepare(job: Job, shape: Shape, supply: Supply, device: torch.device) -> Ready:
    """Pack a stage's data, open it, and refuse what this machine cannot hold."""
    from l4cli.training import data_setup

    stage, config = shape.wanted.stage, shape.config
    shares = supply.shares(stage, shape.wanted.mix)
    for share in shares:
        terminal.say(
            f"stage {stage.number}: {share.share:.0%} of its tokens from `{share.folder}` "
            f"({terminal.count_text(share.num_tokens)} tokens)"
        )
    specs = [share.spec for share in shares]
    source = data_setup.open_source(
        specs,
        seq_len=stage.seq_len,
        batch_size=shape.wanted.num_rows,
        micro_batch_size=None,
        seed=job.recipe.seed,
        attention_chunk_size=config.text.attention_chunk_size,
        passes_at_once=shared.passes_at_once(config, device),
    )
    data_setup.require_geometry(config, source.datasets)
    plan = shared.plan_run(
        shape.recipe, config, source, device, name=str(job.checkpoint), must_fit=False
    )
    _require_fits(stage, shape.recipe, plan)
    held_out = None
    if job.eval_data is not None:
        held_out = data_setup.open_held_out(job.eval_data, source, config)
    prepared = shared.Prepared(source, held_out, config, shape.schedule, plan, device)
    return Ready(shape.wanted, shape.recipe, prepared, specs)


def _require_fits(stage: Stage, recipe: shared.Recipe, plan: TrainingPlan) -> None:
    """raises: L4Error naming what is largest, and what makes it smaller"""
    if plan.fits:
        return
    text = terminal.bytes_text
    parts = sorted(plan.bytes_by_class.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {text(size)}" for name, size in parts)
    fix = "use a shorter stage, a smaller model or a larger machine"
    if parts[0][0] == "activations" and not recipe.activation_checkpointing:
        fix = "add `--activation-checkpointing`"
    raise L4Error(
        f"stage {stage.number} does not fit this machine",
        why=f"rows of {stage.seq_len} need {text(plan.total_bytes)} ({listed}), and "
        f"{text(plan.available_bytes)} is free",
        fix=fix,
    )


def _train(job: Job, ready: Ready, start: Path, origin: Origin) -> Path:
    """Train one stage from a checkpoint, or go on with it; return its last checkpoint."""
    from l4cli.training import continuation

    stage, prepared = ready.wanted.stage, ready.prepared
    run = _run_of(job, ready, start)
    if run.finished():
        checkpoint = continuation.last_checkpoint(run.folder)
        terminal.say(f"stage {stage.number} is finished: `{checkpoint}`")
        return checkpoint
    later = [other.stage.name for other in job.stages if other.stage.number > stage.number]
    continuation.require_not_begun(job.out, stage.name, later)
    terminal.emit({"event": "stage", "stage": stage.number, "seq_len": stage.seq_len})
    terminal.say(f"stage {stage.number} of {len(job.stages)}: rows of {stage.seq_len}")
    report.describe(str(start), prepared.plan, prepared.source, prepared.schedule)
    keeps = not job.resets_optimizer or stage.number > 1
    has_moments = origin.optim is not None or stage.number > 1
    if keeps and not has_moments:
        terminal.say(f"`{start}` holds no optimizer state; it begins anew")
    (checkpoint,) = run.go_on(
        lambda folders: shared.build_loop(ready.recipe, prepared, *folders),
        lambda loop: continuation.begin(
            loop,
            start,
            keeps_optimizer=keeps and has_moments,
            trained_len=job.trained_len or origin.seq_len,
        ),
    )
    return checkpoint


def _run_of(job: Job, ready: Ready, start: Path) -> Run:
    from l4cli.training import continuation
    from l4cli.training.run import Run

    stage = ready.wanted.stage
    options = shared.identity(
        ready.recipe,
        ready.prepared,
        warmup=job.warmup,
        stage=stage.number,
        init_from=continuation.fingerprint(start),
        reset_optimizer=job.resets_optimizer,
        trained_len=job.trained_len,
    )
    settings = {
        "data_paths": list(ready.specs),
        "eval_data": None if job.eval_data is None else str(job.eval_data),
        **ready.recipe.settings(),
    }
    return Run(
        COMMAND,
        job.out / stage.name,
        options,
        settings,
        ready.prepared.schedule.num_steps,
        ready.prepared.device,
        notes={"seq_len": stage.seq_len},
    )


def _described(job: Job) -> dict[str, Any]:
    """What `OUT/run.toml` says; each stage's own has the rest."""
    return {
        "checkpoint": str(job.checkpoint),
        "stages": [f"{w.stage.seq_len}:{w.stage.num_tokens}" for w in job.stages],
        "streams": [[str(path) for path, _ in w.mix.streams] for w in job.stages],
        "synthetic": None if job.synthetic is None else job.synthetic.kinds,
        "synthetic_from": None if job.writer is None else job.writer.source,
        "long_fraction": job.long_fraction,
        "seed": job.recipe.seed,
    }


def show_plan(job: Job) -> None:
    """Print what every stage would take; nothing is packed and nothing is written."""
    from l4cli.planning import TYPICAL_MFU, gemm_rate, plan_training
    from l4cli.training import data_setup
    from l4cli.training.device import torch_device

    origin, shapes = _shapes(job)
    _checked_supply(job, origin)
    device = torch_device(job.device)
    rows = []
    for shape in shapes:
        stage, recipe, num_rows = shape.wanted.stage, shape.recipe, shape.wanted.num_rows
        at_once = data_setup.default_micro_batch_size(num_rows, stage.seq_len)
        if recipe.dtype == "fp8":
            shared.check_fp8(shape.config, device)
        plan = plan_training(
            shape.config,
            optim=recipe.optim,
            dtype=recipe.dtype,
            micro_batch_size=at_once,
            seq_len=stage.seq_len,
            batch_size=num_rows,
            checkpoint_layers=recipe.activation_checkpointing,
            passes_at_once=min(at_once, shared.passes_at_once(shape.config, device)),
            device=str(device),
        )
        num_tokens = shape.schedule.num_steps * plan.tokens_per_step
        figures = {
            "seq_len": stage.seq_len,
            "num_steps": shape.schedule.num_steps,
            "tokens_per_step": plan.tokens_per_step,
            "num_tokens": num_tokens,
            "lr": shape.schedule.peak_lr,
            "bytes_total": plan.total_bytes,
            "bytes_available": plan.available_bytes,
            "fits": plan.fits,
            "time_s": plan.time_s(num_tokens, 0, gemm_rate(recipe.dtype, str(device))),
        }
        terminal.emit({"event": "plan", "stage": stage.number, **figures})
        rows.append(
            (
                stage.number,
                stage.seq_len,
                terminal.count_text(num_tokens),
                f"{shape.schedule.num_steps} of {num_rows} rows",
                f"{shape.schedule.peak_lr:.2e}",
                terminal.bytes_text(plan.total_bytes) + ("" if plan.fits else " (too much)"),
                terminal.time_text(figures["time_s"]),
            )
        )
    columns = ("stage", "length", "tokens", "steps", "lr", "memory", "time")
    terminal.table(f"time at {TYPICAL_MFU:.0%} of the GEMM rate here", columns, rows)
