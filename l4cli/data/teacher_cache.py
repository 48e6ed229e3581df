"""A teacher's outputs on disk: written once, read by row, whatever the batches look like.

in: the folder `l4 distill --write-cache` wrote, shards; out: what the teacher predicts at each
target of a row

`index.json`: how the cache was made and, of each data set, its parts: safetensors files of
consecutive rows. A part has `entries` U32 [n,K] and `entropy` U8 [n] (see `teacher_entries`) of
the positions with a loss weight, `row_offsets` I64 [rows+1], and `row_crc` U32 [rows], the CRC-32
of a row's entries and entropy. Its metadata repeats what decodes it alone.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from l4cli.data.shards import ShardSet, hash_file
from l4cli.data.teacher_entries import decode_entries, decode_entropy
from l4cli.errors import L4Error, UsageError
from l4cli.ops.batch import Batch, SparseTargets

FORMAT = "l4 teacher cache"
VERSION = 1
INDEX_FILE = "index.json"
_OPEN_PARTS = 128  # address space and page tables only; the pages belong to the system
_AGAIN = "run the `l4 distill` command with `--write-cache` again; it writes what is missing"
_NUMBERS = ("num_exact", "num_drawn", "seed", "vocab_size")
_Key = tuple[int, int]  # data set of the cache, its part


class TeacherCache:
    """All parts of one folder; `open` looks at their sizes only."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.num_exact: int = index["num_exact"]
        self.num_drawn: int = index["num_drawn"]
        self.temperature: float = float(index["temperature"])
        self.fingerprint: str = index["tokenizer_fingerprint"]
        self.vocab_size: int = index["vocab_size"]
        self.datasets: list[dict[str, Any]] = index["datasets"]

    @classmethod
    def open(cls, folder: str | Path) -> TeacherCache:
        """Read the index; refuse parts that are missing or torn."""
        folder = Path(folder)
        cache = cls(folder, read_index(folder))
        for dataset in cache.datasets:
            for facts in dataset["parts"]:
                problem = part_problem(folder, facts)
                if problem is not None:
                    raise _bad_cache(folder, problem, _AGAIN)
        return cache

    def for_shards(self, shard_sets: Sequence[ShardSet]) -> CachedRows:
        """The rows of these data sets, in this order. raises: L4Error for others, or if unfinished.

        Each caller gets open files of its own.
        """
        order = []
        for shards in shard_sets:
            what = f"cannot use the teacher cache `{self.folder}` with `{shards.folder}`"
            if shards.fingerprint != self.fingerprint:
                why = f"it speaks the tokenizer `{self.fingerprint[:12]}`, the shards "
                why += f"`{shards.fingerprint[:12]}`"
                fix = "tokenize with the teacher's tokenizer, or write a cache for these shards"
                raise UsageError(what, why=why, fix=f"{fix} with `--write-cache`")
            digests = [dataset["digest"] for dataset in self.datasets]
            if shards.digest not in digests:
                theirs = ", ".join(f"`{digest[:12]}`" for digest in digests) or "none yet"
                why = f"it was written for other shards: {theirs}; these are "
                why += f"`{shards.digest[:12]}`"
                fix = "name the shards it was written for, or write a cache for these"
                raise UsageError(what, why=why, fix=f"{fix} with `--write-cache`")
            dataset = digests.index(shards.digest)
            if not self.datasets[dataset]["complete"]:
                rows = sum(facts["rows"] for facts in self.datasets[dataset]["parts"])
                why = f"it is not finished: {rows} of {shards.num_rows} rows are written"
                raise L4Error(what, why=why, fix=_AGAIN)
            order.append(dataset)
        return CachedRows(self, order)

    @property
    def identity(self) -> dict[str, Any]:
        """What its numbers follow from, wherever it lies and however its parts are cut."""
        names = ("num_exact", "num_drawn", "temperature", "seed")
        fingerprint = self.index["teacher"]["fingerprint"]
        found = {name: self.index[name] for name in names}
        return {"teacher": fingerprint, **found, "dtype": self.index.get("dtype")}

    def describe(self) -> dict[str, Any]:
        """What people and tools want to know about it."""
        parts = [facts for dataset in self.datasets for facts in dataset["parts"]]
        totals = {name: sum(facts[name] for facts in parts) for name in ("rows", "tokens", "bytes")}
        listed = [
            {
                "name": dataset["name"],
                "digest": dataset["digest"],
                "rows": sum(facts["rows"] for facts in dataset["parts"]),
                "num_rows": dataset["num_rows"],
                "tokens": sum(facts["tokens"] for facts in dataset["parts"]),
                "complete": dataset["complete"],
            }
            for dataset in self.datasets
        ]
        return {
            "teacher": self.index["teacher"]["name"],
            "teacher_fingerprint": self.index["teacher"]["fingerprint"],
            "is_complete": all(dataset["complete"] for dataset in self.datasets),
            "num_rows": totals["rows"],
            "num_tokens": totals["tokens"],
            "size_bytes": totals["bytes"],
            "bytes_per_token": totals["bytes"] / max(1, totals["tokens"]),
            "num_exact": self.num_exact,
            "num_drawn": self.num_drawn,
            "temperature": self.temperature,
            "seed": self.index["seed"],
            "dtype": self.index.get("dtype"),
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "datasets": listed,
        }

    def verify(self) -> list[str]:
        """Read every byte; say what differs from the index, nothing if all is well."""
        problems = []
        for dataset in self.datasets:
            for facts in dataset["parts"]:
                path = self.folder / facts["file"]
                try:
                    if hash_file(path) != facts["sha256"]:
                        problems.append(f"`{path.name}` has another SHA-256 than the index says")
                    part = _Part(path, facts, self.num_exact + self.num_drawn)
                    damaged = [i for i in range(facts["rows"]) if part.row(i) is None]
                except (SafetensorError, ValueError, OSError) as error:
                    problems.append(f"`{path.name}` cannot be read: {error}")
                    continue
                if damaged:
                    rows = ", ".join(str(facts["first_row"] + i) for i in damaged[:5])
                    more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
                    problems.append(f"`{path.name}` has another checksum in row {rows}{more}")
        return problems


