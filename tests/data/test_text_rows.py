"""Rows of text from streams and shards: every token in order, pictures passed over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_samples import make_shards, picture_frame, text_frame, write_stream

from l4cli.data.frame import Frame
from l4cli.data.text_rows import ROW_TOKENS, TextRows, read_text_rows
from l4cli.errors import L4Error
from l4cli.text import load_tokenizer


def tokens_of(found: TextRows) -> np.ndarray:
    """What is no padding, in order."""
    return np.concatenate([row.input_ids[row.document_ids != 0] for row in found.rows])


def documents_of(*frames: Frame) -> list[np.ndarray]:
    return [
        frame.tokens[a:b]
        for frame in frames
        for a, b in zip(frame.offsets[:-1], frame.offsets[1:], strict=True)
    ]


def test_a_stream_is_cut_into_rows(tmp_path: Path) -> None:
    frames = [text_frame(0, 60), text_frame(1, 60)]
    path = write_stream(tmp_path / "x.tokens", *frames)
    found = read_text_rows(path, None, "cannot use", 500)
    documents = documents_of(*frames)
    assert np.array_equal(tokens_of(found), np.concatenate(documents))
    assert found.num_tokens == sum(map(len, documents))
    assert found.fingerprint == load_tokenizer("bytes").fingerprint
    assert {len(row.input_ids) for row in found.rows} == {500}
    # A new number wherever a document begins, from 1 in each row.
    ends = np.cumsum([len(each) for each in documents])
    for i, row in enumerate(found.rows):
        numbers = row.document_ids[row.document_ids != 0]
        begins = np.flatnonzero(np.diff(numbers)) + 1 + 500 * i
        assert numbers[0] == 1
        assert set(begins) == {end for end in ends if 500 * i < end < 500 * i + len(numbers)}


def test_as_many_tokens_as_asked_for_from_all_over(tmp_path: Path) -> None:
    frames = [text_frame(0, 60), text_frame(1, 60)]
    path = write_stream(tmp_path / "x.tokens", *frames)
    found = read_text_rows(path, 700, "cannot use", 500)
    assert found.num_tokens == 700
    everything = np.concatenate(documents_of(*frames))
    num_rows = len(everything) // 350
    assert num_rows > 4
    second = num_rows // 2 * 350
    expected = [everything[:350], everything[second : second + 350]]
    assert np.array_equal(tokens_of(found), np.concatenate(expected))
    short = read_text_rows(path, 100, "cannot use")
    assert [len(row.input_ids) for row in short.rows] == [100]
    assert ROW_TOKENS > 100


def test_documents_that_go_on_in_the_next_frame_stay_whole(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.uint32)
    first = Frame(tokens[:25], np.array([0, 10, 25]), is_open=True)
    second = Frame(tokens[25:], np.array([0, 5, 15]))
    path = write_stream(tmp_path / "x.tokens", first, second)
    (row,) = read_text_rows(path, None, "cannot use").rows
    assert row.document_ids.tolist() == [1] * 10 + [2] * 20 + [3] * 10


def test_pictures_are_passed_over(tmp_path: Path) -> None:
    frames = [text_frame(0, 30), picture_frame(1), text_frame(2, 30)]
    path = write_stream(tmp_path / "x.tokens", *frames)
    found = read_text_rows(path, None, "cannot use")
    expected = np.concatenate(documents_of(frames[0], frames[2]))
    assert np.array_equal(tokens_of(found), expected)
    make_shards(tmp_path / "shards", *frames, seq_len=128)
    found = read_text_rows(tmp_path / "shards", None, "cannot use")
    assert found.rows
    assert not any(row.media for row in found.rows)
    with pytest.raises(L4Error, match="no text without pictures"):
        read_text_rows(write_stream(tmp_path / "y.tokens", picture_frame(0)), None, "cannot use")


def test_shards_keep_their_rows(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", text_frame(0, 80), seq_len=64)
    found = read_text_rows(tmp_path / "shards", 200, "cannot use")
    assert 200 <= found.num_tokens < 200 + 64
    everything = read_text_rows(tmp_path / "shards", None, "cannot use").rows
    step = len(everything) // 4
    assert step > 1
    for i, row in enumerate(found.rows):
        assert np.array_equal(row.input_ids, everything[i * step].input_ids)
    batches = found.batches(16)
    assert torch.equal(
        torch.cat([batch.input_ids for batch in batches]),
        torch.from_numpy(np.stack([row.input_ids for row in found.rows]).astype(np.int64)),
    )
    assert all(batch.segments is not None for batch in batches)


def test_too_little_is_refused(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "x.tokens", text_frame(0, 4))
    with pytest.raises(L4Error) as caught:
        read_text_rows(path, 10_000, "cannot calibrate on")
    total = int(text_frame(0, 4).offsets[-1])
    assert caught.value.what == f"cannot calibrate on `{path}`"
    assert f"{total} tokens" in caught.value.why
    assert f"{total} tokens" in caught.value.fix
