"""A saved cache: a safetensors file, written without a second copy in memory, mapped when read.

in: named tensors and metadata; out: the same, or L4Error
source: the safetensors format (8 bytes of header length, a JSON header, data)
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from l4cli.errors import L4Error

FORMAT = "l4-cache-2"
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
_COPY_BYTES = 64 << 20  # written at once


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all."""
    header: dict[str, object] = {"__metadata__": {"format": FORMAT, **metadata}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    # The process id keeps two writers apart; the rename makes the last one whole.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in tensors.values():
                _write_tensor(file, tensor)
        os.replace(partial, path)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        fix = "free some space, or name another file"
        raise L4Error(f"cannot write cache `{path}`", why=why, fix=fix) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_tensor(file: object, tensor: Tensor) -> None:
    """A slice of the first dimension's rows after the other: views need no copy of the whole."""
    row_bytes = tensor.element_size() * math.prod(tensor.shape[1:]) if tensor.ndim else 0
    if tensor.ndim == 0 or not tensor.numel():
        return
    if row_bytes > _COPY_BYTES and tensor.ndim > 1:
        for row in tensor:
            _write_tensor(file, row)
        return
    step = max(1, _COPY_BYTES // max(1, row_bytes))
    for rows in tensor.split(step):
        file.write(rows.cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[attr-defined]


def read(path: Path, device: torch.device | str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Open a file that `write` made; on the CPU pages are read when they are needed."""
    what = f"cannot open cache `{path}`"
    fix = "make it again, or name another file"
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise L4Error(what, why=" ".join(str(error).lower().split()), fix=fix) from error
    if metadata.get("format") != FORMAT:
        raise L4Error(what, why=f"it is not marked as `{FORMAT}`", fix=fix)
    return metadata, tensors
