"""Packed shards: rows of fixed length read through memory-mapped files, all of it checked.

in: the folder `l4 pack` wrote; out: `Row`s by number, the tokenizer, what is wrong with the files
source: DESIGN.md section 2; the layout is described where it is written, in `shard_writer`
"""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open

from l4cli.data.geometry import PictureGeometry
from l4cli.data.pieces import offsets_of
from l4cli.data.shard_writer import FORMAT, INDEX_FILE, TOKENIZER_FOLDER, VERSION
from l4cli.data.shard_writer import ShardWriter as ShardWriter
from l4cli.errors import L4Error
from l4cli.text import Tokenizer, load_tokenizer

_OPEN_SHARDS = 128  # address space and page tables only; the pages belong to the system
_HASH_BYTES = 8 << 20
_COUNTS = ("num_rows", "num_tokens", "num_documents", "num_media", "seq_len", "vocab_size")


@dataclass
class Row:
    """One row with its pictures, as it lies on disk."""

    input_ids: np.ndarray  # uint32 [T]
    document_ids: np.ndarray  # int32 [T], 0 is padding
    loss_mask: np.ndarray | None  # uint8 [T]
    media: list[bytes]
    media_positions: np.ndarray  # int64 [m], within the row
    media_tiles: np.ndarray  # int32 [m,2]
    labels: dict[str, list[str | None]] = field(default_factory=dict)  # one value a document


