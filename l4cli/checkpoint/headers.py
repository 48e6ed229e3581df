"""What a safetensors file says about itself, read without its data.

in: a path; out: names, dtypes, shapes and places of its tensors
source: the safetensors format: 8 bytes of header length, a JSON header, the data
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4cli.errors import L4Error

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` and `end` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """One file: its tensors in the order of their data, and its metadata."""

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    size_bytes: int


def read_header(path: Path) -> Header:
    """Read a file's header and check it against the file's size.

    raises: L4Error for what is empty, cut off, or no safetensors file
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _bad(
                    path, "it is empty" if not prefix else "it ends within its first 8 bytes"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise _bad(path, "it is not a safetensors file")
            if 8 + length > size_bytes:
                raise _bad(
                    path, f"it is cut off: {size_bytes} bytes, its header alone {8 + length}"
                )
            text = file.read(length)
    except OSError as error:
        raise _bad(path, (error.strerror or str(error)).lower()) from error
    try:
        fields = json.loads(text)
        metadata = fields.pop("__metadata__", None) or {}
        tensors = {name: _entry(value, 8 + length) for name, value in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _bad(path, "its header is not that of a safetensors file") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_layout(path, tensors, 8 + length, size_bytes)
    return Header(path, tensors, metadata, size_bytes)


def _entry(value: dict[str, Any], data_start: int) -> TensorEntry:
    start, end = value["data_offsets"]
    shape = tuple(int(size) for size in value["shape"])
    if min((start, end, *shape)) < 0:
        raise ValueError("negative size")
    return TensorEntry(str(value["dtype"]), shape, data_start + start, data_start + end)


def _check_layout(
    path: Path, tensors: dict[str, TensorEntry], data_start: int, size_bytes: int
) -> None:
    position = data_start
    for name, entry in tensors.items():
        expected = math.prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 0)
        # Dtypes unknown here (4-bit ones) are not ours to measure.
        if entry.start != position or (expected and expected != entry.size_bytes):
            raise _bad(path, f"its header gives `{name}` an impossible place")
        position = entry.end
    if position > size_bytes:
        raise _bad(path, f"it is cut off: {size_bytes} of {position} bytes are there")
    if position < size_bytes:
        raise _bad(path, f"{size_bytes - position} bytes follow its last tensor")


def _bad(path: Path, why: str) -> L4Error:
    return L4Error(f"cannot read `{path}`", why=why, fix="fetch or write the file again")