class CachedRows:
    """Rows of some of a cache's data sets; one thread at a time."""

    def __init__(self, cache: TeacherCache, order: Sequence[int]) -> None:
        self.cache, self._order = cache, list(order)
        parts = [dataset["parts"] for dataset in cache.datasets]
        self._first_rows = [[facts["first_row"] for facts in listed] for listed in parts]
        self._open: OrderedDict[_Key, _Part] = OrderedDict()

    def row(self, dataset: int, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids int64 and weights float32 [n,K], entropy float32 [n]. raises: L4Error if damaged"""
        return self._decoded(*self._raw(dataset, i))

    def targets(self, rows: Sequence[tuple[int, int]], batch: Batch) -> SparseTargets:
        """What the teacher predicts at the targets of a batch made of these (data set, row)s."""
        is_target_BT = batch.loss_weight.numpy() != 0
        num_targets_B = np.count_nonzero(is_target_BT, axis=1)
        found = [self._raw(*place) for place in rows]
        for (dataset, i), (entries_nK, _), num in zip(rows, found, num_targets_B, strict=True):
            if len(entries_nK) != num:
                why = f"row {i} of data set {dataset} has {num} targets there and "
                self._bad(why + f"{len(entries_nK)} here")
        entries_MK, entropy_M = (np.concatenate(part) for part in zip(*found, strict=True))
        ids_MK, weights_MK, entropy_M = self._decoded(entries_MK, entropy_M)
        if not np.array_equal(ids_MK[:, 0], batch.labels.numpy()[is_target_BT]):
            self._bad("its labels are not those of the shards")
        return SparseTargets(
            torch.from_numpy(ids_MK),
            torch.from_numpy(weights_MK),
            torch.from_numpy(entropy_M),
            self.cache.num_exact,
            self.cache.temperature,
        )

    def _raw(self, dataset: int, i: int) -> tuple[np.ndarray, np.ndarray]:
        number = self._order[dataset]
        place = bisect_right(self._first_rows[number], i) - 1
        facts = self.cache.datasets[number]["parts"][place]
        try:
            row = self._part(number, place).row(i - facts["first_row"])
        except (SafetensorError, ValueError, OSError) as error:
            self._bad(f"`{facts['file']}` cannot be read: {error}", facts)
        if row is None:
            self._bad(f"row {i} in `{facts['file']}` has another checksum than it had", facts)
        return row

    def _decoded(
        self, entries_MK: np.ndarray, entropy_M: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return *decode_entries(entries_MK, self.cache.num_exact), decode_entropy(entropy_M)

    def _part(self, number: int, place: int) -> _Part:
        """An open part; the least recently used one is closed for it."""
        key = number, place
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        facts = self.cache.datasets[number]["parts"][place]
        num_columns = self.cache.num_exact + self.cache.num_drawn
        part = _Part(self.cache.folder / facts["file"], facts, num_columns)
        self._open[key] = part
        if len(self._open) > _OPEN_PARTS:
            self._open.popitem(last=False)
        return part

    def _bad(self, why: str, facts: dict[str, Any] | None = None) -> NoReturn:
        fix = "remove the cache and write it again with `--write-cache`"
        if facts is not None:
            fix = f"remove `{self.cache.folder / facts['file']}`, then {_AGAIN}"
        raise _bad_cache(self.cache.folder, why, fix)


class _Part:
    """One memory-mapped file. raises: ValueError or SafetensorError for another layout"""

    def __init__(self, path: Path, facts: dict[str, Any], num_columns: int) -> None:
        self._file = safe_open(path, "np")
        found = {
            name: (part.get_dtype(), part.get_shape())
            for name in self._file.keys()  # noqa: SIM118
            for part in (self._file.get_slice(name),)
        }
        wanted = {
            "entries": ("U32", [facts["tokens"], num_columns]),
            "entropy": ("U8", [facts["tokens"]]),
            "row_offsets": ("I64", [facts["rows"] + 1]),
            "row_crc": ("U32", [facts["rows"]]),
        }
        for name, layout in wanted.items():
            if found.get(name) != layout:
                raise ValueError(f"`{name}` is {found.get(name)}, not {layout}")
        self._entries = self._file.get_slice("entries")
        self._entropy = self._file.get_slice("entropy")
        self._no_targets = np.zeros((0, num_columns), np.uint32), np.zeros(0, np.uint8)
        self._offsets = self._file.get_tensor("row_offsets")
        self._crc = self._file.get_tensor("row_crc")
        if self._offsets[0] != 0 or self._offsets[-1] != facts["tokens"]:
            raise ValueError(f"`row_offsets` do not go from 0 to {facts['tokens']}")
        if (np.diff(self._offsets) < 0).any():
            raise ValueError("`row_offsets` do not rise")

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Entries and entropy codes of a row; None when they are not what was written."""
        start, end = int(self._offsets[i]), int(self._offsets[i + 1])
        if start == end:
            return self._no_targets  # the library refuses empty slices
        entries_nK, entropy_n = self._entries[start:end], self._entropy[start:end]
        is_sound = row_crc(entries_nK, entropy_n) == self._crc[i]
        return (entries_nK, entropy_n) if is_sound else None


def row_crc(entries_nK: np.ndarray, entropy_n: np.ndarray) -> int:
    """CRC-32 of a row's entries, then its entropy codes, as they lie in the file."""
    return zlib.crc32(entropy_n.tobytes(), zlib.crc32(entries_nK.tobytes()))


def part_problem(folder: Path, facts: dict[str, Any]) -> str | None:
    """Why a part cannot be read, as far as its size tells."""
    path = folder / facts["file"]
    if not path.is_file():
        return f"`{path.name}` is missing"
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"`{path.name}` has {size} bytes, the index says {facts['bytes']}"
    return None


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index and check everything in it that the code relies on."""
    fix = "name a folder that `l4 distill --write-cache` wrote"
    if not folder.is_dir():
        raise _bad_cache(folder, "there is no such folder", fix)
    try:
        index = json.loads((folder / INDEX_FILE).read_bytes())
    except FileNotFoundError:
        raise _bad_cache(folder, f"`{INDEX_FILE}` is missing", fix) from None
    except OSError as error:
        why = f"`{INDEX_FILE}`: {(error.strerror or '').lower()}"
        raise _bad_cache(folder, why, fix) from error
    except (ValueError, RecursionError):
        raise _bad_cache(folder, f"`{INDEX_FILE}` is not JSON", fix) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise _bad_cache(folder, f"`{INDEX_FILE}` is not that of a teacher cache", fix)
    if index.get("version") != VERSION:
        why = f"it has version {index.get('version')!r}, and this `l4` reads {VERSION}"
        raise _bad_cache(folder, why, fix)
    teacher, datasets = index.get("teacher"), index.get("datasets")
    is_whole = (
        all(_is_count(index.get(name)) for name in _NUMBERS)
        and index["num_exact"] > 0
        and isinstance(index.get("temperature"), int | float)
        and isinstance(index.get("tokenizer_fingerprint"), str)
        and isinstance(teacher, dict)
        and all(isinstance(teacher.get(name), str) for name in ("name", "fingerprint"))
        and isinstance(datasets, list)
        and all(isinstance(dataset, dict) and _is_dataset(dataset) for dataset in datasets)
    )
    if not is_whole:
        why = f"`{INDEX_FILE}` is damaged: fields are missing or do not agree"
        raise _bad_cache(folder, why, "remove the cache and write it again with `--write-cache`")
    return index


def _is_dataset(dataset: dict[str, Any]) -> bool:
    """Whether the parts are rows one after the other, all of them if it is complete."""
    parts = dataset.get("parts")
    is_sound = (
        all(isinstance(dataset.get(name), str) for name in ("digest", "name"))
        and _is_count(dataset.get("num_rows"))
        and isinstance(dataset.get("complete"), bool)
        and isinstance(parts, list)
        and all(isinstance(facts, dict) and _is_part(facts) for facts in parts)
    )
    if not is_sound or parts is None:
        return False
    end, num_rows = 0, 0
    for facts in parts:
        if facts["first_row"] < end:
            return False
        end = facts["first_row"] + facts["rows"]
        num_rows += facts["rows"]
    is_all = num_rows == dataset["num_rows"]
    return end <= dataset["num_rows"] and dataset["complete"] == is_all


def _is_part(facts: dict[str, Any]) -> bool:
    name = facts.get("file")
    return (
        isinstance(name, str)
        and Path(name).name == name
        and isinstance(facts.get("sha256"), str)
        and all(_is_count(facts.get(key)) for key in ("first_row", "rows", "tokens", "bytes"))
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bad_cache(folder: Path, why: str, fix: str) -> L4Error:
    return L4Error(f"cannot use the teacher cache `{folder}`", why=why, fix=fix)
