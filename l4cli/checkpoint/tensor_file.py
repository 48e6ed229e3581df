"""Write safetensors files tensor by tensor, so that memory holds one of them at a time; read one.

in: named tensors; out: a file, and its SHA-256
source: the safetensors format: 8 bytes of header length, a JSON header, the data
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from l4cli.checkpoint.atomic import replacing
from l4cli.checkpoint.headers import TensorEntry
from l4cli.errors import L4Error

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_WRITE_BYTES = 32 << 20

NamedTensor = tuple[str, Tensor]


def stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in: `dtype` applies to floating point only."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def stored_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """How much of a file's data a tensor takes."""
    return tensor.numel() * stored_dtype(tensor, dtype).itemsize


@dataclass(frozen=True)
class Streamed:
    """A tensor that comes in parts, which follow one another in memory, when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: Sequence[NamedTensor], dtype: torch.dtype | None = None
) -> str:
    """Write a file whole or not at all, converting each tensor as it goes; return its SHA-256."""
    return write_streamed(path, [_at_hand(name, tensor, dtype) for name, tensor in tensors])


def _at_hand(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Streamed:
    return Streamed(name, stored_dtype(tensor, dtype), tuple(tensor.shape), lambda: (tensor,))


def write_streamed(path: Path, tensors: Sequence[Streamed]) -> str:
    """The same for tensors that are fetched one part at a time."""
    # Wide dtypes first, so that every tensor's place is a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.size_bytes
        fields[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = struct.pack("<Q", len(header)) + header
    digest = hashlib.sha256(header)
    with replacing(path) as file:
        file.write(header)
        for tensor in ordered:
            for part in tensor.parts():
                data = bytes_of(part, tensor.dtype)
                for start in range(0, len(data), _WRITE_BYTES):
                    block = data[start : start + _WRITE_BYTES]
                    digest.update(block)
                    file.write(block)
    return digest.hexdigest()


def bytes_of(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """A tensor's data as it is stored."""
    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_tensor(path: Path, entry: TensorEntry, index: int | None = None) -> Tensor:
    """Read one tensor, or its part at an index of the first dimension, into memory of its own.

    Nothing is mapped: pages of a mapped file count as ours, whole files of them.
    """
    shape, start, end = entry.shape, entry.start, entry.end
    if index is not None:
        size_bytes = (end - start) // shape[0]
        shape, start, end = shape[1:], start + index * size_bytes, start + (index + 1) * size_bytes
    data = torch.empty(end - start, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done : done + _WRITE_BYTES]], start + done)
            if count == 0:
                why = f"it ends at byte {start + done}, its header promises more"
                raise L4Error(f"cannot read `{path}`", why=why, fix="fetch or write it again")
            done += count
    return data.view(DTYPES[entry.dtype]).view(shape)
