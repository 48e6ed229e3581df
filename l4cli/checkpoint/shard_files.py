"""How a checkpoint's weights lie in files: one, or shards of a largest size and their index.

in: tensors in the model's order; out: the files' names, and their SHA-256
source: HF's names and index (`model-00001-of-00002.safetensors`)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from l4cli.checkpoint.atomic import write_text
from l4cli.checkpoint.stored import INDEX, SINGLE
from l4cli.checkpoint.tensor_file import Streamed, write_streamed

MAX_SHARD_BYTES = 5 << 30
T = TypeVar("T")


def fill_shards(sizes: Iterable[tuple[T, int]], max_bytes: int) -> list[list[T]]:
    """Fill shards in order; what is larger than a shard has one to itself."""
    shards: list[list[T]] = [[]]
    filled = 0
    for each, size in sizes:
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(each)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """The names of so many files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, file_of: Mapping[str, str], metadata: Mapping[str, int]) -> None:
    """Say in which of several files each tensor is."""
    index = {"metadata": dict(metadata), "weight_map": dict(sorted(file_of.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_shards(
    folder: Path, tensors: Sequence[Streamed], max_bytes: int, **metadata: int
) -> dict[str, str]:
    """Write one file, or shards and their index; return file name -> SHA-256."""
    shards = fill_shards(((tensor, tensor.size_bytes) for tensor in tensors), max_bytes)
    names = shard_names(len(shards))
    files = list(zip(names, shards, strict=True))
    hashes = {name: write_streamed(folder / name, shard) for name, shard in files}
    if len(shards) > 1:
        total = sum(tensor.size_bytes for tensor in tensors)
        file_of = {tensor.name: name for name, shard in files for tensor in shard}
        write_index(folder, file_of, {**metadata, "total_size": total})
    return hashes
