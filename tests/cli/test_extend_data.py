"""The tokens a stage draws are long and short as `--long-fraction` says, by weight, and cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l4cli.commands.extend_data import Share, StageData
from l4cli.commands.extend_mix import mix_of_words
from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.loader import ShardSource
from l4cli.data.stream import StreamWriter
from l4cli.text import load_tokenizer
from l4cli.training.stages import Stage

SEQ_LEN = 64
STAGE = Stage(1, SEQ_LEN, 10**6)


def write_stream(path: Path, token: int, lengths: list[int]) -> None:
    ids = np.full(sum(lengths), token, np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with path.open("wb") as file:
        writer = StreamWriter(file, load_tokenizer("bytes"), PictureGeometry())
        writer.write(Frame(ids, offsets))
        writer.close()


def drawn(shares: list[Share], num_steps: int = 400) -> dict[tuple[int, bool], float]:
    """Share of tokens by (token, whether its document is long) in what a run would read."""
    source = ShardSource(
        [share.spec for share in shares],
        batch_size=4,
        micro_batch_size=4,
        seed=0,
        attention_chunk_size=None,
    )
    counts: dict[tuple[int, bool], int] = {}
    for _ in range(num_steps):
        for batch in source.next():
            for ids, documents in zip(batch.input_ids, batch.document_ids, strict=True):
                for number in range(1, int(documents.max()) + 1):
                    is_here = documents == number
                    length = int(is_here.sum())
                    key = int(ids[is_here][0]), 2 * length >= SEQ_LEN
                    counts[key] = counts.get(key, 0) + length
    source.close()
    total = sum(counts.values())
    return {key: count / total for key, count in counts.items()}


@pytest.fixture
def streams(tmp_path: Path) -> list[Path]:
    """Long documents fill their rows to 60% and stand alone; short ones fill theirs."""
    write_stream(tmp_path / "a.tokens", 1, [39] * 40 + [16] * 400)
    write_stream(tmp_path / "b.tokens", 2, [64] * 20 + [8] * 500)
    return [tmp_path / "a.tokens", tmp_path / "b.tokens"]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 1.0])
def test_the_share_of_long_tokens_is_what_was_asked(
    streams: list[Path], tmp_path: Path, fraction: float
) -> None:
    packed = StageData(tmp_path / "data", 0)
    found = drawn(packed.shares(STAGE, mix_of_words([str(p) for p in streams], 0.0), fraction))
    long = sum(share for (_, is_long), share in found.items() if is_long)
    assert long == pytest.approx(fraction, abs=0.01)


def test_weights_hold_within_long_and_short(streams: list[Path], tmp_path: Path) -> None:
    specs = [f"{streams[0]}:3", f"{streams[1]}:1"]
    found = drawn(StageData(tmp_path / "data", 0).shares(STAGE, mix_of_words(specs, 0.0), 0.6))
    for key, share in {(1, True): 0.45, (2, True): 0.15, (1, False): 0.3, (2, False): 0.1}.items():
        assert found[key] == pytest.approx(share, abs=0.01)


def test_what_was_packed_is_found_again_until_the_stream_changes(
    streams: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = mix_of_words([str(streams[0])], 0.0)
    first = StageData(tmp_path / "data", 0).shares(STAGE, mix, 0.5)
    assert "packing" in capsys.readouterr().err
    assert StageData(tmp_path / "data", 0).shares(STAGE, mix, 0.9)[0].folder == first[0].folder
    assert "packing" not in capsys.readouterr().err
    write_stream(streams[0], 3, [40] * 9 + [5] * 9)
    assert StageData(tmp_path / "data", 0).shares(STAGE, mix, 0.5)[0].folder != first[0].folder


def test_long_documents_alone_are_said_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stream(tmp_path / "long.tokens", 1, [64] * 20)
    mix = mix_of_words([str(tmp_path / "long.tokens")], 0.0)
    (share,) = StageData(tmp_path / "data", 0).shares(STAGE, mix, 0.7)
    assert share.folder.name == "long"
    assert share.share == 1
    said = capsys.readouterr().err
    assert "stage 1: 100% of its streams' tokens" in said
    assert "not 70%: data sets without short documents keep their weight" in said
