"""The teacher that only predicts: whether it fits the shards, its weights, a shape cut from it.

in: a checkpoint, opened shards; out: a `Teacher`, its model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands.distill_students import Student
from l4cli.errors import L4Error, UsageError

if TYPE_CHECKING:
    import torch

    from l4cli.data.loader import ShardSource
    from l4cli.data.teacher_cache import TeacherCache
    from l4cli.model import Llama4Config

_DEPTH = "num_hidden_layers="
_DTYPES = {"fp32": "fp32", "bf16": "bf16", "fp8": "bf16"}  # what the teacher computes in


@dataclass(frozen=True)
class Teacher:
    """A teacher that only predicts."""

    checkpoint: Path
    config: Llama4Config
    fingerprint: str
    dtype: str
    num_bytes: int
    flops_per_token: float


def prepare_teacher(checkpoint: Path, dtype: str, source: ShardSource) -> Teacher:
    """A teacher that fits the shards. raises: L4Error"""
    from l4cli.checkpoint import load_config, resolve_checkpoint
    from l4cli.planning import flops_per_token, inference_bytes
    from l4cli.training import continuation, data_setup, model_setup

    config = load_config(checkpoint)
    model_setup.require_same_tokenizer(checkpoint, source.tokenizer())
    try:
        data_setup.require_geometry(config, source.datasets)
        data_setup.require_context(config, source.seq_len)
    except UsageError as error:
        what = error.what.replace("the model", f"the teacher `{checkpoint}`")
        fix = "take another teacher, or pack shards that it can read"
        raise UsageError(what, why=error.why, fix=fix) from error
    computed = _DTYPES[dtype]
    mean_length = source.num_tokens / max(1, _num_documents(source))
    return Teacher(
        checkpoint,
        config,
        continuation.fingerprint(resolve_checkpoint(checkpoint)),
        computed,
        inference_bytes(config, computed, 0)["weights"],
        flops_per_token(config, source.seq_len, mean_length) / 3,  # forward alone
    )


def require_teacher_fits(teacher: Teacher, device: torch.device) -> None:
    """Refuse a teacher that this machine cannot hold. raises: L4Error"""
    from l4cli.planning import available_memory

    available = available_memory(str(device))
    if teacher.num_bytes > available:
        needed, free = terminal.bytes_text(teacher.num_bytes), terminal.bytes_text(available)
        more = "" if teacher.dtype == "bf16" else "`--dtype bf16` halves it; or "
        raise L4Error(
            f"the teacher `{teacher.checkpoint}` does not fit this machine",
            why=f"its weights take {needed} in {teacher.dtype}, and {free} is free",
            fix=f"{more}write its cache on a larger machine: a cache is read anywhere",
        )


def _num_documents(source: ShardSource) -> int:
    return sum(int(shards.index["num_documents"]) for shards in source.datasets)


def load_teacher(teacher: Teacher, device: torch.device) -> Any:
    """The teacher's model, for predictions alone."""
    import torch

    from l4cli.checkpoint import load_model

    dtype = torch.float32 if teacher.dtype == "fp32" else torch.bfloat16
    model = load_model(teacher.checkpoint, device=device, dtype=dtype)
    return model.requires_grad_(False)


def open_cache(folder: Path, temperature: float, *, takes_hard: bool) -> TeacherCache:
    """A cache that has what is to be learned. raises: L4Error"""
    from l4cli.data.teacher_cache import TeacherCache

    cache = TeacherCache.open(folder)
    if cache.temperature != temperature:
        raise UsageError(
            f"cannot use `--temperature {temperature:g}`",
            why=f"the cache was written at {cache.temperature:g}",
            fix=f"`--temperature {cache.temperature:g}`, or write another cache",
        )
    if takes_hard and cache.num_exact < 2:
        raise UsageError(
            f"cannot take hard targets from `{folder}`",
            why="it was written with `--top-k 0`: of each token it knows the data's alone exactly",
            fix="write another cache with `--top-k 1` or more, or leave `hard_targets` out",
        )
    return cache


def matched_layers(
    student: Student, config: Llama4Config, teacher: Llama4Config
) -> list[tuple[int, int]]:
    """A student's layers and the teacher's whose states are matched. raises: UsageError"""
    from l4cli.training.hidden_match import spread_pairs

    depths = config.text.num_hidden_layers, teacher.text.num_hidden_layers
    pairs = list(student.match or spread_pairs(*depths))
    for pair in pairs:
        if not all(0 <= layer < depth for layer, depth in zip(pair, depths, strict=True)):
            raise UsageError(
                f"cannot match layer {pair[0]} of `{student.name}` with layer {pair[1]}",
                why=f"the student has {depths[0]} layers and the teacher {depths[1]}",
                fix="name layers from 0, the student's first, as in `match=0:1+1:3`",
            )
    return pairs


def shape_from_teacher(student: Student, teacher: Llama4Config) -> Llama4Config:
    """The teacher's config, which names every layer's kind, with as many layers as are kept."""
    from l4cli.training.cut_plan import with_layers

    depth = teacher.text.num_hidden_layers
    layers = student.cut.layers if student.cut else None
    if layers is None:
        wanted = [w.partition("=")[2] for w in student.overrides if w.startswith(_DEPTH)]
        count = int(wanted[-1]) if wanted and wanted[-1].isdigit() else depth
        if count > depth:
            raise UsageError(
                f"cannot cut {count} layers from the teacher",
                why=f"it has {depth}",
                fix=f"`num_hidden_layers={depth}` or less, or name another shape than `teacher`",
            )
        # Its last layers: a pattern of layers without positions ends with one of them.
        layers = tuple(range(depth))[-count:] if 0 < count < depth else tuple(range(depth))
    if not all(0 <= layer < depth for layer in layers):
        raise UsageError(
            f"cannot keep the layers {list(layers)} of the teacher",
            why=f"it has {depth}",
            fix=f"name layers from 0 to {depth - 1}, as in `layers=0+{depth - 1}`",
        )
    return with_layers(teacher, layers)
