"""Long documents apart from the others: every token on its side, whatever the frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.shards import ShardSet
from l4cli.data.stream import StreamWriter
from l4cli.data.stream_packer import PackingOptions, pack_by_length
from l4cli.errors import L4Error
from l4cli.text import Tokenizer, load_tokenizer

SEQ_LEN = 32
OPTIONS = PackingOptions("best-fit", 16 * SEQ_LEN, True, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


def write_stream(path: Path, tokenizer: Tokenizer, lengths: list[int], frame_tokens: int) -> None:
    """Document i is the token i, `lengths[i]` times; frames end anywhere, in documents too."""
    ids = np.concatenate([np.full(n, i, np.uint32) for i, n in enumerate(lengths)])
    ends = np.cumsum(lengths)
    with path.open("wb") as file:
        writer = StreamWriter(file, tokenizer, PictureGeometry())
        for start in range(0, len(ids), frame_tokens):
            stop = min(start + frame_tokens, len(ids))
            inner = ends[(ends > start) & (ends < stop)] - start
            offsets = np.concatenate([[0], inner, [stop - start]]).astype(np.int64)
            writer.write(Frame(ids[start:stop], offsets, is_open=stop not in ends))
        writer.close()


def tokens_of(folder: Path) -> dict[int, int]:
    """How often each token stands in the rows, padding left out."""
    shards = ShardSet.open(folder)
    assert not shards.verify()
    counts: dict[int, int] = {}
    for i in range(shards.num_rows):
        row = shards.row(i)
        for token in row.input_ids[row.document_ids != 0].tolist():
            counts[token] = counts.get(token, 0) + 1
    return counts


@pytest.mark.parametrize("frame_tokens", [7, 100, 10_000])
def test_every_document_is_whole_on_its_side(
    tmp_path: Path, tokenizer: Tokenizer, frame_tokens: int
) -> None:
    rng = np.random.default_rng(3)
    lengths = [*rng.integers(1, 3 * SEQ_LEN, 60).tolist(), 16, 15, 32, 33, 47, 48, 64]
    stream = tmp_path / "a.tokens"
    write_stream(stream, tokenizer, lengths, frame_tokens)
    indices = pack_by_length([str(stream)], tmp_path / "out", SEQ_LEN, OPTIONS)
    wanted = {
        name: {i: n for i, n in enumerate(lengths) if (2 * n >= SEQ_LEN) == (name == "long")}
        for name in ("long", "short")
    }
    for name, counts in wanted.items():
        assert tokens_of(tmp_path / "out" / name) == counts
        assert indices[name]["num_tokens"] == sum(counts.values())


def test_a_side_without_documents_has_no_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stream = tmp_path / "a.tokens"
    write_stream(stream, tokenizer, [5, 6, 7], 100)
    indices = pack_by_length([str(stream)], tmp_path / "out", SEQ_LEN, OPTIONS)
    assert list(indices) == ["short"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["short"]


def test_a_stream_cut_off_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stream = tmp_path / "a.tokens"
    write_stream(stream, tokenizer, [50, 6, 70], 40)
    stream.write_bytes(stream.read_bytes()[:-100])
    with pytest.raises(L4Error, match="cut off"):
        pack_by_length([str(stream)], tmp_path / "out", SEQ_LEN, OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tokens"]
