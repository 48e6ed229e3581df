"""Write a teacher cache part by part; whoever stops it loses the part in memory at most.

in: entries of one row after the other; out: the folder `teacher_cache` describes

A part is written to a hidden name, synced and renamed, then the index is replaced: at any moment
the folder is a cache of the parts its index lists. How rows are cut into parts depends on their
sizes, and on where a signal stopped it; what a row holds depends on neither.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l4cli import terminal
from l4cli.data.pieces import offsets_of
from l4cli.data.shard_writer import safetensors_parts
from l4cli.data.shards import ShardSet
from l4cli.data.teacher_cache import (
    FORMAT,
    INDEX_FILE,
    VERSION,
    part_problem,
    read_index,
    row_crc,
)
from l4cli.data.teacher_entries import (
    CODE_SCALE,
    ENTROPY_SCALE,
    MAX_COUNT,
    MAX_VOCAB_SIZE,
    VALUE_BITS,
    encode_entropy,
    row_uniforms,
)
from l4cli.errors import L4Error, Terminated, UsageError

PART_BYTES = 64 << 20  # held in memory until it is full
_ROW_BYTES = 12  # an offset and a checksum


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is made; one folder holds one way."""

    teacher: str  # a name for people
    teacher_fingerprint: str
    num_exact: int = 16  # the label and the likeliest others
    num_drawn: int = 16  # from the rest; 0: the others are unknown
    temperature: float = 1.0
    seed: int = 0
    dtype: str | None = None  # what the teacher computed in, where it is known


