"""Blocks as llama.cpp stores them, beside the library that reads them and a plain loop."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from l4cli.quantization import WeightFormat
from l4cli.quantization.ggml_blocks import (
    KINDS,
    encode_rows,
    fits,
    holds_codes,
    row_bytes,
    rows_from_codes,
)

LIBRARY = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}


def awkward_rows() -> np.ndarray:
    """Gaussians of many sizes, zeros, ties, one value alone, all of one sign."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(-6, 3, (200, 1))
    rows = (rng.standard_normal((200, 96)) * sizes).astype(np.float32)
    rows[0] = 0
    rows[1, 32:64] = 0
    rows[2] = np.arange(96) - 48
    rows[3] = np.where(np.arange(96) % 32 == 5, -3.0, 0.0)
    rows[4] = np.abs(rows[4])
    rows[5] = -np.abs(rows[5])
    rows[6] = np.tile([0.5, -0.5], 48)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_library(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    rows = awkward_rows()
    kind_there = gguf.GGMLQuantizationType[LIBRARY[kind]]
    wanted = gguf.quants.quantize(rows, kind_there).view(np.uint8)
    ours = encode_rows(rows, kind)
    assert ours.shape == (200, row_bytes(kind, 96))
    assert np.array_equal(ours, wanted.reshape(ours.shape))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_block_by_hand(kind: str) -> None:
    """One block, value by value, as the format's definition says."""
    rng = np.random.default_rng(1)
    row = rng.standard_normal(32).astype(np.float32)
    data = encode_rows(row[None], kind)[0]
    scale = float(data[:2].view("<f2")[0])
    largest = row[np.argmax(np.abs(row))]
    if kind == "q8_0":
        assert scale == np.float16(abs(largest) / 127)
        values = data[2:].view(np.int8).astype(float) * scale
        bound = abs(largest) / 127 / 2
    else:
        assert scale == np.float16(largest / -8)
        codes = [*(data[2:] & 15), *(data[2:] >> 4)]
        values = np.array([(int(code) - 8) * scale for code in codes])
        # The end of the scale that the furthest value does not take has one step less.
        bound = abs(largest) / 8
    assert np.abs(values - row).max() <= bound * 1.01
    assert np.abs(values - row).max() > bound * 0.3


@pytest.mark.parametrize(("kind", "name", "top"), [("q4_0", "int4", 8), ("q8_0", "int8", 128)])
@pytest.mark.parametrize("group_size", [32, 64, None])
def test_codes_are_kept(kind: str, name: str, top: int, group_size: int | None) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(2)
    codes = rng.integers(-top, top, (5, 64)).astype(np.int8)
    scale = rng.standard_normal((5, 64 // (group_size or 64))).astype(np.float16)
    assert holds_codes(kind, WeightFormat(name, group_size))
    data = rows_from_codes(kind, codes, scale.astype(np.float32))
    read = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[LIBRARY[kind]])
    wanted = codes.reshape(5, scale.shape[1], -1) * scale.astype(np.float32)[:, :, None]
    assert np.array_equal(read, wanted.reshape(5, 64))


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_scales_that_blocks_cannot_hold(kind: str) -> None:
    """Too small to be told from zero: zeros, without a warning. Too large: refused."""
    rows = np.full((1, 32), 1e-39, dtype=np.float32)
    rows[0, 3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = encode_rows(rows, kind)[0]
    assert data[:2].view("<f2")[0] == 0
    codes = data[2:]
    assert set(codes) == ({0x88} if kind == "q4_0" else {0})
    with pytest.raises(OverflowError, match="65504"):
        encode_rows(np.full((1, 32), 1e7, dtype=np.float32), kind)
    with pytest.raises(OverflowError, match="70000"):
        rows_from_codes(kind, np.ones((1, 32), np.int8), np.full((1, 1), -7e4, np.float32))


def test_codes_that_blocks_cannot_hold() -> None:
    assert not holds_codes("q4_0", WeightFormat("int4", 32, symmetric=False))
    assert not holds_codes("q4_0", WeightFormat("int4", 16))
    assert not holds_codes("q4_0", WeightFormat("int8", 32))
    assert not holds_codes("q8_0", WeightFormat("fp8"))
    assert not holds_codes("bf16", WeightFormat("int4", 32))


def test_rows_that_no_block_divides() -> None:
    assert not fits("q4_0", 48)
    assert fits("q8_0", 64)
    assert fits("bf16", 48)
