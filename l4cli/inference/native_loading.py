"""Get a model that runs in C++: from the file beside a checkpoint, made first where it is missing.

in: a checkpoint folder or a model; out: `NativeModel`, or the reason why there is none
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l4cli.inference.kernel_blobs import Choose, ModelSource, blobs, keep, num_blobs
from l4cli.inference.kernel_file import config_fingerprint, in_memory, write_beside
from l4cli.inference.native import NativeModel
from l4cli.model import Llama4Config

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
    dtype = "fp32" if model.compute_dtype == torch.float32 else "bf16"
    facts = {
        "config": config_fingerprint(config),
        "model_id": weights_id(model),
        "compute_dtype": dtype,
        "is_exact": str(int(is_exact)),
    }
    found = blobs(ModelSource(model), config, choose, is_exact=is_exact)
    vision = model if config.vision is not None else None
    if folder is None:
        return NativeModel(in_memory(found, num_blobs(config), facts), config, vision)
    from l4cli.inference.kernel_file import open_file

    path = write_beside(folder, found, num_blobs(config), facts)
    return NativeModel(open_file(path), config, vision)