class TeacherCacheWriter:
    """Context manager; rows come in order, one data set after the other."""

    def __init__(
        self,
        folder: str | Path,
        options: CacheOptions,
        shard_sets: Sequence[ShardSet],
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.folder, self.options, self.part_bytes = Path(folder), options, part_bytes
        self.shard_sets = list(shard_sets)
        _check(self.folder, options, shard_sets)
        self.index = _new_index(options, shard_sets)
        self._lock: int | None = None
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._held_bytes, self._held_dataset, self._held_first = 0, 0, 0
        self._gap: tuple[int, range] = 0, range(0)  # the rows no part holds around the last one

    def __enter__(self) -> TeacherCacheWriter:
        if self.folder.exists() and not self.folder.is_dir():
            fix = "name another folder with `--write-cache`"
            raise self._refused("it is a file, and a cache is a folder", fix)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._continue()
        except OSError as error:
            self._drop_lock()
            raise self._failed(error) from error
        except L4Error:
            self._drop_lock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # A slow teacher fills a part in hours: what a signal interrupts is kept as a short one.
            is_signal = kind is not None and issubclass(kind, (KeyboardInterrupt, Terminated))
            if is_signal and self._held:
                self._write_part()
            if is_signal:
                self._write_index()  # the signal may have come before the last part was in it
                datasets = self.index["datasets"]
                rows = sum(part["rows"] for dataset in datasets for part in dataset["parts"])
                total = sum(dataset["num_rows"] for dataset in datasets)
                kept = f"{rows} of {total} rows are kept in `{self.folder}`"
                terminal.say(f"{kept}; the same command again writes the rest")
        finally:
            self._drop_lock()

    def rows_left(self, dataset: int) -> list[range]:
        """The rows that no part holds, in order. `dataset` counts the writer's shard sets."""
        gaps, start = [], 0
        facts = self._dataset(dataset)
        for part in [*facts["parts"], {"first_row": facts["num_rows"], "rows": 0}]:
            if part["first_row"] > start:
                gaps.append(range(start, part["first_row"]))
            start = part["first_row"] + part["rows"]
        return gaps

    def uniforms(self, dataset: int, row: int, num_targets: int) -> np.ndarray:
        """The numbers in [0, 1) that are a row's own, float64 [n, 2]: to draw, to round."""
        digest = self._dataset(dataset)["digest"]
        return row_uniforms(self.options.seed, digest, row, num_targets)

    def add(self, dataset: int, row: int, entries_nK: np.ndarray, entropy_n: np.ndarray) -> None:
        """Take a row: entries U32 as encoded, entropy in nats; write the part that is full."""
        assert entries_nK.dtype == np.uint32
        assert entries_nK.shape[1] == self.options.num_exact + self.options.num_drawn
        assert len(entropy_n) == len(entries_nK)
        if dataset != self._gap[0] or row not in self._gap[1]:
            self._gap = dataset, next(gap for gap in self.rows_left(dataset) if row in gap)
        rounding = self.uniforms(dataset, row, len(entries_nK))[:, 1]
        codes_n = encode_entropy(entropy_n, rounding)
        size = entries_nK.nbytes + codes_n.nbytes + _ROW_BYTES
        follows = dataset == self._held_dataset and row == self._held_first + len(self._held)
        if self._held and (not follows or self._held_bytes + size > self.part_bytes):
            self._write_part()
        if not self._held:
            self._held_dataset, self._held_first = dataset, row
        self._held.append((np.ascontiguousarray(entries_nK), codes_n))
        self._held_bytes += size
        if row + 1 == self._gap[1].stop:
            self._write_part()  # the next rows are there, or there are none

    def finish(self) -> dict[str, Any]:
        """Write what is held; the index."""
        if self._held:
            self._write_part()
        elif not all(dataset["complete"] for dataset in self.index["datasets"]):
            self._write_index()  # all rows are there, and a signal came before it said so
        return self.index

    def _dataset(self, number: int) -> dict[str, Any]:
        digest = self.shard_sets[number].digest
        found: dict[str, Any] = next(d for d in self.index["datasets"] if d["digest"] == digest)
        return found

    def _continue(self) -> None:
        """Take over what is written; refuse what was made in another way."""
        if not (self.folder / INDEX_FILE).exists():
            others = [name for name in os.listdir(self.folder) if not name.endswith(".partial")]
            if others:
                why = f"the folder holds something else, such as `{sorted(others)[0]}`"
                raise self._refused(why, "name another folder with `--write-cache`")
            self._write_index()
            return
        try:
            found = read_index(self.folder)
        except L4Error as error:
            raise self._refused(error.why, "name another folder with `--write-cache`") from error
        self._require_same(found)
        known = {dataset["digest"] for dataset in found["datasets"]}
        for dataset in found["datasets"]:
            self._drop_damaged(dataset)
        found["datasets"] += [d for d in self.index["datasets"] if d["digest"] not in known]
        self.index = found
        self._write_index()

    def _require_same(self, found: dict[str, Any]) -> None:
        """Refuse a cache that is made in another way, in the words of the command line."""
        ours, theirs = self.index, found
        fingerprints = [index["teacher"]["fingerprint"] for index in (theirs, ours)]
        tokenizers = [index["tokenizer_fingerprint"][:12] for index in (theirs, ours)]
        pairs = {
            "`--teacher`": fingerprints,  # its weights; the same may lie at another place
            "the tokenizer": tokenizers,
            "`--top-k`": [index["num_exact"] - 1 for index in (theirs, ours)],
            "`--tail-samples`": [index["num_drawn"] for index in (theirs, ours)],
            "`--temperature`": [f"{index['temperature']:g}" for index in (theirs, ours)],
            "`--seed`": [index["seed"] for index in (theirs, ours)],
            "`--dtype`": [index.get("dtype") for index in (theirs, ours)],
        }
        for name, (then, now) in pairs.items():
            if then != now and then is not None:
                raise UsageError(
                    f"cannot continue the teacher cache `{self.folder}`",
                    why=f"{name} was {then}, now it is {now}",
                    fix="repeat the options it was made with, or write another folder",
                )

    def _drop_damaged(self, dataset: dict[str, Any]) -> None:
        for facts in list(dataset["parts"]):
            problem = part_problem(self.folder, facts)
            if problem is not None:
                terminal.warn(f"in `{self.folder}` {problem}; its rows are written again")
                dataset["parts"].remove(facts)
                dataset["complete"] = False

    def _write_part(self) -> None:
        dataset = self._dataset(self._held_dataset)
        tensors = _tensors_of(self._held)
        counts = tensors["row_offsets"][0]
        names = {part["file"] for d in self.index["datasets"] for part in d["parts"]}
        free = (f"part-{number:05d}.safetensors" for number in range(len(names) + 1))
        name = next(name for name in free if name not in names)
        metadata = self._metadata(dataset["digest"])
        try:
            facts = self._write_file(name, safetensors_parts(tensors, metadata))
            part = {
                "file": name,
                "first_row": self._held_first,
                "rows": len(self._held),
                "tokens": int(counts[-1]),
                **facts,
            }
            # Forgotten first: a signal between two lines must not make two parts of the same rows.
            self._held, self._held_bytes, self._gap = [], 0, (0, range(0))
            parts = [*dataset["parts"], part]
            dataset["parts"] = sorted(parts, key=lambda part: part["first_row"])
            self._write_index()
        except OSError as error:
            raise self._failed(error) from error

    def _metadata(self, digest: str) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": str(VERSION),
            "dataset": digest,
            "first_row": str(self._held_first),
            "num_exact": str(self.options.num_exact),
            "num_drawn": str(self.options.num_drawn),
            "temperature": repr(float(self.options.temperature)),
            "vocab_size": str(self.index["vocab_size"]),
            "value_bits": str(VALUE_BITS),
            "code_scale": str(CODE_SCALE),
            "entropy_scale": str(ENTROPY_SCALE),
        }

    def _write_index(self) -> None:
        for number in range(len(self.shard_sets)):
            self._dataset(number)["complete"] = not self.rows_left(number)
        text = json.dumps(self.index, ensure_ascii=False, indent=1) + "\n"
        self._write_file(INDEX_FILE, [text.encode()])

    def _write_file(self, name: str, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """Write, sync and name one file; its size and hash."""
        digest, size = hashlib.sha256(), 0
        hidden = self.folder / f".{name}.partial"
        try:
            with open(hidden, "wb") as file:
                for part in parts:
                    digest.update(part)
                    size += file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, self.folder / name)
            assert self._lock is not None
            os.fsync(self._lock)  # the folder, and with it the name
        finally:
            hidden.unlink(missing_ok=True)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def _take_lock(self) -> None:
        # On the folder itself: nothing is left behind.
        lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            fix = "wait until it is done, or name another folder with `--write-cache`"
            raise self._refused("another process is writing it", fix) from None
        self._lock = lock

    def _drop_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _failed(self, error: OSError) -> L4Error:
        parts = [part for dataset in self.index["datasets"] for part in dataset["parts"]]
        rows = sum(part["rows"] for part in parts)
        why = (error.strerror or str(error)).lower()
        fix = "free some space or check the permissions; the same command continues"
        return self._refused(f"{why}; {rows} rows in {len(parts)} parts are kept", fix)

    def _refused(self, why: str, fix: str) -> L4Error:
        return L4Error(f"cannot write the teacher cache `{self.folder}`", why=why, fix=fix)


