"""Attention of few queries with very many keys: the keys are split, every split read once.

in: q [K, R, H] (the heads of a group are rows), parts of keys and values [K, S, H], plain or in
codes of 8 or 4 bits; out: [K, R, H] and the log of the softmax's denominator [K, R], both fp32
source: flash decoding (split over keys, log-sum-exp merge); codes as in KIVI (arXiv 2402.02750):
keys by channel in groups of tokens, values by token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KEY_GROUP = tl.constexpr(128)  # tokens that share a channel's scale and minimum
MAX_HEAD_DIM = 128  # up to here a token's values share one scale
MAX_ROWS = 64  # in one program; more are shared out, and the keys are read again
PROGRAMS = 528  # four a multiprocessor of an H100: enough reads in flight
GROUP = 128  # splits joined by one program
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class Part(NamedTuple):
    """Keys and values of some tokens, `bits` 0 for floats.

    shapes: codes [K, S, H], of 4 bits [K, S, H / 2] (channel j below j + H / 2); key scale and
    low [K, S / 128, H]; value scale and low [K, S, 1]
    """

    bits: int
    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    key_low: Tensor | None = None
    value_scale: Tensor | None = None
    value_low: Tensor | None = None


@triton.jit
def _softmax_step(scores, is_key, top, total):
    """Scores in base two of new keys; what was summed before shrinks by the third result."""
    scores = tl.where(is_key[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new_top)
    probs = tl.exp2(scores - new_top[:, None])
    return probs, new_top, shrink, total * shrink + tl.sum(probs, 1)


@triton.jit
def _row_scale(factor, rows, is_row, scale, HAS_FACTOR: tl.constexpr):
    """What a row's scores are multiplied with: temperatures of positions belong here."""
    if HAS_FACTOR:
        return tl.load(factor + rows, mask=is_row, other=0.0) * scale
    return tl.zeros(rows.shape, tl.float32) + scale


@triton.jit
def split_plain(
    q, keys, values, factor, out, lse, num_tokens, span, num_rows, key_head, key_token,
    value_head, value_token, scale, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, HAS_FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    split, head = tl.program_id(0), tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < num_rows
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < HEAD_DIM
    number = head * num_rows + rows
    at = number[:, None] * HEAD_DIM + dims[None, :]
    is_real = is_row[:, None] & is_dim[None, :]
    q_tile = tl.load(q + at, mask=is_real, other=0.0)
    row_scale = _row_scale(factor, rows, is_row, scale, HAS_FACTOR)[:, None]
    keys += head.to(tl.int64) * key_head
    values += head.to(tl.int64) * value_head
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    end = min(split * span + span, num_tokens)
    for first in range(split * span, end, BLOCK_S):
        tokens = first + tl.arange(0, BLOCK_S)
        is_key = tokens < end
        is_read = is_key[:, None] & is_dim[None, :]
        tokens = tokens.to(tl.int64)[:, None]
        k = tl.load(keys + tokens * key_token + dims[None, :], mask=is_read, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k.to(q_tile.dtype)), input_precision=PRECISION)
        probs, top, shrink, total = _softmax_step(scores * row_scale, is_key, top, total)
        v = tl.load(values + tokens * value_token + dims[None, :], mask=is_read, other=0.0)
        v = v.to(q_tile.dtype)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    rows_in_all = tl.num_programs(1) * num_rows
    out += split.to(tl.int64) * rows_in_all * HEAD_DIM
    tl.store(out + at, acc / total[:, None], mask=is_real)
    tl.store(lse + split * rows_in_all + number, (top + tl.log2(total)) * LN2, mask=is_row)


