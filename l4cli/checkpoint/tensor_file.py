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
from collections.abc import Callable, Iterable, Mapping, Sequence
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

Spec = tuple[torch.dtype, tuple[int, ...]]


def stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in: `dtype` applies to floating point only."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


@dataclass(frozen=True)
class Streamed:
    """A tensor that comes in parts, which follow one another in memory, when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def size_bytes(self) -> int:
        return spec_bytes((self.dtype, self.shape))


def at_hand(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Streamed:
    """A tensor that is in memory, converted as it is written."""
    return Streamed(name, stored_dtype(tensor, dtype), tuple(tensor.shape), lambda: (tensor,))


def file_header(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """A file's head, and where each tensor begins in the file, in the order of the data."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    # Wide dtypes first, so that every tensor's place is a multiple of its item size.
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
        starts[name], end = position, position + spec_bytes((dtype, shape))
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


def spec_bytes(spec: Spec) -> int:
    """What a tensor takes in its file."""
    return math.prod(spec[1]) * spec[0].itemsize


def write_streamed(path: Path, tensors: Sequence[Streamed]) -> str:
    """Write a file whole or not at all, one part of a tensor at a time; return its SHA-256."""
    by_name = {tensor.name: tensor for tensor in tensors}
    head, starts = file_header({name: (t.dtype, t.shape) for name, t in by_name.items()})
    digest = hashlib.sha256(head)
    with replacing(path) as file:
        file.write(head)
        for tensor in (by_name[name] for name in starts):
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