def _tensors_of(held: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """A part's tensors by name, each as pieces to be written one after the other."""
    crc = np.array([row_crc(entries, entropy) for entries, entropy in held], np.uint32)
    return {
        "entries": [entries for entries, _ in held],
        "entropy": [entropy for _, entropy in held],
        "row_offsets": [offsets_of(np.array([len(entropy) for _, entropy in held]))],
        "row_crc": [crc],
    }


def _new_index(options: CacheOptions, shard_sets: Sequence[ShardSet]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "teacher": {"name": options.teacher, "fingerprint": options.teacher_fingerprint},
        "num_exact": options.num_exact,
        "num_drawn": options.num_drawn,
        "temperature": float(options.temperature),
        "seed": options.seed,
        "dtype": options.dtype,
        "tokenizer_fingerprint": shard_sets[0].fingerprint,
        "vocab_size": shard_sets[0].vocab_size,
        "datasets": [
            {
                "digest": shards.digest,
                "name": str(shards.folder),
                "num_rows": shards.num_rows,
                "complete": False,
                "parts": [],
            }
            for shards in shard_sets
        ],
    }


def _check(folder: Path, options: CacheOptions, shard_sets: Sequence[ShardSet]) -> None:
    """Refuse what the format cannot hold."""
    what = f"cannot write the teacher cache `{folder}`"
    if options.num_exact < 1 or not 0 <= options.num_drawn <= MAX_COUNT:
        why = f"there are {options.num_exact} exact entries and {options.num_drawn} drawn ones"
        fix = f"keep at least 1 exact entry (the label) and draw 0 to {MAX_COUNT}"
        raise UsageError(what, why=why, fix=fix)
    first = shard_sets[0]
    if first.vocab_size > MAX_VOCAB_SIZE:
        why = f"the vocabulary has {first.vocab_size:,} tokens, and an entry has room for "
        fix = "train with the teacher itself, without a cache"
        raise L4Error(what, why=f"{why}{MAX_VOCAB_SIZE:,}", fix=fix)
    for other in shard_sets[1:]:
        if other.fingerprint != first.fingerprint:
            why = f"`{first.folder}` and `{other.folder}` have different tokenizers"
            raise UsageError(what, why=why, fix="tokenize both with the same `--tokenizer`")
