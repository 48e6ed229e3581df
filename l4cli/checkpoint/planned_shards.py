"""Weight files whose tensors come in any order: their sizes are known, so each has its place.

in: names, dtypes and shapes, then the tensors one by one; out: one file, or shards and their index
source: the safetensors format; HF's index
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from l4cli.checkpoint.stored import INDEX, SINGLE
from l4cli.checkpoint.tensor_file import DTYPE_NAMES, bytes_of

Spec = tuple[torch.dtype, tuple[int, ...]]


class PlannedShards:
    """Files of a folder that someone else commits; each tensor is written once, then forgotten."""

    def __init__(self, folder: Path, specs: Mapping[str, Spec], max_shard_bytes: int) -> None:
        self._specs = dict(specs)
        shards = _shards(self._specs, max_shard_bytes)
        self.file_of: dict[str, str] = {}
        self._start: dict[str, int] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._left = set(specs)
        for i, names in enumerate(shards, start=1):
            file = SINGLE
            if len(shards) > 1:
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            header, starts = _header(names, self._specs)
            self._files[file] = (folder / file).open("wb")
            self._files[file].write(header)
            self._files[file].truncate(len(header) + sum(map(self._size, names)))
            self.file_of |= dict.fromkeys(names, file)
            self._start |= starts
        if len(shards) > 1:
            self._write_index(folder)

    @property
    def size_bytes(self) -> int:
        """Of the tensors."""
        return sum(map(self._size, self._specs))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place."""
        dtype, shape = self._specs[name]
        assert name in self._left, f"{name} is written twice"
        assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
        assert tensor.dtype == dtype, (name, tensor.dtype, dtype)
        self._left.remove(name)
        data, file = bytes_of(tensor, dtype), self._files[self.file_of[name]]
        file.seek(self._start[name])
        file.write(data)

    def finish(self) -> None:
        """Close files in which every tensor has been written."""
        assert not self._left, f"never written: {sorted(self._left)[:3]}"
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> PlannedShards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def _size(self, name: str) -> int:
        return spec_bytes(self._specs[name])

    def _write_index(self, folder: Path) -> None:
        metadata = {"total_size": self.size_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(self.file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def spec_bytes(spec: Spec) -> int:
    """What a tensor takes in its file."""
    return math.prod(spec[1]) * spec[0].itemsize


def _shards(specs: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    """Fill shards in order; what belongs to one module stays together."""
    modules: dict[str, list[str]] = {}
    for name in specs:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    shards: list[list[str]] = [[]]
    filled = 0
    for names in modules.values():
        size = sum(spec_bytes(specs[name]) for name in names)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += names
        filled += size
    return shards


def _header(names: list[str], specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """A file's head, and where each tensor begins in the file."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    # Wide dtypes first, so that every tensor's place is a multiple of its item size.
    for name in sorted(names, key=lambda name: -specs[name][0].itemsize):
        dtype, shape = specs[name]
        starts[name], end = position, position + spec_bytes(specs[name])
        fields[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in starts.items()}
