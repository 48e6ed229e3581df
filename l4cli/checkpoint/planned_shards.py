"""Weight files whose tensors come in any order: their sizes are known, so each has its place.

in: names, dtypes and shapes, then the tensors one by one; out: one file, or shards and their index
source: the safetensors format; HF's index
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from torch import Tensor

from l4cli.checkpoint.shard_files import fill_shards, shard_names, write_index
from l4cli.checkpoint.tensor_file import Spec, bytes_of, file_header, spec_bytes


class PlannedShards:
    """Files of a folder that someone else commits; each tensor is written once, then forgotten."""

    def __init__(self, folder: Path, specs: Mapping[str, Spec], max_shard_bytes: int) -> None:
        self._specs = dict(specs)
        self.file_of: dict[str, str] = {}
        self._start: dict[str, int] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._left = set(specs)
        shards = fill_shards(_by_module(self._specs), max_shard_bytes)
        for file, modules in zip(shard_names(len(shards)), shards, strict=True):
            own = {name: self._specs[name] for names in modules for name in names}
            head, starts = file_header(own)
            self._files[file] = (folder / file).open("wb")
            self._files[file].write(head)
            self._files[file].truncate(len(head) + sum(map(spec_bytes, own.values())))
            self.file_of |= dict.fromkeys(own, file)
            self._start |= starts
        if len(shards) > 1:
            write_index(folder, self.file_of, {"total_size": self.size_bytes})

    @property
    def size_bytes(self) -> int:
        """Of the tensors."""
        return sum(map(spec_bytes, self._specs.values()))

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


def _by_module(specs: Mapping[str, Spec]) -> list[tuple[list[str], int]]:
    """Names and sizes of what belongs to one module, and so into one file."""
    modules: dict[str, list[str]] = {}
    for name in specs:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return [(names, sum(spec_bytes(specs[n]) for n in names)) for names in modules.values()]
