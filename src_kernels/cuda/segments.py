"""Causal attention inside segments of a flat run of positions, without masks, padding or gathers.

in: q [M, N, H], k and v [M, K, H], tiles of the segments; out: [M, N, H]
source: flash attention 2 (arXiv 2307.08691): online softmax forward, log-sum-exp kept, scores
made again in the backward. No atomics: each sum has one owner, so that results repeat bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_DIM = 128
LOG2E = tl.constexpr(math.log2(math.e))


class Blocks(NamedTuple):
    """Rows a program owns, rows it takes at once, and what runs it."""

    own: int
    other: int
    num_warps: int
    num_stages: int


class Sizes(NamedTuple):
    """Of the three kernels: `own` of forward and dq is the same, they share their tiles."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


def choose_sizes(dtype: torch.dtype, head_dim: int, arch: int) -> Sizes:
    """What compiles without spills for compute capability `arch`: 90, 100."""
    if dtype == torch.float32:  # no tensor cores: products stay exact
        small = Blocks(32, 16, 8, 2)
        return Sizes(small, small, Blocks(16, 16, 4, 2))
    is_wide = head_dim > 64
    forward = Blocks(128, 64, 8 if is_wide else 4, 3)
    # Two sums of 128 x 128 and three tiles in flight are too much for Blackwell's registers.
    dkv = Blocks(128, 64, 8, 1) if is_wide and arch >= 100 else Blocks(128, 32, 8, 2)
    return Sizes(forward, Blocks(128, 64, 8, 2), dkv)


@dataclass(frozen=True)
class Tiles:
    """Pieces of segments, int32 on the device [tiles, 3]: segment's start, its length, offset."""

    by_queries: Tensor  # the most keys before it first
    by_keys: Tensor  # the most queries after it first
    covers_all: bool  # no position lies outside


def make_tiles(
    starts: Tensor, lengths: Tensor, num_positions: int, sizes: Sizes, device: Any
) -> Tiles:
    """Cut segments (int64, on the CPU) into pieces; the programs with most to do come first."""
    queries = _cut(starts, lengths, sizes.dq.own)
    keys = _cut(starts, lengths, sizes.dkv.own)
    queries = queries[queries[:, 2].argsort(descending=True, stable=True)]
    keys = keys[(keys[:, 1] - keys[:, 2]).argsort(descending=True, stable=True)]
    by_queries, by_keys = (table.to(torch.int32).to(device) for table in (queries, keys))
    return Tiles(by_queries, by_keys, int(lengths.sum()) == num_positions)


def _cut(starts: Tensor, lengths: Tensor, size: int) -> Tensor:
    pieces = (lengths + size - 1) // size
    owner = torch.arange(len(starts)).repeat_interleave(pieces)
    first = pieces.cumsum(0) - pieces
    offset = (torch.arange(len(owner)) - first[owner]) * size
    return torch.stack([starts[owner], lengths[owner], offset], dim=1)


@triton.jit
def _rows(base, first, stride, dims, is_real, is_dim):
    """Rows of one head from position `first` on. shapes: is_real [rows] -> [rows, H]"""
    # One wide number and narrow offsets from it: a wide address each would spill registers.
    base += first.to(tl.int64) * stride
    where = tl.arange(0, is_real.shape[0])[:, None] * stride + dims[None, :]
    return tl.load(base + where, mask=is_real[:, None] & is_dim[None, :], other=0.0)


