"""A teacher's forward passes into a cache: once each, in any layout, after any interruption."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from l4cli.data.loader import ShardSource, eval_batches
from l4cli.data.shards import ShardSet
from l4cli.data.teacher_cache import TeacherCache
from l4cli.data.teacher_cache_writer import CacheOptions, TeacherCacheWriter
from l4cli.errors import L4Error
from l4cli.model import TextConfig, build_model, load_preset
from l4cli.text import load_tokenizer
from l4cli.training.data_setup import open_source
from l4cli.training.teacher_writing import write_cache, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from cache_samples import files_of, num_targets
from shard_samples import make_shards, picture_frame, text_frame
from tiny_training import tiny_config

OPTIONS = CacheOptions("tiny", "f0", num_exact=6, num_drawn=5, temperature=1.5)


@pytest.fixture(scope="module")
def teacher():
    """A tiny model whose head has more rows than the tokenizer has tokens, and opinions."""
    config = tiny_config()
    config.text = TextConfig(**{**vars(config.text), "vocab_size": 384})
    model = build_model(config, seed=0)
    with torch.no_grad():
        model.lm_head.weight *= 20
        model.lm_head.weight[load_tokenizer("bytes").vocab_size :] *= 10
    return model


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards") / "text"
    make_shards(folder, text_frame(0, 60), text_frame(1, 20), shard_rows=7)
    return ShardSet.open(folder)


def written(folder, teacher, shards, micro_batch_size=4, num_workers=1) -> TeacherCache:
    with TeacherCacheWriter(folder, OPTIONS, [shards], 16_000) as writer:
        write_cache(teacher, writer, micro_batch_size=micro_batch_size, num_workers=num_workers)
    return TeacherCache.open(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher, shards) -> TeacherCache:
    return written(tmp_path_factory.mktemp("cache") / "cache", teacher, shards)


def test_holds_what_the_teacher_says(cache, teacher, shards) -> None:
    """Row by row against the whole distribution over the tokenizer's tokens."""
    assert cache.describe()["num_tokens"] == num_targets(shards.folder)
    rows = cache.for_shards([shards])
    off_V, variance_V = torch.zeros(2, shards.vocab_size, dtype=torch.float64)
    for i, batch in enumerate(eval_batches(shards, 1, 8)):
        is_target_M = batch.loss_weight.flatten() != 0
        with torch.no_grad():
            logits_MV = teacher.lm_head(teacher.hidden(batch)).flatten(0, 1)[is_target_M]
        p_MV = (logits_MV[:, : shards.vocab_size].double() / 1.5).softmax(-1)
        found = rows.targets([(0, i)], batch)
        assert (found.num_exact, found.temperature) == (6, 1.5)
        exact_MX = found.ids_MK[:, :6]
        labels_M = batch.labels.flatten()[is_target_M]
        assert torch.equal(exact_MX[:, 0], labels_M)
        wanted_MX = p_MV.gather(1, exact_MX)
        # A code is at most 1 / 512 from the probability; sums above 1 are scaled down.
        error_MX = (found.weights_MK[:, :6] / wanted_MX - 1).abs()
        assert error_MX.max() < 3 / 512
        # Likeliest first, none likelier left out: each other token is at most the last one.
        others_MX = wanted_MX[:, 1:]
        assert (others_MX[:, :-1] >= others_MX[:, 1:] * (1 - 1e-5)).all()
        left_MV = p_MV.scatter(1, exact_MX, 0)
        assert (left_MV.amax(1) <= others_MX[:, -1] * (1 + 1e-5)).all()
        entropy_M = -(p_MV * p_MV.clamp(min=1e-300).log()).sum(1)
        assert (found.entropy_M - entropy_M).abs().max() < 0.07
        best_M = torch.where(
            found.weights_MK[:, 0] >= found.weights_MK[:, 1], labels_M, found.ids_MK[:, 1]
        )
        assert torch.equal(best_M, p_MV.argmax(1))
        drawn_MV = torch.zeros_like(p_MV).scatter_add(
            1, found.ids_MK[:, 6:], found.weights_MK[:, 6:].double()
        )
        off_V += (drawn_MV - left_MV).sum(0)
        # A drawn token weighs a fifth of the tail, or nothing.
        variance_V += (left_MV * left_MV.sum(1, keepdim=True) / 5).sum(0)
    assert (off_V.abs() < 5 * variance_V.sqrt()).all()
    assert off_V.abs().sum() > 0


