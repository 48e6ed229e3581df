"""Write a checkpoint anew as a plain Hugging Face folder, tensor by tensor.

in: a `ParameterReader`, a dtype; out: config, weights, index, the small files beside them
source: HF Llama4 checkpoints (transformers 5.23); experts fused, as that reads and writes them
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4cli.checkpoint.atomic import write_text
from l4cli.checkpoint.manifest import write_manifest
from l4cli.checkpoint.parameters import ParameterReader
from l4cli.checkpoint.shard_files import MAX_SHARD_BYTES, write_shards
from l4cli.checkpoint.stored import CONFIG, json_object
from l4cli.checkpoint.tensor_file import Streamed

# What belongs to a model and is neither weights nor training state.
SMALL_FILES = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
)
Progress = Callable[[int], None]  # told the bytes written so far


def rewrite(
    parameters: ParameterReader,
    folder: Path,
    dtype: torch.dtype | None,
    progress: Progress = lambda _: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill an existing empty folder; `dtype` None keeps what each tensor is stored in."""
    kinds = {name: dtype or parameters.dtype(name) for name in parameters.shapes}
    counted = _Counted(progress)
    tensors = [
        Streamed(name, kinds[name], shape, partial(counted.parts, parameters, name, kinds[name]))
        for name, shape in parameters.shapes.items()
    ]
    hashes = write_shards(folder, tensors, max_shard_bytes)
    for name in SMALL_FILES:
        if (parameters.folder / name).is_file():
            shutil.copyfile(parameters.folder / name, folder / name)
    main = _main_dtype(tensors)
    config = _config(json_object(parameters.folder / CONFIG), main)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_manifest(folder, hashes)


class _Counted:
    """Says how much was read while parts go by."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.written = progress, 0

    def parts(self, parameters: ParameterReader, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        for part in parameters.parts(name):
            yield part
            self.written += part.numel() * dtype.itemsize
            self.progress(self.written)


def _main_dtype(tensors: Iterable[Streamed]) -> str:
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.size_bytes
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _config(keys: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config it came with, its dtype changed, and no word of what it was quantized by."""
    changed: dict[str, Any] = {}
    for key, value in keys.items():
        if key in ("quantization_config", "compression_config"):
            continue
        if key in ("dtype", "torch_dtype"):
            value = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            value = _config(value, dtype)
        changed[key] = value
    if "architectures" in keys and not {"dtype", "torch_dtype"} & keys.keys():
        changed["torch_dtype"] = dtype
    return changed
