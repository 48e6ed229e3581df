"""The weights of a model as the CPU kernels read them, in one file that is mapped, never copied.

in: a checkpoint or a model; out: `CKPT/l4/kernels.safetensors`, whole or not there; `KernelFile`
Blobs of bytes, each from a page's start on; an expert's three maps lie together in one. Metadata
tell the layout's version, the config and the weights it was made from: another one is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import mmap
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from l4cli.checkpoint.atomic import replacing
from l4cli.checkpoint.headers import read_header
from l4cli.checkpoint.manifest import KERNELS
from l4cli.errors import L4Error
from l4cli.inference import huge_pages
from l4cli.model import Llama4Config
from l4cli.ops.weight_only import LAYOUT_VERSION, Layout

FORMAT = "l4-kernels-1"
PAGE = 4096
_ENTRY_BYTES = 200  # of a blob in the header, at most
_READ_BYTES = 16 << 20  # at once
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 14  # of each weights file, to know it again


@dataclass(frozen=True)
class Blob:
    """Bytes to be written: weights in the kernels' layout, or an array as it is in memory."""

    name: str
    parts: list[tuple[Layout | None, Tensor]]  # each part [bytes] uint8, a multiple of 64 long

    @classmethod
    def of(cls, name: str, array: Tensor) -> Blob:
        """A plain array."""
        flat = array.contiguous().view(-1).view(torch.uint8)
        return cls(name, [(None, flat)])


class KernelFile:
    """A mapped file: where each weight and array lies in memory."""

    def __init__(self, memory: Any, metadata: dict[str, str], starts: dict[str, int]) -> None:
        """`memory`: anything with a buffer; `starts`: of each blob in it."""
        self.bytes = np.frombuffer(memory, dtype=np.uint8)
        self.metadata, self.starts = metadata, starts
        self.address = self.bytes.ctypes.data
        self.layouts = {
            name: [Layout(**part) for part in parts]
            for name, parts in json.loads(metadata["layouts"]).items()
        }

    @property
    def size_bytes(self) -> int:
        return len(self.bytes)

    def settle(self) -> None:
        """Bring a mapped file into huge pages where it lies; others may read it meanwhile."""
        huge_pages.take_over(self.address, self.size_bytes)

    def weights(self, name: str) -> list[tuple[Layout, int]]:
        """The laid out weights of a blob and their addresses."""
        found, at = [], self.address + self.starts[name]
        for layout in self.layouts[name]:
            found.append((layout, at))
            at += layout.num_bytes
        return found

    def weight_bytes(self, name: str) -> list[tuple[Layout, Tensor]]:
        """The same as tensors that share the file's memory."""
        return [
            (layout, self.array(name, torch.uint8, layout.num_bytes, at - self.place(name)))
            for layout, at in self.weights(name)
        ]

    def place(self, name: str) -> int:
        """The address of a blob."""
        return self.address + self.starts[name]

    def array(self, name: str, dtype: torch.dtype, count: int, offset: int = 0) -> Tensor:
        """A plain array, sharing the file's memory: not to be written to."""
        start = self.starts[name] + offset
        with warnings.catch_warnings():
            # Torch knows no memory that cannot be written to.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.from_numpy(self.bytes[start : start + count * dtype.itemsize])
        return flat.view(dtype)


