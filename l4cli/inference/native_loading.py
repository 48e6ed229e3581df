"""Get a model that runs in C++: from the file beside a checkpoint, made first where it is missing.

in: a checkpoint folder or a model; out: `NativeModel`, or the reason why there is none
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l4cli.checkpoint import load_config, load_weights, open_weights
from l4cli.checkpoint.hf_keys import TEXT_PREFIX
from l4cli.checkpoint.manifest import KERNELS
from l4cli.checkpoint.stored import CONFIG
from l4cli.inference.kernel_blobs import Choose, ModelSource, blobs, keep, num_blobs
from l4cli.inference.kernel_file import (
    Blob,
    config_fingerprint,
    in_memory,
    is_current,
    open_file,
    source_fingerprint,
    write_beside,
)
from l4cli.inference.kernel_source import CheckpointSource
from l4cli.inference.native import NativeModel, instructions, why_not
from l4cli.model import Llama4Config, build_model
from l4cli.ops.weight_only import LayoutError
from l4cli.planning import available_memory

_MOST_MEMORY = 0.5  # of what is free: beyond it weights stay in the file and come page by page
MOST_PLAIN_BYTES = 2 << 30  # of weights that are laid out anew at every start
_PLAIN_COPIES = 3  # while they are laid out: the model, a buffer, what stays
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


def native_from_plain(model: Any) -> NativeModel | str:
    """A model that torch has loaded, in C++ in its own precision; or why torch goes on with it.

    Its text half is used up.
    """
    reason = why_not()
    if reason is not None:
        return reason
    if model.compute_dtype not in (torch.float32, torch.bfloat16):
        return "it computes neither in fp32 nor in bf16"
    if instructions() == "portable":
        return "without vector instructions only packed weights are faster in C++"
    text = getattr(model, "language_model", model)
    size = sum(weight.nbytes for weight in text.parameters())
    if size > MOST_PLAIN_BYTES:
        return f"only up to {MOST_PLAIN_BYTES >> 30} GiB are laid out without a file; `l4 quantize`"
    if size * (_PLAIN_COPIES - 1) > available_memory("cpu"):
        return "there is no memory to lay them out"
    native = native_from_model(model, is_exact=True)
    text.to("meta")
    return native


def find_native(
    folder: Path, config: Llama4Config, on_making: Callable[[], None] | None = None
) -> NativeModel | str:
    """A checkpoint's model in C++, or why its codes cannot run there.

    The file is made where it is missing for weights stored in codes; plain weights that have none
    are not looked at. `on_making` hears when it takes a while.
    """
    reason = why_not()
    if reason is not None:
        return reason
    if not is_current(folder / KERNELS, config, folder):
        if not is_quantized_folder(folder):
            return "its weights are not quantized"
        if on_making is not None:
            on_making()
        try:
            make_file(folder)
        except LayoutError as error:
            return error.why
        except PermissionError:
            return _without_file(folder, config)
    return open_native(folder, config)


def _without_file(folder: Path, config: Llama4Config) -> NativeModel | str:
    """Laid out in memory where nothing may be written."""
    if 2 * open_weights(folder).size_bytes > available_memory("cpu"):
        return "its folder cannot be written to, and there is no memory to lay it out there"
    try:
        weights = in_memory(*_of_folder(folder))
    except LayoutError as error:
        return error.why
    return NativeModel(weights, config, _vision(folder, config))


def make_file(folder: Path, choose: Choose = keep) -> Path:
    """Write the file beside a checkpoint, a weight at a time. raises: L4Error, PermissionError"""
    return write_beside(folder, *_of_folder(folder, choose))


def open_native(folder: Path, config: Llama4Config) -> NativeModel:
    """Map the file beside a checkpoint; where memory is plenty, huge pages take its place soon."""
    path = folder / KERNELS
    is_large = path.stat().st_size > _MOST_MEMORY * available_memory("cpu")
    weights = open_file(path, is_mapped=True)
    # Pages that are not in memory are asked for as soon as the router has spoken.
    model = NativeModel(weights, config, _vision(folder, config), is_prefetched=is_large)
    if not is_large:
        threading.Thread(target=weights.settle, daemon=True).start()
    return model


def is_quantized_folder(folder: Path) -> bool:
    """Whether a checkpoint's weights are stored in codes."""
    try:
        keys = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(keys, dict) and bool(keys.get("quantization_config"))


def _of_folder(folder: Path, choose: Choose = keep) -> tuple[Iterator[Blob], int, dict[str, str]]:
    config, source = load_config(folder), CheckpointSource(folder)
    facts = {
        "config": config_fingerprint(config),
        "source": source_fingerprint(folder),
        "model_id": _stored_id(source, config),
        "compute_dtype": "bf16",
        "is_exact": "0",
    }
    return blobs(source, config, choose), num_blobs(config), facts


def _vision(folder: Path, config: Llama4Config) -> Any:
    """The picture half in torch, in bf16; the text half stays without weights."""
    if config.vision is None:
        return None
    model = build_model(config, device="meta")
    load_weights(
        model, folder, dtype=torch.bfloat16, only=lambda name: not name.startswith(TEXT_PREFIX)
    )
    model.compute_dtype = torch.bfloat16
    return model


def _stored_id(source: CheckpointSource, config: Llama4Config) -> str:
    """`weights_id` of a checkpoint, tensor by tensor."""
    identity = Identity()
    for name, parameter in sorted(build_model(config, device="meta").named_parameters()):
        if parameter.ndim == 1 or name.endswith("embed_tokens.weight"):
            bare = name.removeprefix(TEXT_PREFIX)
            names = (name, TEXT_PREFIX + name, bare)
            key = next((key for key in names if key in source.stored.tensors), name)
            identity.add(name, source.plain(key))
    return identity.digest.hexdigest()
