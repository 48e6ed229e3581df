"""Get a model that runs in C++: from the file beside a checkpoint, made first where it is missing.

in: a checkpoint folder or a model; out: `NativeModel`, or the reason why there is none
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l4cli.checkpoint import load_config, load_weights
from l4cli.checkpoint.hf_keys import TEXT_PREFIX
from l4cli.checkpoint.manifest import KERNELS
from l4cli.inference.kernel_blobs import Choose, ModelSource, blobs, keep, num_blobs
from l4cli.inference.kernel_file import (
    config_fingerprint,
    in_memory,
    is_current,
    open_file,
    source_fingerprint,
    write_beside,
)
from l4cli.inference.kernel_source import CheckpointSource
from l4cli.inference.native import NativeModel
from l4cli.model import Llama4Config, build_model

FINGERPRINT_ELEMENTS = 4096  # of each tensor that tells models apart


def weights_id(model: nn.Module) -> str:
    """Tells these weights from others of the same shape, whatever precision they are in."""
    identity = Identity()
    for name, weight in sorted(model.named_parameters()):
        if not weight.is_meta:
            identity.add(name, weight.detach())
    return identity.digest.hexdigest()


class Identity:
    """`weights_id` of weights that are met one by one, sorted by name."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def add(self, name: str, weight: Tensor) -> None:
        """Take a weight in, if it is one of those that are looked at."""
        if weight.ndim != 1 and not name.endswith("embed_tokens.weight"):
            return
        flat = weight.flatten()
        few = flat[:: max(1, len(flat) // FINGERPRINT_ELEMENTS)]
        self.digest.update(few.cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())


def native_from_model(
    model: Any, choose: Choose = keep, *, is_exact: bool = False, folder: Path | None = None
) -> NativeModel:
    """Lay out a model that is in memory; into a file in `folder`, or in memory again.

    Its picture half goes on being used.
    """
    config: Llama4Config = model.config
    facts = {
        "config": config_fingerprint(config),
        "model_id": weights_id(model),
        "compute_dtype": "fp32" if model.compute_dtype == torch.float32 else "bf16",
        "is_exact": str(int(is_exact)),
    }
    found = blobs(ModelSource(model), config, choose, is_exact=is_exact)
    vision = model if config.vision is not None else None
    if folder is None:
        return NativeModel(in_memory(found, num_blobs(config), facts), config, vision)
    path = write_beside(folder, found, num_blobs(config), facts)
    return NativeModel(open_file(path), config, vision)


def make_file(folder: Path, choose: Choose = keep) -> Path:
    """Write the file beside a checkpoint, a weight at a time. raises: L4Error"""
    config, source = load_config(folder), CheckpointSource(folder)
    facts = {
        "config": config_fingerprint(config),
        "source": source_fingerprint(folder),
        "model_id": _stored_id(source),
        "compute_dtype": "bf16",
        "is_exact": "0",
    }
    return write_beside(folder, blobs(source, config, choose), num_blobs(config), facts)


def open_native(folder: Path, config: Llama4Config) -> NativeModel:
    """Map the file beside a checkpoint; pictures are encoded by torch, in bf16."""
    vision = None
    if config.vision is not None:
        vision = build_model(config, device="meta")
        load_weights(
            vision,
            folder,
            dtype=torch.bfloat16,
            only=lambda name: not name.startswith(TEXT_PREFIX),
        )
        vision.compute_dtype = torch.bfloat16
    return NativeModel(open_file(folder / KERNELS), config, vision)


def has_file(folder: Path, config: Llama4Config) -> bool:
    """Whether a file is there that was made from these very weights by this version."""
    return is_current(folder / KERNELS, config, folder)


def _stored_id(source: CheckpointSource) -> str:
    """`weights_id` of a checkpoint, tensor by tensor."""
    identity = Identity()
    prefix = TEXT_PREFIX if source.has_vision and not source.prefix else ""
    names = {prefix + key: key for key in source.stored.tensors}
    for name, key in sorted(names.items()):
        entry = source.stored.tensors[key]
        if len(entry.shape) == 1 or name.endswith("embed_tokens.weight"):
            identity.add(name, source.plain(key))
    return identity.digest.hexdigest()
