"""What every command that trains says before it begins, and instead of it under `--dry-run`.

in: a plan, the data, a schedule; out: lines on stderr, or a table on stdout
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4cli import terminal

if TYPE_CHECKING:
    import torch

    from l4cli.data.loader import ShardSource
    from l4cli.planning import TrainingPlan
    from l4cli.training.schedule import Schedule


def describe(name: str, plan: TrainingPlan, source: ShardSource, schedule: Schedule) -> None:
    """Say once what model, data and defaults came to."""
    count, num_steps = terminal.count_text, schedule.num_steps
    terminal.say(
        f"`{name}`: {count(plan.counts.total)} parameters, "
        f"{count(plan.counts.active)} active, {count(plan.flops_per_token)} FLOP per token"
    )
    pictures = f", {source.num_media} pictures" if source.num_media else ""
    terminal.say(
        f"data: {source.num_rows} rows of {source.seq_len}, "
        f"{count(source.num_tokens)} tokens{pictures}"
    )
    epochs = num_steps * source.batch_size / source.num_rows
    terminal.say(
        f"{num_steps} steps of {source.batch_size} x {source.seq_len} tokens "
        f"({epochs:.2f} epochs), {source.micro_batch_size} sequences at once"
    )
    first_decay = schedule.first_decay_step
    decay = f", decay from step {first_decay}" if first_decay < num_steps else ""
    terminal.say(f"lr {schedule.peak_lr:.2e} {schedule.kind}, warmup {schedule.num_warmup}{decay}")


def show_dry_run(
    plan: TrainingPlan,
    source: ShardSource,
    schedule: Schedule,
    dtype: str,
    device: torch.device,
    model: str = "",
) -> None:
    """Print what the run would take; nothing was allocated and nothing is written.

    `model`: the name of one of several, as in the lines of steps.
    """
    from l4cli.planning import TYPICAL_MFU, gemm_rate

    num_tokens = schedule.num_steps * plan.tokens_per_step
    num_tiles = num_tokens * source.num_media / max(1, source.num_tokens)
    time_s = plan.time_s(num_tokens, num_tiles, gemm_rate(dtype, str(device)))
    figures: dict[str, float] = {
        "num_parameters": plan.counts.total,
        "num_active_parameters": plan.counts.active,
        "num_vision_parameters": plan.counts.vision,
        "flops_per_token": plan.flops_per_token,
        "flops_per_tile": plan.flops_per_tile,
        "tokens_per_step": plan.tokens_per_step,
        "num_steps": schedule.num_steps,
        "num_tokens": num_tokens,
    }
    sizes = {**plan.bytes_by_class, "total": plan.total_bytes, "available": plan.available_bytes}
    in_bytes = {f"bytes_{name}": size for name, size in sizes.items()}
    event = {"event": "plan", **figures, **in_bytes, "fits": plan.fits, "time_s": time_s}
    terminal.emit(event | ({"model": model} if model else {}))
    rows = [(name, terminal.count_text(value)) for name, value in figures.items()]
    rows += [(name, terminal.bytes_text(size)) for name, size in in_bytes.items()]
    rows += [("fits", "yes" if plan.fits else "no")]
    rows += [("time", f"{terminal.time_text(time_s)} at {TYPICAL_MFU:.0%} of the GEMM rate here")]
    terminal.table(model, ("what", "figure"), rows)
