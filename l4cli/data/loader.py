"""From packed shards to batches: mixed, shuffled, decoded ahead of use, resumable to the sample.

in: folders of shards, perhaps weighted; out: the micro-batches of one global step at a time

The stream of samples is one for all ranks: a global step takes the next `batch_size` samples and
rank r its r-th share of them. The state counts samples of steps that were handed out, never what
was prepared ahead.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import open_picture, tiles_of
from l4cli.data.mixing import Mixture, parse_mixture, whole_weights
from l4cli.data.shards import Row, ShardSet
from l4cli.data.teacher_cache import TeacherCache
from l4cli.errors import L4Error, UsageError
from l4cli.ops.batch import Batch, Segments
from l4cli.text import Tokenizer, num_tiles

STEPS_AHEAD = 2
_WAIT_S = 0.1  # how long the thread sleeps before it looks whether it shall stop


class BatchMaker:
    """Turns rows into a `Batch`; vectorised over the rows, pictures decoded one by one."""

    def __init__(
        self, geometry: PictureGeometry, patch_id: int | None, attention_chunk_size: int | None
    ) -> None:
        self.geometry, self.patch_id = geometry, patch_id
        self.attention_chunk_size = attention_chunk_size

    def batch(self, rows: Sequence[Row], names: Sequence[str]) -> Batch:
        """Build one micro-batch; `names` say where the rows come from, for errors."""
        ids_BT = np.stack([row.input_ids for row in rows]).astype(np.int64)
        documents_BT = np.stack([row.document_ids for row in rows])
        masks = [row.loss_mask for row in rows]
        mask_BT = None
        if any(mask is not None for mask in masks):
            ones = np.ones(ids_BT.shape[1], np.uint8)
            mask_BT = np.stack([ones if mask is None else mask for mask in masks])
        document_ids_BT = torch.from_numpy(documents_BT)
        return Batch(
            input_ids=torch.from_numpy(ids_BT),
            labels=torch.from_numpy(_labels(ids_BT)),
            loss_weight=torch.from_numpy(_loss_weight(documents_BT, mask_BT)),
            document_ids=document_ids_BT,
            position_ids=torch.from_numpy(_positions(documents_BT)),
            segments=Segments.from_document_ids(document_ids_BT, self.attention_chunk_size),
            pixel_values=self._pixels(rows, names),
        )

    def _pixels(self, rows: Sequence[Row], names: Sequence[str]) -> torch.Tensor | None:
        tiles, has_patches = [], self.patch_id is not None
        for row, name in zip(rows, names, strict=True):
            found = [self._tiles(row, i, name) for i in range(len(row.media))]
            num_patches = sum(len(part) for part in found) * self.geometry.tokens_per_tile
            stands = np.count_nonzero(row.input_ids == self.patch_id) if has_patches else 0
            if stands != num_patches:
                raise _bad_row(name, f"{stands} picture tokens stand for {num_patches} patches")
            tiles += found
        return torch.from_numpy(np.concatenate(tiles)) if tiles else None

    def _tiles(self, row: Row, i: int, name: str) -> np.ndarray:
        grid = int(row.media_tiles[i, 0]), int(row.media_tiles[i, 1])
        try:
            tiles = tiles_of(open_picture(row.media[i]), self.geometry)
        except L4Error as error:
            raise _bad_row(name, f"a picture cannot be decoded: {error.why}") from error
        if len(tiles) != num_tiles(*grid):
            why = f"a picture gives {len(tiles)} tiles, and {num_tiles(*grid)} were packed"
            raise _bad_row(name, why)
        return tiles


def _labels(ids_BT: np.ndarray) -> np.ndarray:
    """The next token; the last column has none and repeats its own."""
    return np.concatenate([ids_BT[:, 1:], ids_BT[:, -1:]], axis=1)


def _loss_weight(documents_BT: np.ndarray, mask_BT: np.ndarray | None) -> np.ndarray:
    """1 where the next token belongs to the same document and counts as a target."""
    weight_BT = np.zeros(documents_BT.shape, np.float32)
    weight_BT[:, :-1] = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, 1:] != 0)
    if mask_BT is not None:
        weight_BT[:, :-1] *= mask_BT[:, 1:] != 0
    return weight_BT


def _positions(documents_BT: np.ndarray) -> np.ndarray:
    """Count from 0 in each document; padding counts too, and nothing looks at it."""
    place_T = np.arange(documents_BT.shape[1])
    is_start_BT = np.ones(documents_BT.shape, bool)
    is_start_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    start_BT = np.maximum.accumulate(np.where(is_start_BT, place_T, 0), axis=1)
    return place_T - start_BT


def _bad_row(name: str, why: str) -> L4Error:
    return L4Error(f"cannot use {name}", why=why, fix="tokenize and pack the data again")


class ShardSource:
    """An endless source of global steps over one or several folders of shards."""

    def __init__(
        self,
        specs: Sequence[str],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        attention_chunk_size: int | None,
        passes_at_once: int = 1,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        _check_sizes(batch_size, micro_batch_size, world)
        parts = parse_mixture(specs)
        self.datasets = [ShardSet.open(part.path) for part in parts]
        _check_alike(self.datasets)
        self._teacher = None if teacher_cache is None else teacher_cache.for_shards(self.datasets)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        # Passes that run at once share the rows of one micro-batch.
        self.passes_at_once = min(passes_at_once, micro_batch_size)
        self.rank, self.world = rank, world
        # Text has no use for a geometry; the one that counts is that of the pictures.
        with_pictures = [shards for shards in self.datasets if shards.num_media]
        self.geometry = (with_pictures or self.datasets)[0].geometry
        first = self.datasets[0]
        self.seq_len, self.fingerprint = first.seq_len, first.fingerprint
        self.vocab_size = first.vocab_size
        self.num_rows = sum(shards.num_rows for shards in self.datasets)
        self.num_tokens = sum(shards.num_tokens for shards in self.datasets)
        self.num_media = sum(shards.num_media for shards in self.datasets)
        self._tokenizer = first.tokenizer()
        patch_id = self._tokenizer.patch_id
        self._maker = BatchMaker(self.geometry, patch_id, attention_chunk_size)
        rows = [shards.num_rows for shards in self.datasets]
        self._mixture = Mixture(whole_weights(parts, rows), rows, seed, shuffle)
        self._counts = list(self._mixture.counts)  # of consumed steps
        self._ahead: _Ahead | None = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer all data sets were made with."""
        return self._tokenizer

    @property
    def num_samples(self) -> int:
        """Global samples handed out so far."""
        return sum(self._counts)

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next global step, each in `passes_at_once` parts."""
        if self._ahead is None:
            self._mixture.counts = list(self._counts)
            self._ahead = _Ahead(self._prepare)
        batches, self._counts = self._ahead.take()
        return batches

    def state_dict(self) -> dict[str, Any]:
        """What to keep: the samples consumed of each data set, and which data they are of."""
        return {
            "num_samples": self.num_samples,
            "counts": list(self._counts),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the samples of a state; batch size and ranks may be others.

        raises: UsageError when the data, their weights, the seed or the order are others
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise UsageError(
                    "cannot continue on other data",
                    why=f"the checkpoint was made with {_described(name, state.get(name))}, "
                    f"now it is {_described(name, mine)}",
                    fix="name the same data in the same order, with the same weights and "
                    "`--seed`, or begin a new run with `--init-from`",
                )
        self.close()
        self._counts = [int(count) for count in state["counts"]]

    def close(self) -> None:
        """Stop the thread; what it prepared is forgotten and made again by `next`."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _identity(self) -> dict[str, Any]:
        return {
            "datasets": [shards.digest for shards in self.datasets],
            "weights": list(self._mixture.weights),
            "seed": self._mixture.seed,
            "shuffle": self._mixture.shuffle,
        }

    def _prepare(self) -> tuple[list[Batch], list[int]]:
        """Make the next step; the counts say where the stream stands after it."""
        drawn = [self._mixture.draw() for _ in range(self.batch_size)]
        share = self.batch_size // self.world
        mine = drawn[self.rank * share : (self.rank + 1) * share]
        batches = []
        size = -(-self.micro_batch_size // self.passes_at_once)
        for start in range(0, share, size):
            rows, names, places = [], [], []
            for dataset, epoch, place in mine[start : start + size]:
                number = self._mixture.row(dataset, epoch, place)
                rows.append(self.datasets[dataset].row(number))
                names.append(f"row {number} of `{self.datasets[dataset].folder}`")
                places.append((dataset, number))
            batch = self._maker.batch(rows, names)
            if self._teacher is not None:
                batch = replace(batch, teacher=self._teacher.targets(places, batch))
            batches.append(batch)
        return batches, list(self._mixture.counts)


class _Ahead:
    """A thread that prepares a few steps ahead and hands over what went wrong, too."""

    def __init__(self, prepare: Any) -> None:
        self._prepare = prepare
        self._ready: queue.Queue[Any] = queue.Queue(STEPS_AHEAD)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="l4-loader", daemon=True)
        self._thread.start()

    def take(self) -> tuple[list[Batch], list[int]]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # it stays true for whoever asks again
            raise item
        batches, counts = item
        return batches, counts

    def stop(self) -> None:
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        is_failed = False
        while not is_failed and not self._is_stopped.is_set():
            try:
                item: Any = self._prepare()
            except BaseException as error:
                item, is_failed = error, True
            while not self._is_stopped.is_set():
                try:
                    self._ready.put(item, timeout=_WAIT_S)
                    break
                except queue.Full:
                    continue


