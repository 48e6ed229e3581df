"""Whether a run fits this machine, what does, and how long it takes.

in: a config and the options of a run; out: figures for `--dry-run`, or a refusal
"""

from __future__ import annotations

from dataclasses import dataclass

from l4cli.errors import L4Error
from l4cli.model import Llama4Config, ParameterCounts, count_parameters, load_preset, preset_names
from l4cli.planning.flops import flops_per_token, vision_flops_per_tile
from l4cli.planning.machine import available_memory
from l4cli.planning.memory import training_bytes
from l4cli.terminal import bytes_text

# Share of the product rate that a whole training step reaches; measured on small CPU models,
# where norms, attention and the optimizer take the rest. An estimate, shown as one.
TYPICAL_MFU = 0.4


@dataclass(frozen=True)
class TrainingPlan:
    """What a run takes, before it starts."""

    counts: ParameterCounts
    bytes_by_class: dict[str, int]
    available_bytes: int
    flops_per_token: float
    flops_per_tile: float
    tokens_per_step: int

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_class.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes

    def time_s(self, num_tokens: float, num_tiles: float, rate: float) -> float:
        """Seconds of arithmetic for these tokens and tiles at a product rate, an estimate."""
        work = num_tokens * self.flops_per_token + num_tiles * self.flops_per_tile
        return work / (rate * TYPICAL_MFU)


def plan_training(
    config: Llama4Config,
    *,
    optim: str,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    batch_size: int | None = None,
    mean_document_length: float | None = None,
    checkpoint_layers: bool = False,
    tiles: int = 0,
    passes_at_once: int = 1,
    device: str = "cpu",
) -> TrainingPlan:
    """Work out a run on one rank; milliseconds, nothing is allocated."""
    shape = (optim, dtype, micro_batch_size, seq_len)
    return TrainingPlan(
        counts=count_parameters(config),
        bytes_by_class=training_bytes(
            config,
            *shape,
            checkpoint_layers=checkpoint_layers,
            tiles=tiles,
            passes_at_once=passes_at_once,
        ),
        available_bytes=available_memory(device),
        flops_per_token=flops_per_token(config, seq_len, mean_document_length),
        flops_per_tile=vision_flops_per_tile(config),
        tokens_per_step=(batch_size or micro_batch_size) * seq_len,
    )


def largest_fitting_preset(
    optim: str,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    *,
    available_bytes: int | None = None,
    checkpoint_layers: bool = False,
) -> str | None:
    """The largest preset that trains in the memory there is; None when not even the first does."""
    available = available_memory() if available_bytes is None else available_bytes
    fitting = None
    for name in preset_names():
        shape = (optim, dtype, micro_batch_size, seq_len)
        needed = training_bytes(load_preset(name), *shape, checkpoint_layers=checkpoint_layers)
        if sum(needed.values()) <= available:
            fitting = name
    return fitting


def require_training_fits(
    plan: TrainingPlan,
    name: str,
    *,
    optim: str,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    checkpoint_layers: bool = False,
) -> None:
    """Refuse a run that this machine cannot hold. raises: L4Error naming a preset that fits"""
    if plan.fits:
        return
    parts = sorted(plan.bytes_by_class.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{part} {bytes_text(size)}" for part, size in parts)
    available = bytes_text(plan.available_bytes)
    fitting = largest_fitting_preset(
        optim,
        dtype,
        micro_batch_size,
        seq_len,
        available_bytes=plan.available_bytes,
        checkpoint_layers=checkpoint_layers,
    )
    largest = parts[0][0]
    if largest in ("activations", "loss") and micro_batch_size > 1:
        fix = f"lower `--micro-batch-size` (now {micro_batch_size})"
    elif fitting is not None:
        fix = f"`--preset {fitting}` is the largest that fits"
    else:
        fix = "free some memory, or use a larger machine"
    raise L4Error(
        f"`{name}` does not fit this machine",
        why=f"training it needs {bytes_text(plan.total_bytes)} ({listed}), and {available} is free",
        fix=fix,
    )