def config_fingerprint(config: Llama4Config) -> str:
    """Of everything that decides what is computed."""
    facts = json.dumps(asdict(config.text), sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def source_fingerprint(folder: Path) -> str:
    """Tells other weights in the same folder apart, from sizes and samples."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def write(file: IO[bytes], blobs: Iterable[Blob], num_blobs: int, facts: dict[str, str]) -> None:
    """Write blobs one after the other as they come; the header, whose room was kept, at last."""
    room = _up(8 + 4096 + num_blobs * _ENTRY_BYTES * 3, PAGE)
    file.write(b"\0" * room)
    header: dict[str, Any] = {}
    layouts: dict[str, list[dict[str, Any]]] = {}
    end = 0
    for blob in blobs:
        start = end
        for _, part in blob.parts:
            file.write(part.numpy().data)
            end += part.numel()
        fill = -end % PAGE
        file.write(b"\0" * fill)
        end += fill
        header[blob.name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        found = [asdict(layout) for layout, _ in blob.parts if layout is not None]
        if found:
            layouts[blob.name] = found
    metadata = {**facts, "format": FORMAT, "layout": str(LAYOUT_VERSION)}
    header["__metadata__"] = {**metadata, "layouts": json.dumps(layouts, separators=(",", ":"))}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    assert len(encoded) <= room - 8, "the header has outgrown its room"
    file.seek(0)
    file.write((room - 8).to_bytes(8, "little") + encoded.ljust(room - 8))
    file.seek(0, io.SEEK_END)


def write_beside(
    folder: Path, blobs: Iterable[Blob], num_blobs: int, facts: dict[str, str]
) -> Path:
    """Put the file into a checkpoint's folder, whole or not at all.

    raises: PermissionError where nothing may be written, L4Error for a full disk
    """
    path = folder / KERNELS
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            write(file, blobs, num_blobs, facts)
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise PermissionError(*error.args) from error
        why = (error.strerror or str(error)).lower()
        fix = "free some space; `--dtype bf16` needs no such file, and four times the memory"
        raise L4Error(f"cannot write `{path}`", why=why, fix=fix) from error
    return path


def in_memory(blobs: Iterable[Blob], num_blobs: int, facts: dict[str, str]) -> KernelFile:
    """The same without a file."""
    buffer = io.BytesIO()
    write(buffer, blobs, num_blobs, facts)
    memory = _huge_pages(buffer.tell())
    memory[:] = buffer.getbuffer()
    return _opened(memory)


def open_file(path: Path, *, is_mapped: bool = False) -> KernelFile:
    """Map a file, or read it into huge pages: decoding from those was a tenth faster.

    What is never touched of a mapped file never comes into memory.
    raises: L4Error for what is no such file, or of another version
    """
    header = read_header(path)
    what, fix = f"cannot use `{path}`", "remove it: it is made anew"
    if header.metadata.get("format") != FORMAT:
        raise L4Error(what, why=f"it is not marked as `{FORMAT}`", fix=fix)
    if header.metadata.get("layout") != str(LAYOUT_VERSION):
        raise L4Error(what, why="its layout is of another version", fix=fix)
    with path.open("rb") as file:
        if is_mapped:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            memory = _huge_pages(header.size_bytes)
            _fill(memory, file.fileno(), path)
    return _opened(memory)


def _huge_pages(size_bytes: int) -> mmap.mmap:
    """Memory of our own, in as large pages as the system has."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system may have none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _fill(memory: mmap.mmap, file: int, path: Path) -> None:
    """Read a whole file; the lock that other threads wait for is free meanwhile."""
    view, at = memoryview(memory), 0
    while at < len(view):
        count = os.preadv(file, [view[at : at + _READ_BYTES]], at)
        if count == 0:
            fix = "remove it: it is made anew"
            raise L4Error(f"cannot use `{path}`", why="it has become shorter", fix=fix)
        at += count


def _opened(memory: mmap.mmap) -> KernelFile:
    length = int.from_bytes(memory[:8], "little")
    header = json.loads(memory[8 : 8 + length])
    metadata = header.pop("__metadata__")
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
    return KernelFile(memory, metadata, starts)


def is_current(path: Path, config: Llama4Config, folder: Path) -> bool:
    """Whether a file is there and was made from these weights by this version."""
    if not path.is_file():
        return False
    try:
        found = read_header(path).metadata
    except L4Error:
        return False
    wanted = {
        "format": FORMAT,
        "layout": str(LAYOUT_VERSION),
        "config": config_fingerprint(config),
        "source": source_fingerprint(folder),
    }
    return all(found.get(name) == value for name, value in wanted.items())


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