def eval_batches(
    folder: str | Path | ShardSet,
    micro_batch_size: int,
    attention_chunk_size: int | None,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Every row once, in order; the last batch may be smaller."""
    shards = folder if isinstance(folder, ShardSet) else ShardSet.open(folder)
    maker = BatchMaker(shards.geometry, shards.tokenizer().patch_id, attention_chunk_size)
    num_rows = shards.num_rows if max_rows is None else min(max_rows, shards.num_rows)
    for start in range(0, num_rows, micro_batch_size):
        numbers = range(start, min(start + micro_batch_size, num_rows))
        names = [f"row {number} of `{shards.folder}`" for number in numbers]
        yield maker.batch([shards.row(number) for number in numbers], names)


def _check_sizes(batch_size: int, micro_batch_size: int, world: int) -> None:
    assert batch_size > 0
    assert micro_batch_size > 0
    if batch_size % world:
        raise UsageError(
            f"cannot share `--batch-size {batch_size}` among {world} processes",
            why="every process takes as many sequences of a step as any other",
            fix=f"choose a multiple of {world}, such as `--batch-size "
            f"{-(-batch_size // world) * world}`",
        )
    share = batch_size // world
    if share % micro_batch_size:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        raise UsageError(
            f"`--micro-batch-size {micro_batch_size}` does not divide a process's share of a step",
            why=f"each process takes {share} sequences a step",
            fix="choose one of " + ", ".join(f"`{size}`" for size in fitting[-8:]),
        )


def _check_alike(datasets: Sequence[ShardSet]) -> None:
    """Refuse a mixture whose rows cannot stand in one batch."""
    first = datasets[0]
    for other in datasets[1:]:
        what = f"cannot mix `{first.folder}` and `{other.folder}`"
        if other.seq_len != first.seq_len:
            why = f"their rows have {first.seq_len} and {other.seq_len} tokens"
            raise L4Error(what, why=why, fix="pack both with the same `--seq-len`")
        if other.fingerprint != first.fingerprint:
            why = f"their tokenizers are `{first.fingerprint[:12]}` and `{other.fingerprint[:12]}`"
            raise L4Error(what, why=why, fix="tokenize both with the same `--tokenizer`")
    with_pictures = [shards for shards in datasets if shards.num_media]
    for other in with_pictures[1:]:
        if other.geometry != with_pictures[0].geometry:
            raise L4Error(
                f"cannot mix `{with_pictures[0].folder}` and `{other.folder}`",
                why=f"the pictures of one are {with_pictures[0].geometry.describe()}; "
                f"of the other {other.geometry.describe()}",
                fix="tokenize both with the same `--preset`",
            )


def _described(name: str, value: Any) -> str:
    if name == "datasets":
        return "data sets " + ", ".join(f"`{str(digest)[:12]}`" for digest in value or [])
    return f"{name} {value}"
