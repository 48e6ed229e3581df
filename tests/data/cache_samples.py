"""Teacher caches for tests: entries of drawn distributions, through the real writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from l4cli.data.loader import eval_batches
from l4cli.data.shards import ShardSet
from l4cli.data.teacher_cache_writer import CacheOptions, TeacherCacheWriter
from l4cli.data.teacher_entries import encode_entries

OPTIONS = CacheOptions("teacher", "t0", num_exact=3, num_drawn=4, seed=7)


def drawn_row(
    shards: ShardSet, row: int, uniforms_n2: np.ndarray, options: CacheOptions = OPTIONS
) -> tuple[np.ndarray, np.ndarray]:
    """Entries and entropy of a row: any distinct ids, any probabilities, the true labels."""
    labels_n = labels_of(shards, row)
    rng = np.random.default_rng([row, shards.num_rows])
    num, num_exact, num_drawn = len(labels_n), options.num_exact, options.num_drawn
    steps_nK = np.arange(num_exact + num_drawn) * 11
    ids_nK = (labels_n[:, None] + steps_nK) % shards.vocab_size
    p_nX = -np.sort(-rng.random((num, num_exact)), axis=1) / (num_exact + 1)
    counts_nN = np.zeros((num, num_drawn), np.int64)
    for _ in range(num_drawn):
        counts_nN[np.arange(num), rng.integers(0, max(1, num_drawn - 1), num)] += num_drawn > 0
    return encode_entries(ids_nK, p_nX, counts_nN, uniforms_n2[:, 1]), rng.random(num) * 4


def labels_of(shards: ShardSet, row: int) -> np.ndarray:
    """The tokens a row's targets ask for, by a plain loop."""
    found = shards.row(row)
    labels = []
    for t in range(shards.seq_len - 1):
        is_same = found.document_ids[t] == found.document_ids[t + 1] != 0
        if is_same and (found.loss_mask is None or found.loss_mask[t + 1]):
            labels.append(int(found.input_ids[t + 1]))
    return np.array(labels, np.int64)


def write_rows(writer: TeacherCacheWriter, dataset: int, most: int | None = None) -> int:
    """Add the rows that are left, or the first of them; how many."""
    shards, num = writer.shard_sets[dataset], 0
    for rows in writer.rows_left(dataset):
        for row in rows:
            if most is not None and num == most:
                return num
            uniforms_n2 = writer.uniforms(dataset, row, len(labels_of(shards, row)))
            writer.add(dataset, row, *drawn_row(shards, row, uniforms_n2, writer.options))
            num += 1
    return num


def make_cache(
    folder: Path,
    *shard_folders: Path,
    options: CacheOptions = OPTIONS,
    part_bytes: int = 16_000,
    most: int | None = None,
) -> TeacherCacheWriter:
    """A cache of all rows, or of some and then left as it is."""
    shard_sets = [ShardSet.open(path) for path in shard_folders]
    with TeacherCacheWriter(folder, options, shard_sets, part_bytes) as writer:
        for dataset in range(len(shard_sets)):
            num = write_rows(writer, dataset, most)
            most = None if most is None else most - num
        if most is None:
            writer.finish()
    return writer


def num_targets(folder: Path) -> int:
    return sum(int((batch.loss_weight != 0).sum()) for batch in eval_batches(folder, 8, None))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
