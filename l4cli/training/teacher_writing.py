"""Run a teacher over shards once and write what it predicts.

in: a model, a cache writer that knows the shards; out: the rows no part of the cache holds yet

Small teachers leave most of a CPU idle (see `passes`), so several batches run at once, each on a
thread that computes alone. Batches are cut at multiples of their size, whatever row comes first:
a cache written in several goes sees the same batches, hence the same floats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from l4cli import terminal
from l4cli.data.loader import BatchMaker
from l4cli.data.shards import Row, ShardSet
from l4cli.data.teacher_cache_writer import CacheOptions, TeacherCacheWriter
from l4cli.data.teacher_entries import encode_entries
from l4cli.errors import L4Error
from l4cli.ops.batch import Batch
from l4cli.ops.sparse_targets import Entries, sparse_targets


@dataclass(frozen=True)
class _Written:
    """Rows of one batch, encoded."""

    first_row: int
    rows: list[tuple[np.ndarray, np.ndarray]]  # entries U32 [n,K], entropy float32 [n]


def write_cache(
    model: Any, writer: TeacherCacheWriter, *, micro_batch_size: int, num_workers: int = 1
) -> int:
    """Write all rows that are left of the writer's data sets; how many targets they had.

    raises: L4Error when the teacher knows fewer tokens than the shards
    """
    _check_vocabulary(model, writer.shard_sets)
    left = [sum(map(len, writer.rows_left(i))) for i in range(len(writer.shard_sets))]
    num_rows, num_targets = 0, 0
    with terminal.progress("teacher", sum(left)) as bar:
        for dataset in range(len(writer.shard_sets)):
            for rows in writer.rows_left(dataset):
                for count in write_rows(
                    model,
                    writer,
                    dataset,
                    rows,
                    micro_batch_size=micro_batch_size,
                    num_workers=num_workers,
                ):
                    num_rows, num_targets = num_rows + 1, num_targets + count
                    bar.update(num_rows, rows=f"{num_rows}/{sum(left)}", targets=str(num_targets))
    writer.finish()
    return num_targets


def write_rows(
    model: Any,
    writer: TeacherCacheWriter,
    dataset: int,
    rows: range,
    *,
    micro_batch_size: int,
    num_workers: int = 1,
) -> Iterator[int]:
    """Add the rows of a range in order; gives the number of targets of each once it is added."""
    shards = writer.shard_sets[dataset]
    chunk = model.config.text.attention_chunk_size
    maker = BatchMaker(shards.geometry, shards.tokenizer().patch_id, chunk)
    waiting = deque(_batch_ranges(rows, micro_batch_size, shards.num_rows))
    running = deque[Future[_Written]]()

    def submit(pool: ThreadPoolExecutor) -> Future[_Written]:
        numbers = waiting.popleft()
        # Rows are read here: open shards belong to one thread.
        found = [shards.row(number) for number in numbers]
        return pool.submit(_teach, model, maker, writer, dataset, numbers, found)

    num_threads = torch.get_num_threads()
    each = max(1, num_threads // num_workers)
    with ThreadPoolExecutor(
        num_workers, "l4-teacher", initializer=torch.set_num_threads, initargs=(each,)
    ) as pool:
        # MKL counts its threads for the process as a whole; the workers' number is this one's.
        torch.set_num_threads(each)
        try:
            while waiting or running:
                # No further ahead than there are workers: results take memory.
                while waiting and len(running) < num_workers:
                    running.append(submit(pool))
                written = running.popleft().result()
                if waiting:
                    running.append(submit(pool))  # before this thread is busy with the file
                for number, (entries_nK, entropy_n) in enumerate(written.rows, written.first_row):
                    if number in rows:
                        writer.add(dataset, number, entries_nK, entropy_n)
                        yield len(entropy_n)
        finally:
            wait([future for future in running if not future.cancel()])  # left by an error
            torch.set_num_threads(num_threads)


def _check_vocabulary(model: Any, shard_sets: Sequence[ShardSet]) -> None:
    num_tokens = len(model.lm_head.weight)
    for shards in shard_sets:
        if shards.vocab_size > num_tokens:
            raise L4Error(
                f"the teacher cannot read `{shards.folder}`",
                why=f"its vocabulary has {num_tokens} tokens, the shards' {shards.vocab_size}",
                fix="tokenize with the teacher's tokenizer",
            )


def _batch_ranges(rows: range, micro_batch_size: int, num_rows: int) -> list[range]:
    """The whole batches that rows are in."""
    first = rows.start - rows.start % micro_batch_size
    starts = range(first, rows.stop, micro_batch_size)
    return [range(start, min(start + micro_batch_size, num_rows)) for start in starts]


@torch.no_grad()
def _teach(
    model: Any,
    maker: BatchMaker,
    writer: TeacherCacheWriter,
    dataset: int,
    numbers: range,
    rows: list[Row],
) -> _Written:
    """One forward pass: the entries of each row."""
    shards: ShardSet = writer.shard_sets[dataset]
    names = [f"row {number} of `{shards.folder}`" for number in numbers]
    batch = maker.batch(rows, names)
    counts = (batch.loss_weight != 0).sum(1).tolist()
    uniforms_M2 = np.concatenate(
        [writer.uniforms(dataset, number, n) for number, n in zip(numbers, counts, strict=True)]
    )
    shifts_M, rounding_M = uniforms_M2[:, 0], uniforms_M2[:, 1]
    kept = teacher_entries(model, batch, writer.options, shards.vocab_size, shifts_M).to("cpu")
    entries_MK = encode_entries(
        kept.ids_MK.numpy(), kept.probabilities_MX.numpy(), kept.counts_MN.numpy(), rounding_M
    )
    ends = np.cumsum(counts)[:-1]
    split = zip(np.split(entries_MK, ends), np.split(kept.entropy_M.numpy(), ends), strict=True)
    return _Written(numbers.start, list(split))


@torch.no_grad()
def teacher_entries(
    model: Any, batch: Batch, options: CacheOptions, vocab_size: int, shifts_M: np.ndarray
) -> Entries:
    """What a model predicts at the targets of a batch."""
    weight_VD = model.lm_head.weight
    batch = batch.to(weight_VD.device)
    is_target_M = batch.loss_weight.flatten() != 0
    h_MD = model.hidden(batch).flatten(0, 1)[is_target_M]
    return sparse_targets(
        h_MD,
        weight_VD,
        batch.labels.flatten()[is_target_M],
        num_exact=options.num_exact,
        num_drawn=options.num_drawn,
        temperature=options.temperature,
        uniforms_M=torch.from_numpy(shifts_M).to(weight_VD.device),
        vocab_size=vocab_size,
    )
