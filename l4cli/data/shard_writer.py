"""Write packed rows as shards: a folder of safetensors files and their index.

in: `Rows`, then the header of their token stream; out: the folder DESIGN section 2 describes

Per shard: `input_ids` U32 [rows,T], `document_ids` I32 [rows,T]; where any row has them
`loss_mask` U8 [rows,T]; `media` U8 [bytes], `media_offsets` I64 [m+1], `media_positions` I64 [m]
(in the flattened `input_ids`), `media_tiles` I32 [m,2]; `label.NAME` I32 [documents] with
`document_offsets` I64 [rows+1]. `index.json` is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from l4cli.data.packing import Rows
from l4cli.data.pieces import offsets_of
from l4cli.data.staging import StagedFolder
from l4cli.data.stream import StreamHeader
from l4cli.errors import L4Error

FORMAT = "l4-shards"
VERSION = 1
INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"
# A shard is held in memory until it is full.
SHARD_BYTES = 128 << 20
_METADATA = {"format": FORMAT, "version": str(VERSION)}
_DTYPES = {"uint32": "U32", "int32": "I32", "int64": "I64", "uint8": "U8"}


class ShardWriter:
    """Context manager: without `finish` nothing is left."""

    def __init__(
        self,
        folder: str | Path,
        *,
        seq_len: int,
        packing: Mapping[str, Any],
        shard_rows: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.seq_len, self.packing = seq_len, dict(packing)
        self.shard_rows, self.shard_bytes = shard_rows, shard_bytes
        self.num_rows, self.num_tokens = 0, 0
        self._staged = StagedFolder(folder)
        self._held: list[Rows] = []
        self._held_rows, self._held_bytes = 0, 0
        self._shards: list[dict[str, Any]] = []
        self._files: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ShardWriter:
        self._staged.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._staged.__exit__(kind, error, trace)

    def add(self, rows: Rows) -> None:
        """Take rows; write each shard that is full."""
        row_bytes = self.seq_len * 9 + rows.media_bytes()  # 9: two ids of 4 bytes and a mask
        ends = np.cumsum(row_bytes)
        start, before = 0, 0
        while start < rows.num_rows:
            room = self.shard_bytes - self._held_bytes
            stop = int(np.searchsorted(ends, before + room, side="right"))
            if self.shard_rows is not None:
                stop = min(stop, start + self.shard_rows - self._held_rows)
            if stop <= start and not self._held:
                stop = start + 1  # a single row may be larger than a shard
            if stop <= start:
                self._write_shard()
                continue
            stop = min(stop, rows.num_rows)
            is_all = (start, stop) == (0, rows.num_rows)
            self._held.append(rows if is_all else rows.select(np.arange(start, stop)))
            self._held_rows += stop - start
            self._held_bytes += int(ends[stop - 1]) - before
            start, before = stop, int(ends[stop - 1])

    def finish(self, header: StreamHeader, label_values: Mapping[str, list[str]]) -> dict[str, Any]:
        """Write what is held, the tokenizer and the index, and give the folder its name."""
        if self._held:
            self._write_shard()
        if not self._shards:
            raise L4Error(
                f"cannot write `{self._staged.shown}`",
                why="the token stream holds no document",
                fix="check the input of `l4 tokenize`",
            )
        index = self._index(header, label_values)
        with self._writing():
            self._write_tokenizer(header.tokenizer_files)
            index["files"] = self._files
            text = json.dumps(index, ensure_ascii=False, indent=1) + "\n"
            self._write_file(INDEX_FILE, [text.encode()])
            self._staged.commit()
        return index

    def _index(self, header: StreamHeader, label_values: Mapping[str, list[str]]) -> dict[str, Any]:
        totals = {
            f"num_{name}": sum(shard[name] for shard in self._shards)
            for name in ("rows", "tokens", "documents", "media")
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "seq_len": self.seq_len,
            **totals,
            "fill": totals["num_tokens"] / (totals["num_rows"] * self.seq_len),
            "vocab_size": header.vocab_size,
            "fingerprint": header.fingerprint,
            "geometry": header.geometry.to_dict(),
            "packing": self.packing,
            "labels": dict(label_values),
            "shards": self._shards,
        }

    def _write_shard(self) -> None:
        tensors = _tensors_of(self._held, self.seq_len)
        name = f"shard-{len(self._shards):05d}.safetensors"
        num_tokens = sum(int(np.count_nonzero(part)) for part in tensors["document_ids"])
        with self._writing():
            facts = self._write_file(name, safetensors_parts(tensors, _METADATA))
        self._shards.append(
            {
                "file": name,
                "rows": self._held_rows,
                "tokens": num_tokens,
                "documents": sum(int(rows.num_documents.sum()) for rows in self._held),
                "media": sum(len(rows.media) for rows in self._held),
                **facts,
            }
        )
        self.num_rows += self._held_rows
        self.num_tokens += num_tokens
        self._held, self._held_rows, self._held_bytes = [], 0, 0

    def _write_tokenizer(self, files: Mapping[str, str]) -> None:
        (self._staged.path / TOKENIZER_FOLDER).mkdir()
        for name, text in sorted(files.items()):
            if Path(name).name != name or name.startswith("."):
                raise L4Error(
                    "cannot write the tokenizer of the token stream",
                    why=f"`{name}` is not a plain file name",
                    fix="tokenize again",
                )
            path = f"{TOKENIZER_FOLDER}/{name}"
            self._files[path] = self._write_file(path, [text.encode()])

    def _write_file(self, name: str, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """Write and sync one file; its size and hash."""
        digest, size = hashlib.sha256(), 0
        with open(self._staged.path / name, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                digest.update(view)
                size += view.nbytes
                while view.nbytes:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        return {"bytes": size, "sha256": digest.hexdigest()}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._staged.failed(error) from error


def _tensors_of(held: Sequence[Rows], seq_len: int) -> dict[str, list[np.ndarray]]:
    """The shard's tensors by name, each as parts to be written one after the other."""
    num_rows = np.array([rows.num_rows for rows in held])
    tensors = {
        "input_ids": [rows.input_ids for rows in held],
        "document_ids": [rows.document_ids for rows in held],
    }
    masks = [rows.loss_mask for rows in held]
    # Padding is 0 in the mask, and says nothing.
    if any(
        rows.loss_mask is not None and ((rows.loss_mask == 0) & (rows.document_ids != 0)).any()
        for rows in held
    ):
        shapes = [rows.input_ids.shape for rows in held]
        tensors["loss_mask"] = [
            np.ones(shape, np.uint8) if mask is None else mask
            for mask, shape in zip(masks, shapes, strict=True)
        ]
    media = [item for rows in held for item in rows.media]
    if media:
        first_rows = offsets_of(num_rows).tolist()
        tensors["media"] = [np.frombuffer(item, np.uint8) for item in media]
        tensors["media_offsets"] = [offsets_of(np.array([len(item) for item in media]))]
        tensors["media_positions"] = [
            (rows.media_rows + first) * seq_len + rows.media_positions
            for rows, first in zip(held, first_rows, strict=False)
        ]
        tensors["media_tiles"] = [rows.media_tiles for rows in held]
    names = {name: None for rows in held for name in rows.labels}
    counts = [rows.num_documents for rows in held]
    if names:
        tensors["document_offsets"] = [offsets_of(np.concatenate(counts))]
    for name in names:
        tensors[f"label.{name}"] = [
            rows.labels.get(name, np.full(int(count.sum()), -1, np.int32))
            for rows, count in zip(held, counts, strict=True)
        ]
    return tensors


def safetensors_parts(
    tensors: Mapping[str, Sequence[np.ndarray]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, without a copy of the tensors in one piece.

    Wide elements come first, so that everything is aligned.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    offset = 0
    for name in order:
        parts = tensors[name]
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        size = sum(part.nbytes for part in parts)
        fields[name] = {
            "dtype": _DTYPES[parts[0].dtype.name],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    for name in order:
        for part in tensors[name]:
            if part.nbytes:  # an empty array has no memory to show
                yield np.ascontiguousarray(part).data.cast("B")