@triton.jit
def _codes(base, tokens, stride, dims, is_real, HALF: tl.constexpr, BITS: tl.constexpr):
    """The codes of the first and the second half of the channels, as numbers."""
    at = base + tokens * stride + dims[None, :]
    first = tl.load(at, mask=is_real, other=0)
    if BITS == 4:
        return (first & 15).to(tl.float32), (first >> 4).to(tl.float32)
    second = tl.load(at + HALF, mask=is_real, other=0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _key_levels(scale, low, at, is_dim):
    """Scale and minimum of every channel in a group of tokens."""
    step = tl.load(scale + at, mask=is_dim, other=0.0).to(tl.float32)
    least = tl.load(low + at, mask=is_dim, other=0.0).to(tl.float32)
    return step[None, :], least[None, :]


@triton.jit
def split_codes(
    q, keys, values, factor, out, lse, key_scale, key_low, value_scale, value_low, num_tokens,
    span, num_rows, key_head, value_head, level_head, value_level_head, scale,
    HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_FACTOR: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The channels in halves, as 4-bit codes lie; BLOCK_S divides a group of tokens."""
    split, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    width: tl.constexpr = half if BITS == 4 else HEAD_DIM
    rows = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < num_rows
    dims = tl.arange(0, BLOCK_HALF)
    is_dim = dims < half
    number = head * num_rows + rows
    at = number[:, None] * HEAD_DIM + dims[None, :]
    is_real = is_row[:, None] & is_dim[None, :]
    q_one = tl.load(q + at, mask=is_real, other=0.0)
    q_two = tl.load(q + at + half, mask=is_real, other=0.0)
    dtype = q_one.dtype
    row_scale = _row_scale(factor, rows, is_row, scale, HAS_FACTOR)[:, None]
    wide = head.to(tl.int64)
    keys += wide * key_head
    values += wide * value_head
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    one = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)
    two = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)
    end = min(split * span + span, num_tokens)
    for first in range(split * span, end, BLOCK_S):
        tokens = first + tl.arange(0, BLOCK_S)
        is_key = tokens < end
        is_read = is_key[:, None] & is_dim[None, :]
        group = wide * level_head + first // KEY_GROUP * HEAD_DIM + dims
        k_one, k_two = _codes(keys, tokens[:, None], width, dims, is_read, half, BITS)
        step, least = _key_levels(key_scale, key_low, group, is_dim)
        k_one = (k_one * step + least).to(dtype)
        step, least = _key_levels(key_scale, key_low, group + half, is_dim)
        k_two = (k_two * step + least).to(dtype)
        scores = tl.dot(q_one, tl.trans(k_one), input_precision=PRECISION)
        scores = tl.dot(q_two, tl.trans(k_two), scores, input_precision=PRECISION)
        probs, top, shrink, total = _softmax_step(scores * row_scale, is_key, top, total)
        probs = probs.to(dtype)
        v_one, v_two = _codes(values, tokens[:, None], width, dims, is_read, half, BITS)
        level = wide * value_level_head + tokens
        step = tl.load(value_scale + level, mask=is_key, other=0.0).to(tl.float32)[:, None]
        least = tl.load(value_low + level, mask=is_key, other=0.0).to(tl.float32)[:, None]
        v_one, v_two = (v_one * step + least).to(dtype), (v_two * step + least).to(dtype)
        one = tl.dot(probs, v_one, one * shrink[:, None], input_precision=PRECISION)
        two = tl.dot(probs, v_two, two * shrink[:, None], input_precision=PRECISION)
    rows_in_all = tl.num_programs(1) * num_rows
    out += split.to(tl.int64) * rows_in_all * HEAD_DIM
    tl.store(out + at, one / total[:, None], mask=is_real)
    tl.store(out + at + half, two / total[:, None], mask=is_real)
    tl.store(lse + split * rows_in_all + number, (top + tl.log2(total)) * LN2, mask=is_row)


@triton.jit
def merge_splits(
    out, lse, merged, merged_lse, num_splits, num_rows, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Join the softmaxes of up to GROUP splits, each weighted by its share of the whole sum."""
    row, group = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < HEAD_DIM
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_H], tl.float32)
    end = min(group * GROUP + GROUP, num_splits)
    for first in range(group * GROUP, end, AT_ONCE):
        splits = first + tl.arange(0, AT_ONCE)
        is_split = splits < end
        at = splits.to(tl.int64) * num_rows + row
        sums = tl.load(lse + at, mask=is_split, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(sums, 0))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(sums - new_top)
        where = out + at[:, None] * HEAD_DIM + dims[None, :]
        tile = tl.load(where, mask=is_split[:, None] & is_dim[None, :], other=0.0)
        acc = acc * shrink + tl.sum(tile * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        top = new_top
    to = group.to(tl.int64) * num_rows + row
    tl.store(merged + to * HEAD_DIM + dims, acc / total, mask=is_dim)
    tl.store(merged_lse + to, top + tl.log(total))


def attend_parts(
    q_KRH: Tensor,
    parts: Sequence[Part],
    before: tuple[Tensor, Tensor] | None = None,
    factor_R: Tensor | None = None,
    span: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with rows that see every key of every part, joined with what they saw `before`.

    shapes: factor_R fp32, what a row's scores are multiplied with; `span`: keys a split
    """
    q_KRH = q_KRH.contiguous()
    num_heads, num_rows, head_dim = q_KRH.shape
    blocks_of_rows = triton.cdiv(num_rows, MAX_ROWS)
    spans = [span or _span(part.keys.shape[1], num_heads * blocks_of_rows) for part in parts]
    counts = [triton.cdiv(p.keys.shape[1], s) for p, s in zip(parts, spans, strict=True)]
    earlier = int(before is not None)
    shape = (earlier + sum(counts), num_heads, num_rows)
    out = torch.empty(*shape, head_dim, dtype=torch.float32, device=q_KRH.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q_KRH.device)
    if before is not None:
        out[0], lse[0] = before
    first = earlier
    for part, keys_a_split, count in zip(parts, spans, counts, strict=True):
        grid = (count, num_heads, blocks_of_rows)
        if count:
            _launch(grid, q_KRH, part, factor_R, out[first:], lse[first:], keys_a_split)
        first += count
    while len(out) > 1:
        out, lse = _merge(out, lse)
    return out[0], lse[0]


def _span(num_tokens: int, programs_a_split: int) -> int:
    """Keys of a split: whole groups of tokens, and enough splits for every multiprocessor."""
    wanted = num_tokens * programs_a_split // PROGRAMS
    return max(1, triton.cdiv(wanted, KEY_GROUP.value)) * KEY_GROUP.value


def _launch(
    grid: tuple[int, ...], q_KRH: Tensor, part: Part, factor_R: Tensor | None, out: Tensor,
    lse: Tensor, span: int,
) -> None:  # fmt: skip
    """Every split of one part."""
    _, num_rows, head_dim = q_KRH.shape
    num_tokens = part.keys.shape[1]
    scale = head_dim**-0.5 * math.log2(math.e)
    tensors = (q_KRH, part.keys, part.values, q_KRH if factor_R is None else factor_R, out, lse)
    options: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_R": min(max(triton.next_power_of_2(num_rows), 16), MAX_ROWS),
        "BLOCK_S": 64,
        "HAS_FACTOR": factor_R is not None,
        "PRECISION": "ieee" if q_KRH.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 3,
    }
    if not part.bits:
        options["BLOCK_H"] = max(triton.next_power_of_2(head_dim), 16)
        split_plain[grid](
            *tensors, num_tokens, span, num_rows, *part.keys.stride()[:2],
            *part.values.stride()[:2], scale, **options,
        )  # fmt: skip
        return
    assert part.key_scale is not None
    assert part.value_scale is not None
    split_codes[grid](
        *tensors, part.key_scale, part.key_low, part.value_scale, part.value_low, num_tokens,
        span, num_rows, part.keys.stride(0), part.values.stride(0), part.key_scale.stride(0),
        part.value_scale.stride(0), scale, BITS=part.bits,
        BLOCK_HALF=max(triton.next_power_of_2(head_dim // 2), 16), **options,
    )  # fmt: skip


def _merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One level of joining: a GROUP of splits becomes one."""
    num_splits, num_heads, num_rows, head_dim = out.shape
    groups = triton.cdiv(num_splits, GROUP)
    merged, merged_lse = (
        out.new_empty(groups, *out.shape[1:]),
        lse.new_empty(groups, *lse.shape[1:]),
    )
    merge_splits[(num_heads * num_rows, groups)](
        out, lse, merged, merged_lse, num_splits, num_heads * num_rows, head_dim,
        triton.next_power_of_2(head_dim), GROUP, 32, num_warps=4,
    )  # fmt: skip
    return merged, merged_lse
