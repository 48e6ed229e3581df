"""Decoding with routed experts in int4: few rows, weights read once and widened in registers.

in: x [M, D], expert choices, packed codes and their scales; out: y [M * A, D] by slot
The weights lie as `int4_layout` says: what a block reads is one contiguous stream.
(code - zero) is an integer that bf16 and fp16 hold exactly, so a group's product is exact but for
the activations' rounding; its scale multiplies the fp32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from src_kernels.cuda.int4_layout import OUTPUTS, PackedInt4

ROWS = 16  # of activations a block holds at most


@triton.jit
def _activations(x_ptr, gate, places, k, is_real, WIDTH, SWIGLU: tl.constexpr, DTYPE: tl.constexpr):
    """Some inputs of some rows, [K, rows]; of a hidden row h, what SwiGLU and the gate make."""
    if SWIGLU:
        h_ptrs = x_ptr + places[None, :] * (2 * WIDTH) + k[:, None]
        h_gate = tl.load(h_ptrs, mask=is_real[None, :], other=0.0).to(tl.float32) * gate[None, :]
        h_up = tl.load(h_ptrs + WIDTH, mask=is_real[None, :], other=0.0).to(tl.float32)
        x = h_gate * tl.sigmoid(h_gate) * h_up * gate[None, :]
    else:
        x = tl.load(x_ptr + places[None, :] * WIDTH + k[:, None], mask=is_real[None, :], other=0.0)
    return x.to(DTYPE)


@triton.jit
def _integers(nibbles, zero, DTYPE: tl.constexpr):
    """(code - zero), exactly: the code in the low bits of a number whose last place is one."""
    words = nibbles.to(tl.int16)
    if tl.bfloat16 == DTYPE:
        integers = (words | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(DTYPE)
    elif tl.float16 == DTYPE:
        integers = (words | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024.0).to(DTYPE)
    else:
        integers = words.to(tl.float32) - zero
    return integers


@triton.jit
def grouped_rows(
    x_ptr, gate_ptr, expert_ptr, codes_ptr, scale_ptr, zero_ptr, y_ptr,
    R, WIDTH, num_outputs, num_tiles, num_groups, groups_per_split,
    SPREAD: tl.constexpr, SWIGLU: tl.constexpr, HAS_ZERO: tl.constexpr,
    G: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[split, slot] = x @ w[expert of slot].T over this split's groups of inputs.

    One program: a slot, the slots behind it with the same expert, 64 outputs. Slots whose expert
    stands further ahead are served there, so that an expert's bytes are read once for all.
    """
    slot, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(expert_ptr + slot)
    others = tl.arange(0, BR)
    base = slot // BR * BR
    is_mine = tl.load(expert_ptr + base + others, mask=base + others < R, other=-1) == expert
    if tl.sum((is_mine & (base + others < slot)).to(tl.int32), axis=0) > 0:
        return
    slots = base + others
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + slots, mask=is_mine, other=0.0)
    places = slots if SWIGLU else slots // SPREAD
    places = places.to(tl.int64)
    o, j = tl.arange(0, BO), tl.arange(0, G // 2)
    stream = (expert.to(tl.int64) * num_tiles + tile) * num_groups
    y = tl.zeros((BO, BR), tl.float32)
    first = split * groups_per_split
    for group in range(first, min(first + groups_per_split, num_groups)):
        at = (stream + group) * BO
        packed = tl.load(codes_ptr + at * (G // 2) + o[:, None] * (G // 2) + j[None, :])
        scale = tl.load(scale_ptr + at + o).to(tl.float32)
        zero = tl.full((BO,), 8.0, tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + at + o).to(tl.float32)
        low = _integers(packed & 15, zero[:, None], DTYPE)
        high = _integers(packed >> 4, zero[:, None], DTYPE)
        k = group * G + j
        x_low = _activations(x_ptr, gate, places, k, is_mine, WIDTH, SWIGLU, DTYPE)
        x_high = _activations(x_ptr, gate, places, k + G // 2, is_mine, WIDTH, SWIGLU, DTYPE)
        part = tl.dot(low, x_low, input_precision="ieee")
        part = tl.dot(high, x_high, part, input_precision="ieee")
        y += part * scale[:, None]
    outputs = tile * BO + o
    y_ptrs = y_ptr + (split * R + slots)[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    mask = is_mine[None, :] & (outputs[:, None] < num_outputs)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def routed_experts(
    x_MD: Tensor,
    gate_MA: Tensor,
    expert_MA: Tensor,
    w_in: PackedInt4,
    w_out: PackedInt4,
    num_programs: int = 528,
) -> Tensor:
    """Each token through its experts, summed. w_in's outputs are gate rows, then up rows.

    Meant for up to some dozens of rows. shapes: -> [M, D]. `num_programs`: blocks that keep the
    device busy (four for each processor of an H100)
    """
    if len(x_MD) == 0:
        return x_MD.clone()
    top_k = expert_MA.shape[1]
    experts, gates = expert_MA.flatten().to(torch.int32), gate_MA.float().flatten()
    h_RF = _launch(x_MD.contiguous(), gates, experts, w_in, top_k, False, num_programs)
    y_RD = _launch(h_RF, gates, experts, w_out, top_k, True, num_programs)
    return y_RD if top_k == 1 else y_RD.unflatten(0, (-1, top_k)).sum(1)


def linear(x_MI: Tensor, weight: PackedInt4, num_programs: int = 528) -> Tensor:
    """Every token through one map, the only one in `weight`. shapes: -> [M, O]"""
    experts = torch.zeros(len(x_MI), dtype=torch.int32, device=x_MI.device)
    no_gates = experts.view(torch.float32)  # read and not used before SwiGLU
    return _launch(x_MI.contiguous(), no_gates, experts, weight, 1, False, num_programs)


def _launch(
    x: Tensor, gates: Tensor, experts: Tensor, w: PackedInt4, top_k: int, swiglu: bool, wanted: int
) -> Tensor:
    num_rows, num_tiles, num_groups = len(experts), w.codes.shape[1], w.codes.shape[2]
    width = w.num_inputs
    assert x.shape[1] == (2 * width if swiglu else width), (x.shape, width)
    splits = min(num_groups, max(1, wanted // (num_rows * num_tiles)))
    per_split = triton.cdiv(num_groups, splits)
    splits = triton.cdiv(num_groups, per_split)
    dtype = x.dtype if splits == 1 else torch.float32
    y = x.new_empty(splits, num_rows, w.num_outputs, dtype=dtype)
    grouped_rows[(num_rows, num_tiles, splits)](
        x, gates, experts, w.codes, w.scale, w.codes if w.zero is None else w.zero, y,
        num_rows, width, w.num_outputs, num_tiles, num_groups, per_split,
        SPREAD=top_k, SWIGLU=swiglu, HAS_ZERO=w.zero is not None,
        G=w.group_size, BO=OUTPUTS, BR=ROWS, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)