class ShardSet:
    """All shards of one folder; `open` reads headers only."""

    def __init__(self, folder: Path, index: dict[str, Any], digest: str) -> None:
        self.folder, self.index, self.digest = folder, index, digest
        self.num_rows: int = index["num_rows"]
        self.num_tokens: int = index["num_tokens"]
        self.num_media: int = index["num_media"]
        self.seq_len: int = index["seq_len"]
        self.vocab_size: int = index["vocab_size"]
        self.fingerprint: str = index["fingerprint"]
        self.geometry = PictureGeometry.from_dict(index["geometry"])
        self._first_rows = offsets_of(np.array([s["rows"] for s in index["shards"]])).tolist()
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Read the index and the header of every shard; refuse what does not fit."""
        folder = Path(folder)
        text = _read_index(folder)
        index = _parse_index(folder, text)
        shards = cls(folder, index, hashlib.sha256(text).hexdigest())
        for number in range(len(index["shards"])):
            shards._check_file(number)
        return shards

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the rows were made with."""
        tokenizer = load_tokenizer(self.folder / TOKENIZER_FOLDER)
        if tokenizer.fingerprint != self.fingerprint:
            self._bad("its `tokenizer` folder is not the one it was packed with")
        return tokenizer

    def row(self, i: int) -> Row:
        """Read row `i`; refuse token ids that the vocabulary does not have."""
        assert 0 <= i < self.num_rows
        number = bisect_right(self._first_rows, i) - 1
        try:
            row = self._shard(number).row(i - self._first_rows[number])
        except (SafetensorError, ValueError) as error:
            self._bad(f"`{self._name(number)}` cannot be read: {error}")
        if (largest := int(row.input_ids.max())) >= self.vocab_size:
            self._bad(
                f"row {i}, in `{self._name(number)}`, has token id {largest}; "
                f"the vocabulary has {self.vocab_size}"
            )
        return row

    def verify(self) -> list[str]:
        """Read every byte; say what differs from the index, nothing if all is well."""
        problems = []
        files = {shard["file"]: shard for shard in self.index["shards"]} | self.index["files"]
        for name, facts in files.items():
            try:
                digest = hash_file(self.folder / name)
            except OSError as error:
                problems.append(f"`{name}` cannot be read: {(error.strerror or '').lower()}")
                continue
            if digest != facts["sha256"]:
                problems.append(f"`{name}` has another SHA-256 than the index says")
        for number in range(len(self.index["shards"])):
            try:
                problems += self._shard(number).problems(self.vocab_size, self._name(number))
            except (L4Error, SafetensorError, ValueError, OSError) as error:
                problems.append(f"`{self._name(number)}` cannot be read: {error}")
        return problems

    def _name(self, number: int) -> str:
        return str(self.index["shards"][number]["file"])

    def _check_file(self, number: int) -> None:
        """Compare a shard's size and tensors with the index, reading its header only."""
        facts = self.index["shards"][number]
        path = self.folder / facts["file"]
        if not path.is_file():
            self._bad(f"`{facts['file']}` is missing")
        size = path.stat().st_size
        if size != facts["bytes"]:
            self._bad(f"`{facts['file']}` has {size} bytes, the index says {facts['bytes']}")
        try:
            with safe_open(path, "np") as file:
                found = {
                    name: (part.get_dtype(), part.get_shape())
                    for name in file.keys()  # noqa: SIM118
                    for part in (file.get_slice(name),)
                }
        except (SafetensorError, OSError) as error:
            self._bad(f"`{facts['file']}` is not valid safetensors: {error}")
        shape = [facts["rows"], self.seq_len]
        wanted: dict[str, tuple[str, list[int]]] = {
            "input_ids": ("U32", shape),
            "document_ids": ("I32", shape),
        }
        if "loss_mask" in found:
            wanted["loss_mask"] = ("U8", shape)
        if facts["media"]:
            wanted["media_offsets"] = ("I64", [facts["media"] + 1])
            wanted["media_positions"] = ("I64", [facts["media"]])
            wanted["media_tiles"] = ("I32", [facts["media"], 2])
            wanted["media"] = ("U8", found.get("media", ("", [0]))[1][:1])
        if self.index["labels"]:
            wanted["document_offsets"] = ("I64", [facts["rows"] + 1])
        for name, (dtype, dims) in wanted.items():
            if name not in found:
                self._bad(f"`{facts['file']}` has no `{name}`")
            if found[name] != (dtype, dims):
                is_now = f"{found[name][0]} {found[name][1]}"
                self._bad(f"`{name}` in `{facts['file']}` is {is_now}, not {dtype} {dims}")

    def _shard(self, number: int) -> _Shard:
        """An open shard; the least recently used one is closed for it."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = _Shard(self.folder / self._name(number), self.seq_len, self.index["labels"])
        if shard.media_problem is not None:
            self._bad(f"in `{self._name(number)}` {shard.media_problem}")
        self._open[number] = shard
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def _bad(self, why: str) -> NoReturn:
        raise _bad_shards(self.folder, why)


class _Shard:
    """One memory-mapped file; only the index of its pictures is in memory."""

    def __init__(self, path: Path, seq_len: int, labels: dict[str, list[str]]) -> None:
        self._file = safe_open(path, "np")
        names = set(self._file.keys())
        self._ids = self._file.get_slice("input_ids")
        self._documents = self._file.get_slice("document_ids")
        self._mask = self._file.get_slice("loss_mask") if "loss_mask" in names else None
        self.num_rows, self.seq_len = self._ids.get_shape()[0], seq_len
        self._values = {n: v for n, v in labels.items() if f"label.{n}" in names}
        self.media_problem: str | None = None
        self._media = None
        if "media" in names:
            self._media = self._file.get_slice("media")
            self._media_offsets = self._file.get_tensor("media_offsets")
            self._media_positions = self._file.get_tensor("media_positions")
            self._media_tiles = self._file.get_tensor("media_tiles")
            self.media_problem = self._find_media_problem()

    def row(self, i: int) -> Row:
        row = Row(
            input_ids=self._ids[i : i + 1][0],
            document_ids=self._documents[i : i + 1][0],
            loss_mask=None if self._mask is None else self._mask[i : i + 1][0],
            media=[],
            media_positions=np.zeros(0, np.int64),
            media_tiles=np.zeros((0, 2), np.int32),
            labels=self._labels(i),
        )
        if self._media is None:
            return row
        start = i * self.seq_len
        first, last = np.searchsorted(self._media_positions, [start, start + self.seq_len])
        borders = self._media_offsets[first : last + 1].tolist()
        # One slice for all pictures of the row: they lie side by side.
        data = self._media[borders[0] : borders[-1]].tobytes() if last > first else b""
        row.media = [data[a - borders[0] : b - borders[0]] for a, b in itertools.pairwise(borders)]
        row.media_positions = self._media_positions[first:last] - start
        row.media_tiles = self._media_tiles[first:last]
        return row

    def problems(self, vocab_size: int, name: str) -> list[str]:
        """Look at every row: ids in range, documents numbered 1, 2, ... and then padding."""
        for i in range(self.num_rows):
            ids, documents = self._ids[i : i + 1], self._documents[i : i + 1][0]
            if int(ids.max()) >= vocab_size:
                return [
                    f"row {i} of `{name}` has token id {int(ids.max())}, not below {vocab_size}"
                ]
            self._labels(i)
            filled = documents[: np.count_nonzero(documents)]
            steps = np.diff(filled, prepend=0)
            if (
                (filled == 0).any()
                or steps[0:1].tolist() != [1]
                or ((steps != 0) & (steps != 1)).any()
            ):
                return [f"row {i} of `{name}` does not number its documents 1, 2, ..."]
        return []

    def _labels(self, i: int) -> dict[str, list[str | None]]:
        if not self._values:
            return {}
        a, b = self._file.get_slice("document_offsets")[i : i + 2].tolist()
        found: dict[str, list[str | None]] = {}
        for name, values in self._values.items():
            column = self._file.get_slice(f"label.{name}")
            if not 0 <= a <= b <= column.get_shape()[0]:
                raise ValueError(f"`document_offsets` lead outside `label.{name}`")
            codes = column[a:b].tolist()
            if any(code >= len(values) for code in codes):
                raise ValueError(f"`label.{name}` has codes without a value")
            found[name] = [values[code] if code >= 0 else None for code in codes]
        return found

    def _find_media_problem(self) -> str | None:
        assert self._media is not None
        offsets, positions = self._media_offsets, self._media_positions
        size = self._media.get_shape()[0]
        if offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
            return f"`media_offsets` do not rise from 0 to {size}"
        end = self.num_rows * self.seq_len
        if positions[0] < 0 or positions[-1] >= end or (np.diff(positions) <= 0).any():
            return f"`media_positions` do not rise within 0 to {end}"
        if int(self._media_tiles.min()) < 1:
            return "`media_tiles` has grids without tiles"
        return None


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(_HASH_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _read_index(folder: Path) -> bytes:
    if not folder.exists():
        fix = "check the path; `l4 pack` writes shards"
        raise L4Error(f"cannot open shards `{folder}`", why="there is no such folder", fix=fix)
    if not folder.is_dir():
        why, fix = "it is a file, not a folder", "name the folder `l4 pack` wrote"
        if folder.suffix == ".tokens":
            fix = f"pack it first: `l4 pack {folder} -o shards/`"
        raise L4Error(f"cannot open shards `{folder}`", why=why, fix=fix)
    try:
        return (folder / INDEX_FILE).read_bytes()
    except FileNotFoundError:
        why = f"`{INDEX_FILE}` is missing"
        raise _bad_shards(folder, why) from None
    except OSError as error:
        raise _bad_shards(folder, f"`{INDEX_FILE}`: {(error.strerror or '').lower()}") from error


def _parse_index(folder: Path, text: bytes) -> dict[str, Any]:
    """Check everything in the index that the code relies on."""
    try:
        index = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad_shards(folder, f"`{INDEX_FILE}` is not JSON") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        why = f"`{INDEX_FILE}` was not written by `l4 pack`"
        raise _bad_shards(folder, why)
    if index.get("version") != VERSION:
        why = f"it has version {index.get('version')!r}, and this `l4` reads {VERSION}"
        raise _bad_shards(folder, why)
    shards, files = index.get("shards"), index.get("files")
    is_whole = (
        all(_is_count(index.get(name)) for name in _COUNTS)
        and isinstance(index.get("fingerprint"), str)
        and isinstance(index.get("geometry"), dict)
        and isinstance(index.get("packing"), dict)
        and _are_labels(index.get("labels"))
        and isinstance(shards, list)
        and len(shards) > 0
        and all(isinstance(shard, dict) and _is_shard(shard) for shard in shards)
        and isinstance(files, dict)
        and all(isinstance(file, dict) and "sha256" in file for file in files.values())
        and all(_is_inside(name) for name in files)
        and index["seq_len"] > 0
        and index["num_rows"] == sum(shard["rows"] for shard in shards) > 0
        and index["num_media"] == sum(shard["media"] for shard in shards)
    )
    if not is_whole:
        raise _bad_shards(folder, f"`{INDEX_FILE}` is damaged: fields are missing or do not agree")
    return index


def _is_shard(facts: dict[str, Any]) -> bool:
    name = facts.get("file")
    counts = ("rows", "tokens", "documents", "media", "bytes")
    return (
        isinstance(name, str)
        and Path(name).name == name
        and isinstance(facts.get("sha256"), str)
        and all(_is_count(facts.get(count)) for count in counts)
    )


def _is_inside(name: str) -> bool:
    """Whether a name in an index stays in its folder."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_labels(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in value.values()
    )


def _bad_shards(folder: Path, why: str) -> L4Error:
    return L4Error(
        f"cannot open shards `{folder}`",
        why=why,
        fix="name a folder that `l4 pack` finished, or pack again into a new one",
    )