@triton.jit
def _forward_block(
    q, k, v, rows, key, start, length, top, total, acc, k_row, v_row, dims, is_dim, scale,
    OTHER: tl.constexpr, IS_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in OTHER keys. Only on the diagonal is a score hidden or a key beyond the segment."""
    keys = key + tl.arange(0, OTHER)
    is_key = keys < length
    k_tile = _rows(k, start + key, k_row, dims, is_key, is_dim)
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
    if IS_DIAGONAL:
        scores = tl.where(rows[:, None] >= keys[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    probs = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    v_tile = _rows(v, start + key, v_row, dims, is_key, is_dim)
    acc = tl.dot(probs.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total * shrink + tl.sum(probs, 1), acc


@triton.jit
def segments_forward(
    q, k, v, out, lse, tiles, q_row, q_head, k_row, k_head, v_row, v_head, out_row,
    num_positions, num_heads, scale, group, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads that share keys run side by side; one axis, because the others end at 65535.
    head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    start = tl.load(tiles + tile * 3)
    length, first = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    rows = first + tl.arange(0, OWN)
    is_row = rows < length
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < HEAD_DIM
    q_tile = _rows(q + head * q_head, start + first, q_row, dims, is_row, is_dim)
    k += head // group * k_head
    v += head // group * v_head
    top = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, BLOCK_H], tl.float32)
    seen_by_all = (first + 1) // OTHER * OTHER
    for key in range(0, seen_by_all, OTHER):
        top, total, acc = _forward_block(
            q_tile, k, v, rows, key, start, length, top, total, acc, k_row, v_row, dims, is_dim,
            scale, OTHER, False, PRECISION,
        )  # fmt: skip
    for key in range(seen_by_all, min(first + OWN, length), OTHER):
        top, total, acc = _forward_block(
            q_tile, k, v, rows, key, start, length, top, total, acc, k_row, v_row, dims, is_dim,
            scale, OTHER, True, PRECISION,
        )  # fmt: skip
    at = (start + rows).to(tl.int64)
    to = out + at[:, None] * out_row + head * HEAD_DIM + dims[None, :]
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(to, result, mask=is_row[:, None] & is_dim[None, :])
    # In base two, as the backward wants it.
    tl.store(lse + head.to(tl.int64) * num_positions + at, top + tl.log2(total), mask=is_row)


@triton.jit
def _dq_block(
    q, grad, k, v, rows, key, start, length, lse, delta, dq, k_row, v_row, dims, is_dim, scale,
    OTHER: tl.constexpr, IS_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    keys = key + tl.arange(0, OTHER)
    is_key = keys < length
    k_tile = _rows(k, start + key, k_row, dims, is_key, is_dim)
    v_tile = _rows(v, start + key, v_row, dims, is_key, is_dim)
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
    probs = tl.exp2(scores - lse[:, None])
    if IS_DIAGONAL:
        probs = tl.where(rows[:, None] >= keys[None, :], probs, 0.0)
    dprobs = tl.dot(grad, tl.trans(v_tile), input_precision=PRECISION)
    dscores = (probs * (dprobs - delta[:, None])).to(k_tile.dtype)
    return tl.dot(dscores, k_tile, dq, input_precision=PRECISION)


@triton.jit
def segments_dq(
    q, k, v, out, grad, lse, delta, dq, tiles, q_row, q_head, k_row, k_head, v_row, v_head,
    out_row, num_positions, num_heads, scale, group, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Also leaves delta = sum of grad * out of each row, which dk needs."""
    head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    start = tl.load(tiles + tile * 3)
    length, first = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    rows = first + tl.arange(0, OWN)
    is_row = rows < length
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < HEAD_DIM
    at = (start + rows).to(tl.int64)
    q_tile = _rows(q + head * q_head, start + first, q_row, dims, is_row, is_dim)
    grad_tile = _rows(grad + head * HEAD_DIM, start + first, out_row, dims, is_row, is_dim)
    out_tile = _rows(out + head * HEAD_DIM, start + first, out_row, dims, is_row, is_dim)
    row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    number = head.to(tl.int64) * num_positions + at
    tl.store(delta + number, row_delta, mask=is_row)
    row_lse = tl.load(lse + number, mask=is_row, other=float("inf"))
    k += head // group * k_head
    v += head // group * v_head
    acc = tl.zeros([OWN, BLOCK_H], tl.float32)
    seen_by_all = (first + 1) // OTHER * OTHER
    for key in range(0, seen_by_all, OTHER):
        acc = _dq_block(
            q_tile, grad_tile, k, v, rows, key, start, length, row_lse, row_delta, acc, k_row,
            v_row, dims, is_dim, scale, OTHER, False, PRECISION,
        )  # fmt: skip
    for key in range(seen_by_all, min(first + OWN, length), OTHER):
        acc = _dq_block(
            q_tile, grad_tile, k, v, rows, key, start, length, row_lse, row_delta, acc, k_row,
            v_row, dims, is_dim, scale, OTHER, True, PRECISION,
        )  # fmt: skip
    to = dq + at[:, None] * out_row + head * HEAD_DIM + dims[None, :]
    acc *= scale / LOG2E
    tl.store(to, acc.to(dq.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _dkv_block(
    q, grad, k, v, keys, query, start, length, lse, delta, dk, dv, q_row, out_row, dims, is_dim,
    scale, OTHER: tl.constexpr, IS_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in OTHER queries; scores are kept transposed, so that no tile is turned twice."""
    rows = query + tl.arange(0, OTHER)
    is_row = rows < length
    at = start + rows
    q_tile = _rows(q, start + query, q_row, dims, is_row, is_dim)
    # Beyond the segment the sum is infinite and every probability zero.
    row_lse = tl.load(lse + at, mask=is_row, other=float("inf"))
    probs = tl.exp2(
        tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale - row_lse[None, :]
    )
    if IS_DIAGONAL:
        probs = tl.where(rows[None, :] >= keys[:, None], probs, 0.0)
    grad_tile = _rows(grad, start + query, out_row, dims, is_row, is_dim)
    dv = tl.dot(probs.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
    row_delta = tl.load(delta + at, mask=is_row, other=0.0)
    dprobs = tl.dot(v, tl.trans(grad_tile), input_precision=PRECISION)
    dscores = (probs * (dprobs - row_delta[None, :])).to(q_tile.dtype)
    return tl.dot(dscores, q_tile, dk, input_precision=PRECISION), dv


@triton.jit
def segments_dkv(
    q, k, v, grad, lse, delta, dk, dv, tiles, q_row, q_head, k_row, k_head, v_row, v_head,
    out_row, kv_row, num_positions, num_heads, scale, group, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All query heads of a group add up in one program: no atomics."""
    kv_head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    start = tl.load(tiles + tile * 3)
    length, first = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    keys = first + tl.arange(0, OWN)
    is_key = keys < length
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < HEAD_DIM
    at = (start + keys).to(tl.int64)
    k_tile = _rows(k + kv_head * k_head, start + first, k_row, dims, is_key, is_dim)
    v_tile = _rows(v + kv_head * v_head, start + first, v_row, dims, is_key, is_dim)
    dk_acc = tl.zeros([OWN, BLOCK_H], tl.float32)
    dv_acc = tl.zeros([OWN, BLOCK_H], tl.float32)
    # OTHER divides OWN: from here on every query sees all of this tile's keys.
    after = min(first + OWN, length)
    for member in range(0, group):
        head = kv_head * group + member
        q_of, grad_of = q + head * q_head, grad + head * HEAD_DIM
        number = head.to(tl.int64) * num_positions
        for query in range(first, after, OTHER):
            dk_acc, dv_acc = _dkv_block(
                q_of, grad_of, k_tile, v_tile, keys, query, start, length, lse + number,
                delta + number, dk_acc, dv_acc, q_row, out_row, dims, is_dim, scale, OTHER, True,
                PRECISION,
            )  # fmt: skip
        for query in range(first + OWN, length, OTHER):
            dk_acc, dv_acc = _dkv_block(
                q_of, grad_of, k_tile, v_tile, keys, query, start, length, lse + number,
                delta + number, dk_acc, dv_acc, q_row, out_row, dims, is_dim, scale, OTHER, False,
                PRECISION,
            )  # fmt: skip
    to = at[:, None] * kv_row + kv_head * HEAD_DIM + dims[None, :]
    is_real = is_key[:, None] & is_dim[None, :]
    tl.store(dk + to, (dk_acc * (scale / LOG2E)).to(dk.dtype.element_ty), mask=is_real)
    tl.store(dv + to, dv_acc.to(dv.dtype.element_ty), mask=is_real)


class _SegmentAttention(torch.autograd.Function):
    """Keeps its inputs, the output and one number a row and head."""

    @staticmethod
    def forward(
        ctx: Any, q_MNH: Tensor, k_MKH: Tensor, v_MKH: Tensor, tiles: Tiles, sizes: Sizes
    ) -> Tensor:
        num_positions, num_heads, _ = q_MNH.shape
        out_MNH = _empty(q_MNH, tiles)
        lse_NM = q_MNH.new_empty(num_heads, num_positions, dtype=torch.float32)
        if len(tiles.by_queries):
            segments_forward[(num_heads * len(tiles.by_queries),)](
                q_MNH, k_MKH, v_MKH, out_MNH, lse_NM, tiles.by_queries,
                *_strides(q_MNH, k_MKH, v_MKH), out_MNH.stride(0),
                *_numbers(q_MNH, k_MKH, num_heads), **_options(q_MNH, sizes.forward),
            )  # fmt: skip
        ctx.save_for_backward(q_MNH, k_MKH, v_MKH, out_MNH, lse_NM)
        ctx.tiles, ctx.sizes = tiles, sizes
        return out_MNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_MNH, k_MKH, v_MKH, out_MNH, lse_NM = ctx.saved_tensors
        grad_MNH, tiles, sizes = grads[0].contiguous(), ctx.tiles, ctx.sizes
        delta_NM = torch.empty_like(lse_NM)
        dq_MNH, dk_MKH, dv_MKH = (_empty(x, tiles) for x in (q_MNH, k_MKH, v_MKH))
        if len(tiles.by_queries):
            strides = _strides(q_MNH, k_MKH, v_MKH)
            by_query, by_key = (_numbers(q_MNH, k_MKH, x.shape[1]) for x in (q_MNH, k_MKH))
            segments_dq[(q_MNH.shape[1] * len(tiles.by_queries),)](
                q_MNH, k_MKH, v_MKH, out_MNH, grad_MNH, lse_NM, delta_NM, dq_MNH,
                tiles.by_queries, *strides, out_MNH.stride(0), *by_query,
                **_options(q_MNH, sizes.dq),
            )  # fmt: skip
            segments_dkv[(k_MKH.shape[1] * len(tiles.by_keys),)](
                q_MNH, k_MKH, v_MKH, grad_MNH, lse_NM, delta_NM, dk_MKH, dv_MKH, tiles.by_keys,
                *strides, out_MNH.stride(0), dk_MKH.stride(0), *by_key,
                **_options(q_MNH, sizes.dkv),
            )  # fmt: skip
        return dq_MNH, dk_MKH, dv_MKH, None, None


def _empty(like: Tensor, tiles: Tiles) -> Tensor:
    """Contiguous; positions in no segment stay zero."""
    make = torch.empty if tiles.covers_all else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)


def _strides(q_MNH: Tensor, k_MKH: Tensor, v_MKH: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in (q_MNH, k_MKH, v_MKH) for stride in x.stride()[:2])


def _numbers(q_MNH: Tensor, k_MKH: Tensor, heads: int) -> tuple[int, int, float, int]:
    """For a kernel with a program for each tile of so many heads."""
    num_positions, num_heads, head_dim = q_MNH.shape
    scale = head_dim**-0.5 * math.log2(math.e)
    return num_positions, heads, scale, num_heads // k_MKH.shape[1]


def _options(q_MNH: Tensor, size: Blocks) -> dict[str, Any]:
    head_dim = q_MNH.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_H": max(triton.next_power_of_2(head_dim), 16),
        "OWN": size.own,
        "OTHER": size.other,
        "PRECISION": "ieee" if q_MNH.dtype == torch.float32 else "tf32",
        "num_warps": size.num_warps,
        "num_stages": size.num_stages,
    }


def segment_attention(
    q_MNH: Tensor, k_MKH: Tensor, v_MKH: Tensor, tiles: Tiles, sizes: Sizes
) -> Tensor:
    """Attend causally inside every segment; positions in no segment give zeros."""
    q_MNH, k_MKH, v_MKH = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_MNH, k_MKH, v_MKH)
    )
    return _SegmentAttention.apply(q_MNH, k_MKH, v_MKH, tiles, sizes)