def test_one_pass_a_batch_whatever_the_workers(tmp_path, cache, teacher, shards) -> None:
    calls, hidden = [], teacher.hidden
    teacher.hidden = lambda batch: calls.append(len(batch.input_ids)) or hidden(batch)
    try:
        written(tmp_path / "threads", teacher, shards, num_workers=3)
    finally:
        del teacher.hidden
    assert len(calls) == -(-shards.num_rows // 4)
    assert sum(calls) == shards.num_rows
    assert files_of(tmp_path / "threads") == files_of(cache.folder)


def test_batch_size_changes_nothing_but_the_last_bits(tmp_path, cache, teacher, shards) -> None:
    """Products of other shapes round otherwise; the draws and the order stay."""
    other = written(tmp_path / "single", teacher, shards, micro_batch_size=1)
    pairs = [c.for_shards([shards]) for c in (cache, other)]
    num_same, num = 0, 0
    for row in range(shards.num_rows):
        (ids, weights, entropy), (ids_1, weights_1, entropy_1) = (p.row(0, row) for p in pairs)
        assert ids.shape == ids_1.shape
        is_same = ids == ids_1
        num_same, num = num_same + int(is_same.sum()), num + ids.size
        exact, exact_1 = weights[:, :6][is_same[:, :6]], weights_1[:, :6][is_same[:, :6]]
        np.testing.assert_allclose(exact, exact_1, rtol=3 / 512)
        np.testing.assert_allclose(entropy, entropy_1, atol=0.07)
    assert num_same / num > 0.999


@pytest.mark.parametrize("most", [1, 18, 33])
def test_killed_and_continued_it_is_the_same_byte_for_byte(
    tmp_path, cache, teacher, shards, most
) -> None:
    """Stopped in the middle of a part: the rows of whole parts stay, the others are made again."""
    folder = tmp_path / "again"
    with TeacherCacheWriter(folder, OPTIONS, [shards], 16_000) as writer:
        rows = write_rows(
            teacher, writer, 0, range(shards.num_rows), micro_batch_size=4, num_workers=2
        )
        for _, _ in zip(range(most), rows, strict=False):
            pass
        rows.close()
    kept = TeacherCache.open(folder).describe()["num_rows"]
    assert kept <= most
    assert most < 18 or kept > 0
    assert files_of(folder) != files_of(cache.folder)
    written(folder, teacher, shards)
    assert files_of(folder) == files_of(cache.folder)


def test_ctrl_c_keeps_what_was_written(tmp_path, cache, teacher, shards, capsys) -> None:
    """A real signal in the middle of the sixth pass of eleven; the same call goes on afterwards."""
    calls, hidden = [], teacher.hidden

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return hidden(batch)

    teacher.hidden = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path / "again", teacher, shards, num_workers=2)
    finally:
        del teacher.hidden
    kept = TeacherCache.open(tmp_path / "again").describe()
    assert 12 <= kept["num_rows"] < shards.num_rows  # no part is full at twelve
    assert f"{kept['num_rows']} of {shards.num_rows} rows are kept" in capsys.readouterr().err
    assert len(calls) < -(-shards.num_rows // 4)
    again = written(tmp_path / "again", teacher, shards)
    pair = [each.for_shards([shards]) for each in (cache, again)]
    for row in range(shards.num_rows):
        for mine, theirs in zip(*(rows.row(0, row) for rows in pair), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_signal_before_the_index_loses_no_part(tmp_path, cache, teacher, shards) -> None:
    """The first part is on disk, and the index that would name it is not."""
    folder = tmp_path / "again"
    writer = TeacherCacheWriter(folder, OPTIONS, [shards], 16_000)
    write_index, calls = writer._write_index, []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 2:  # the first one begins the cache
            raise KeyboardInterrupt
        write_index()

    writer._write_index = interrupted
    with pytest.raises(KeyboardInterrupt), writer:
        write_cache(teacher, writer, micro_batch_size=4)
    assert 0 < TeacherCache.open(folder).describe()["num_rows"] < shards.num_rows
    written(folder, teacher, shards)
    assert files_of(folder) == files_of(cache.folder)


def test_pictures(tmp_path) -> None:
    """A teacher that sees: what is cached is what it says with the pictures before it."""
    make_shards(tmp_path / "pictures", picture_frame(0, 20))
    shards, tokenizer = ShardSet.open(tmp_path / "pictures"), load_tokenizer("bytes")
    config = load_preset("nano")
    config.text.vocab_size = tokenizer.vocab_size
    vision = replace(config.vision, image_size=16, patch_size=4)
    model = build_model(
        replace(config, vision=vision, image_token_index=tokenizer.patch_id), seed=0
    )
    cache = written(tmp_path / "cache", model, shards, num_workers=2)
    rows = cache.for_shards([shards])
    num_pictures = 0
    for i, batch in enumerate(eval_batches(shards, 1, config.text.attention_chunk_size)):
        is_target_M = batch.loss_weight.flatten() != 0
        with torch.no_grad():
            logits_MV = model.lm_head(model.hidden(batch)).flatten(0, 1)[is_target_M]
        found = rows.targets([(0, i)], batch)
        wanted_MX = (logits_MV / 1.5).softmax(-1).gather(1, found.ids_MK[:, :6])
        assert ((found.weights_MK[:, :6] / wanted_MX - 1).abs() < 3 / 512).all()
        num_pictures += batch.pixel_values is not None
    assert num_pictures > 3


def test_two_ranks_read_what_one_reads(cache, shards) -> None:
    """Through the options of a run; every step, every rank."""
    specs = [str(shards.folder)]
    sizes = {"seq_len": None, "batch_size": 8, "micro_batch_size": 2, "seed": 3}
    one = open_source(specs, **sizes, attention_chunk_size=8, teacher_cache=cache)
    steps = [one.next() for _ in range(3)]
    one.close()
    assert all(batch.teacher is not None for step in steps for batch in step)
    for rank in (0, 1):
        mine = ShardSource(
            specs, batch_size=8, micro_batch_size=4, seed=3, attention_chunk_size=8,
            rank=rank, world=2, teacher_cache=cache,
        )  # fmt: skip
        for step in steps:
            (batch,) = mine.next()
            want = [step[2 * rank + i].teacher for i in range(2)]
            assert torch.equal(batch.teacher.ids_MK, torch.cat([t.ids_MK for t in want]))
            assert torch.equal(batch.teacher.weights_MK, torch.cat([t.weights_MK for t in want]))
        mine.close()


def test_a_teacher_that_says_nan_leaves_whole_parts(tmp_path, teacher, shards) -> None:
    before, num_threads = teacher.lm_head.weight.detach().clone(), torch.get_num_threads()
    with torch.no_grad():
        teacher.lm_head.weight[5] = float("nan")
    try:
        with pytest.raises(L4Error, match="not finite"):
            written(tmp_path / "nan", teacher, shards, num_workers=2)
    finally:
        with torch.no_grad():
            teacher.lm_head.weight.copy_(before)
    assert TeacherCache.open(tmp_path / "nan").describe()["num_rows"] == 0
    assert torch.get_num_threads() == num_threads


def test_a_teacher_with_too_few_tokens_is_refused(tmp_path, shards) -> None:
    small = build_model(tiny_config(), seed=0)  # 64 tokens
    with pytest.raises(L4Error, match="64 tokens"):
        written(tmp_path / "small", small, shards)
