"""The loader: batches against a plain loop, exact resume, ranks, pictures, bad data."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_samples import GEOMETRY, change_tensors, make_shards, picture_frame, text_frame

from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.loader import STEPS_AHEAD, ShardSource, eval_batches
from l4cli.data.media import open_picture, tiles_of
from l4cli.data.shards import ShardSet
from l4cli.errors import L4Error, UsageError
from l4cli.ops.batch import Batch


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Text in several shards, and pictures."""
    make_shards(tmp_path / "text", text_frame(0, 60), text_frame(1, 60), shard_rows=7)
    make_shards(tmp_path / "pictures", picture_frame(2, 25), shard_rows=3)
    return tmp_path / "text", tmp_path / "pictures"


def source(*specs, batch_size: int = 4, micro_batch_size: int = 2, **options) -> ShardSource:
    names = [str(spec) for spec in specs]
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    return ShardSource(names, **{"seed": 0, "attention_chunk_size": 16, **sizes, **options})


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for name in ("input_ids", "labels", "loss_weight", "document_ids", "position_ids"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name
        for name in ("document_starts", "document_lengths", "local_starts", "local_lengths"):
            assert torch.equal(getattr(left.segments, name), getattr(right.segments, name)), name
        assert (left.pixel_values is None) == (right.pixel_values is None)
        if left.pixel_values is not None:
            assert torch.equal(left.pixel_values, right.pixel_values)


def test_fields_are_the_plain_loop(folders) -> None:
    for folder in folders:
        shards, at = ShardSet.open(folder), 0
        for batch in eval_batches(folder, 3, attention_chunk_size=None):
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            assert batch.position_ids.dtype == torch.int64
            assert batch.loss_weight.dtype == torch.float32
            assert batch.document_ids.dtype == torch.int32
            for b in range(len(batch.input_ids)):
                row = shards.row(at)
                position = 0
                for t in range(64):
                    document = row.document_ids[t]
                    is_same = t > 0 and document == row.document_ids[t - 1]
                    position = position + 1 if is_same else 0
                    assert batch.input_ids[b, t] == row.input_ids[t]
                    assert batch.document_ids[b, t] == document
                    if document:
                        assert batch.position_ids[b, t] == position
                    has_next = t + 1 < 64 and row.document_ids[t + 1] == document
                    counts = row.loss_mask is None or (t + 1 < 64 and row.loss_mask[t + 1])
                    weight = 1 if document and has_next and counts else 0
                    assert batch.loss_weight[b, t] == weight
                    if weight:
                        assert batch.labels[b, t] == row.input_ids[t + 1]
                at += 1
        assert at == shards.num_rows


def test_pictures_in_order(folders) -> None:
    shards, at = ShardSet.open(folders[1]), 0
    for batch in eval_batches(folders[1], 4, None):
        rows = [shards.row(at + b) for b in range(len(batch.input_ids))]
        at += len(rows)
        tiles = [tiles_of(open_picture(item), GEOMETRY) for row in rows for item in row.media]
        if not tiles:
            assert batch.pixel_values is None
            continue
        assert batch.pixel_values is not None
        assert batch.pixel_values.dtype == torch.float32
        np.testing.assert_array_equal(batch.pixel_values.numpy(), np.concatenate(tiles))
        # A picture's own tokens are no targets: their weight as the next token is 0.
        patch = shards.tokenizer().patch_id
        is_patch = (batch.input_ids[:, 1:] == patch) & (batch.document_ids[:, 1:] > 0)
        assert batch.loss_weight[:, :-1][is_patch].sum() == 0


def test_eval_stops_at_max_rows(folders) -> None:
    sizes = [len(batch.input_ids) for batch in eval_batches(folders[0], 4, 16, max_rows=10)]
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_is_exact(folders, shuffle) -> None:
    """Stop after any step: what follows is bit for bit what it would have been."""
    specs = f"{folders[0]}:0.7", f"{folders[1]}:0.3"
    straight = source(*specs, shuffle=shuffle)
    steps, states = [], [straight.state_dict()]
    for _ in range(20):
        steps.append(straight.next())
        states.append(straight.state_dict())
    straight.close()
    for stop in (0, 1, 7, 13):
        resumed = source(*specs, shuffle=shuffle)
        resumed.load_state_dict(states[stop])
        assert resumed.num_samples == stop * 4
        for step in steps[stop : stop + 6]:
            assert_equal(resumed.next(), step)
        # In the middle of a running source, too: what was prepared ahead is forgotten.
        resumed.load_state_dict(states[stop])
        assert_equal(resumed.next(), steps[stop])
        assert resumed.state_dict() == states[stop + 1]
        resumed.close()


def test_state_counts_consumed_steps_only(folders) -> None:
    stream = source(folders[0])
    stream.next()
    deadline = time.monotonic() + 10
    while stream._ahead._ready.qsize() < STEPS_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stream._ahead._ready.qsize() == STEPS_AHEAD
    assert stream.state_dict()["num_samples"] == 4
    stream.close()
    assert sum(stream.state_dict()["counts"]) == 4


def test_ranks_share_one_stream(folders) -> None:
    specs = f"{folders[0]}:2", f"{folders[1]}:1"
    one = source(*specs, batch_size=8, micro_batch_size=2)
    for world in (2, 4):
        ranks = [
            source(*specs, batch_size=8, micro_batch_size=2, rank=rank, world=world)
            for rank in range(world)
        ]
        one.load_state_dict(ranks[0].state_dict())
        for _ in range(6):
            whole = one.next()
            assert_equal([batch for rank in ranks for batch in rank.next()], whole)
            assert len({str(rank.state_dict()) for rank in ranks}) == 1
        # A state of two ranks continues on one.
        one.load_state_dict(ranks[1].state_dict())
        whole = one.next()
        assert_equal([batch for rank in ranks for batch in rank.next()], whole)
        for rank in ranks:
            rank.close()
    one.close()


def test_batch_size_may_change_on_resume(folders) -> None:
    big, small = source(folders[0], batch_size=6), source(folders[0], batch_size=2)
    big.next()
    small.load_state_dict(big.state_dict())
    follows = [batch for _ in range(3) for batch in small.next()]
    assert_equal(follows, big.next())
    big.close()
    small.close()


def test_an_epoch_is_every_row_once_in_another_order(folders) -> None:
    shards = ShardSet.open(folders[0])
    stream = source(folders[0], batch_size=1, micro_batch_size=1)
    assert stream.num_rows == shards.num_rows
    wanted = sorted(shards.row(i).input_ids.tolist() for i in range(shards.num_rows))
    orders = []
    for _ in range(2):
        seen = [stream.next()[0].input_ids[0].tolist() for _ in range(shards.num_rows)]
        assert sorted(seen) == wanted
        orders.append(seen)
    assert orders[0] != orders[1]
    assert orders[0] != [shards.row(i).input_ids.tolist() for i in range(shards.num_rows)]
    stream.close()


def test_seeds_differ(folders) -> None:
    one, other = source(folders[0], seed=1), source(folders[0], seed=2)
    assert not torch.equal(one.next()[0].input_ids, other.next()[0].input_ids)
    one.close()
    other.close()


def test_facts(folders) -> None:
    stream = source(*folders)
    shards = [ShardSet.open(folder) for folder in folders]
    assert stream.seq_len == 64
    assert stream.vocab_size == shards[0].vocab_size
    assert stream.fingerprint == shards[0].fingerprint == stream.tokenizer().fingerprint
    assert stream.num_rows == sum(part.num_rows for part in shards)
    assert stream.num_tokens == sum(part.num_tokens for part in shards)
    assert stream.num_media == shards[1].num_media
    assert stream.geometry == GEOMETRY


def test_geometry_is_that_of_the_pictures(tmp_path, folders) -> None:
    """Text was tokenized without a preset; only pictures have a geometry that matters."""
    make_shards(tmp_path / "plain", text_frame(0), geometry=PictureGeometry())
    assert source(tmp_path / "plain", folders[1]).geometry == GEOMETRY
    assert source(folders[1], tmp_path / "plain").geometry == GEOMETRY
    assert source(tmp_path / "plain").geometry == PictureGeometry()


def test_close_ends_the_thread(folders) -> None:
    before = threading.active_count()
    stream = source(folders[0])
    stream.next()
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    stream.close()


def test_other_data_are_not_continued(tmp_path, folders) -> None:
    stream = source(f"{folders[0]}:1", f"{folders[1]}:1")
    state = stream.state_dict()
    others = [
        (source(f"{folders[1]}:1", f"{folders[0]}:1"), "data sets"),
        (source(folders[0]), "data sets"),
        (source(f"{folders[0]}:1", f"{folders[1]}:2"), "weights"),
        (source(f"{folders[0]}:1", f"{folders[1]}:1", seed=1), "seed"),
        (source(f"{folders[0]}:1", f"{folders[1]}:1", shuffle=False), "shuffle"),
    ]
    for other, word in others:
        with pytest.raises(UsageError) as caught:
            other.load_state_dict(state)
        assert word in caught.value.why
    # The same weights said otherwise, and the same data under another name, are the same.
    folders[0].rename(tmp_path / "moved")
    source(f"{tmp_path / 'moved'}:0.5", f"{folders[1]}:0.5").load_state_dict(state)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"batch_size": 4, "micro_batch_size": 3}, "`--micro-batch-size 3`"),
        ({"batch_size": 4, "micro_batch_size": 8}, "`--micro-batch-size 8`"),
        ({"batch_size": 5, "micro_batch_size": 1, "world": 2}, "`--batch-size 5`"),
        ({"batch_size": 4, "micro_batch_size": 4, "world": 2}, "`--micro-batch-size 4`"),
    ],
)
def test_sizes_that_do_not_divide(folders, sizes, words) -> None:
    with pytest.raises(UsageError) as caught:
        source(folders[0], **sizes)
    assert words in caught.value.what


