"""Weights as llama.cpp stores them: rows of plain numbers, or of blocks of 32 codes and a scale.

in: rows of fp32; out: the same rows as bytes
source: ggml's `block_q4_0` and `block_q8_0` (an fp16 scale, then the codes) and their roundings
"""

from __future__ import annotations

import numpy as np

from l4cli.quantization.formats import WeightFormat

BLOCK = 32  # values that share a scale
BLOCK_BYTES = {"q8_0": 2 + BLOCK, "q4_0": 2 + BLOCK // 2}
ITEM_BYTES = {"f32": 4, "bf16": 2}
KINDS = (*ITEM_BYTES, *BLOCK_BYTES)
MAX_SCALE = float(np.finfo(np.float16).max)
_PIECE = 1 << 18  # values rounded at once, so that what is in between stays in the cache


def row_bytes(kind: str, width: int) -> int:
    """Bytes of a row of so many values."""
    if kind in ITEM_BYTES:
        return ITEM_BYTES[kind] * width
    assert width % BLOCK == 0
    return BLOCK_BYTES[kind] * (width // BLOCK)


def fits(kind: str, width: int) -> bool:
    """Whether rows of this width can be stored so."""
    return kind in ITEM_BYTES or width % BLOCK == 0


def encode_rows(rows: np.ndarray, kind: str) -> np.ndarray:
    """Round rows into a kind's bytes. shapes: [n, width] fp32 -> [n, row_bytes] uint8

    raises: OverflowError for values whose scale is none of fp16
    """
    assert rows.ndim == 2
    assert rows.dtype == np.float32
    out = np.empty((rows.shape[0], row_bytes(kind, rows.shape[1])), dtype=np.uint8)
    step = max(1, _PIECE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        piece = np.ascontiguousarray(rows[start : start + step])
        out[start : start + step] = _ENCODERS[kind](piece).reshape(len(piece), -1)
    return out


def holds_codes(kind: str, format: WeightFormat) -> bool:
    """Whether codes of a format become blocks of this kind as they are, scales in fp16 apart."""
    whole_blocks = format.group_size is None or format.group_size % BLOCK == 0
    name = {"q4_0": "int4", "q8_0": "int8"}.get(kind)
    return format.name == name and format.symmetric and whole_blocks


def rows_from_codes(kind: str, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Store codes as they are. shapes: [n, width] int8, [n, groups] fp32 -> [n, row_bytes] uint8

    raises: OverflowError for a scale that is none of fp16
    """
    num_rows, width = codes.shape
    blocks = codes.reshape(-1, BLOCK)
    halves = _halves(scale.repeat(width // BLOCK // scale.shape[1], axis=1).reshape(-1, 1))
    if kind == "q4_0":
        blocks = _paired((blocks + 8).astype(np.uint8))
    return _joined(halves, blocks.view(np.uint8)).reshape(num_rows, -1)


def _f32(rows: np.ndarray) -> np.ndarray:
    return rows.astype("<f4", copy=False).view(np.uint8)


def _bf16(rows: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, by adding half of what is cut off."""
    bits = rows.view(np.uint32)
    odd = (bits >> 16) & 1
    return ((bits + (np.uint32(0x7FFF) + odd)) >> 16).astype("<u2").view(np.uint8)


def _q8_0(rows: np.ndarray) -> np.ndarray:
    """The largest value becomes 127 or -127; halves are rounded away from zero."""
    blocks = rows.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return _joined(_halves(scale), codes.view(np.uint8))


def _q4_0(rows: np.ndarray) -> np.ndarray:
    """The value furthest from zero becomes -8, so its sign is the scale's turned round."""
    blocks = rows.reshape(-1, BLOCK)
    furthest = np.abs(blocks).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(blocks, furthest, axis=1) / np.float32(-8)
    scaled = blocks * _inverse(scale) + np.float32(8.5)
    codes = np.minimum(scaled.astype(np.uint8), 15)
    return _joined(_halves(scale), _paired(codes))


def _inverse(scale: np.ndarray) -> np.ndarray:
    """Of a scale that has no finite inverse zero: as fp16 it is zero itself."""
    is_tiny = np.abs(scale) < np.finfo(np.float32).tiny
    return np.where(is_tiny, np.float32(0), np.float32(1) / np.where(is_tiny, 1, scale))


def _halves(scale: np.ndarray) -> np.ndarray:
    """Scales as the blocks hold them; those too small to be told from zero become zero."""
    largest = float(np.abs(scale).max(initial=0))
    if largest > MAX_SCALE:
        raise OverflowError(f"a scale is {largest:g}, and blocks hold at most {MAX_SCALE:g}")
    return scale.astype("<f2")


def _paired(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte: value i low, value i + 16 high. shapes: [n, 32] -> [n, 16]"""
    half = BLOCK // 2
    return codes[:, :half] | (codes[:, half:] << 4)


def _joined(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([scale.view(np.uint8), codes], axis=1)


_ENCODERS = {"f32": _f32, "bf16": _bf16, "q8_0": _q8_0, "q4_0": _q4_0}
