"""Packing frames in memory: the shards of `l4 pack`, and where each of their tokens came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l4cli.data.encoding import FrameBuilder, Part
from l4cli.data.geometry import PictureGeometry
from l4cli.data.shards import ShardSet
from l4cli.data.stream import StreamHeader, StreamWriter
from l4cli.data.stream_packer import PackingOptions, pack_frames, pack_streams
from l4cli.text import load_tokenizer


@pytest.mark.parametrize(("method", "shuffle"), [("best-fit", True), ("concat", False)])
def test_shards_are_those_of_a_stream_and_places_lead_back(
    tmp_path: Path, method: str, shuffle: bool
) -> None:
    tokenizer, geometry = load_tokenizer("bytes"), PictureGeometry()
    rng = np.random.default_rng(0)
    builder = FrameBuilder()
    frames = []
    for i, length in enumerate([5, 100, 1, 40, 63, 64, 65, 7, 300, 12]):
        mask = rng.integers(0, 2, length).astype(np.uint8)
        tokens = rng.integers(0, 256, length).astype(np.uint32)
        frames += builder.add(Part(tokens, loss_mask=mask, labels={"source": f"s{i % 3}"}))
        if i == 4:
            frames += builder.flush()
    frames += builder.flush()
    with open(tmp_path / "all.tokens", "wb") as file:
        writer = StreamWriter(file, tokenizer, geometry)
        for frame in frames:
            writer.write(frame)
        writer.close()
    options = PackingOptions(method, 256, shuffle, seed=3)
    wanted = pack_streams([str(tmp_path / "all.tokens")], tmp_path / "wanted", 64, options)
    header = StreamHeader(tokenizer.files(), tokenizer.fingerprint, tokenizer.vocab_size, geometry)
    index, places_RT = pack_frames(frames, header, tmp_path / "found", 64, options)
    assert index == wanted  # the digests of all files among it
    tokens_N = np.concatenate([frame.tokens for frame in frames])
    masks = [frame.loss_mask for frame in frames if frame.loss_mask is not None]
    mask_N = np.concatenate(masks)
    shards = ShardSet.open(tmp_path / "found")
    assert places_RT.shape == (shards.num_rows, 64)
    for number in range(shards.num_rows):
        row, places_T = shards.row(number), places_RT[number]
        for t in range(64):
            if row.document_ids[t] == 0:
                assert places_T[t] == -1
                continue
            assert row.input_ids[t] == tokens_N[places_T[t]]
            assert row.loss_mask is not None
            assert row.loss_mask[t] == mask_N[places_T[t]]
    assert sorted(places_RT[places_RT >= 0].tolist()) == list(range(len(tokens_N)))