def test_data_that_do_not_go_together(tmp_path, folders) -> None:
    make_shards(tmp_path / "long", text_frame(0), seq_len=128)
    with pytest.raises(L4Error, match="64 and 128"):
        source(folders[0], tmp_path / "long")
    (tmp_path / "tok").mkdir()
    _other_tokenizer(tmp_path / "tok")
    make_shards(tmp_path / "other", _plain_frame(), tokenizer=str(tmp_path / "tok"))
    with pytest.raises(L4Error, match="tokenizers are"):
        source(folders[0], tmp_path / "other")
    geometry = PictureGeometry(image_size=32, patch_size=8, max_patches=4)
    make_shards(tmp_path / "larger", picture_frame(0), geometry=geometry)
    with pytest.raises(L4Error, match="32 px"):
        source(folders[1], tmp_path / "larger")
    with pytest.raises(L4Error, match="no such folder"):
        source(folders[0], tmp_path / "none")


def _plain_frame() -> Frame:
    return Frame(np.arange(40, dtype=np.uint32), np.array([0, 40]))


def _other_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(50)}
    Library(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def _blank(media: np.ndarray, offsets: np.ndarray) -> None:
    """Overwrite every picture but for its signature."""
    for begin, end in itertools.pairwise(offsets):
        media[begin + 20 : end] = 0


def _run(stream: ShardSource) -> None:
    for _ in range(stream.num_rows):
        stream.next()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t["media"].__setitem__(slice(None), 0), "neither a PNG nor a JPEG"),
        (lambda t: _blank(t["media"], t["media_offsets"]), "damaged"),
        (lambda t: t["media_tiles"].__setitem__(slice(None), 9), "tiles"),
        (lambda t: t["input_ids"].__setitem__(slice(None), 5), "0 picture tokens"),
    ],
)
def test_bad_pictures_are_errors_of_their_row(folders, change, why) -> None:
    for number in range(len(ShardSet.open(folders[1]).index["shards"])):
        change_tensors(folders[1], change, number)
    stream = source(folders[1])
    for _ in range(2):  # asked again it says the same, and does not wait forever
        with pytest.raises(L4Error) as caught:
            _run(stream)
        assert "row" in caught.value.what
        assert why in caught.value.why
    stream.close()


def test_shards_that_vanish_while_training(folders) -> None:
    stream = source(folders[0], batch_size=2)
    for path in folders[0].glob("*.safetensors"):
        path.unlink()
    with pytest.raises((L4Error, OSError)):
        _run(stream)
    stream.close()
