"""Products in fp8 (e4m3): scales of 1 x 128 for activations, 128 x 128 for weights.

in: activations [M, K] and weights [E, N, K] in codes, contiguous along K, with fp32 scales
out: y [R, N]
source: DeepSeek-V3 (arXiv 2412.19437, section 3.3): a product of 128 inputs is scaled and added to
an fp32 sum, as the tensor cores' own sum keeps too few bits
Both widths of a weight are multiples of 128. fp8 tensor cores want both sides contiguous along the
summed dimension, so a weight is coded once in each of its two directions, with the same scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from src_kernels.cuda.grouping import Groups
from src_kernels.cuda.moe import place, rows_of_tile

BLOCK = 128
LARGEST = 448.0  # of e4m3
TINY = 1e-30  # a block of zeros still has a scale


@triton.jit
def _codes(x, largest):
    """Codes and scale of values whose largest magnitude is known (shapes must broadcast)."""
    scale = tl.maximum(largest, 1e-30) / 448.0
    return (x * (1.0 / scale)).to(tl.float8e4nv), scale


@triton.jit
def quantize_rows_kernel(x_ptr, codes_ptr, scale_ptr, M, K, BM: tl.constexpr):
    """One scale for each row and 128 inputs."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    offsets = rows[:, None] * K + block * 128 + tl.arange(0, 128)[None, :]
    is_real = rows < M
    x = tl.load(x_ptr + offsets, mask=is_real[:, None], other=0.0).to(tl.float32)
    codes, scale = _codes(x, tl.max(tl.abs(x), axis=1)[:, None])
    tl.store(codes_ptr + offsets, codes, mask=is_real[:, None])
    scale_ptrs = scale_ptr + rows * (K // 128) + block
    tl.store(scale_ptrs, tl.sum(scale, axis=1), mask=is_real)


@triton.jit
def quantize_blocks_kernel(w_ptr, codes_ptr, turned_ptr, scale_ptr, K, N):
    """One scale for 128 x 128 weights; the codes as they are and turned."""
    expert, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    k = i * 128 + tl.arange(0, 128)
    n = j * 128 + tl.arange(0, 128)
    offsets = expert * K * N + k[:, None] * N + n[None, :]
    w = tl.load(w_ptr + offsets).to(tl.float32)
    codes, scale = _codes(w, tl.max(tl.max(tl.abs(w), axis=1), axis=0))
    tl.store(codes_ptr + offsets, codes)
    turned = expert * K * N + n[None, :] * K + k[:, None]
    tl.store(turned_ptr + turned, codes)
    tl.store(scale_ptr + (expert * (K // 128) + i) * (N // 128) + j, scale)


@triton.jit
def rows_product(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, y_ptr, slots_ptr, ends_ptr, tile_ends_ptr,
    num_tiles, E, K, N, w_scale_k, w_scale_n,
    TOP_K: tl.constexpr, SCATTERS: tl.constexpr, E_POWER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y = a @ w[expert].T; w codes are [E, N, K], their scales have the given strides.

    With TOP_K rows of a are tokens, gathered by slot; y is by slot when it SCATTERS, else by row.
    """
    tile, block = place(tl.program_id(0), num_tiles, N // BN, 8)
    expert, rows, is_real, slots = rows_of_tile(
        tile, slots_ptr, ends_ptr, tile_ends_ptr, E, E_POWER, BM
    )
    if expert >= E:
        return
    a_rows = slots // TOP_K if TOP_K else tl.where(is_real, rows, 0)
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, 128)
    a_ptrs = a_ptr + a_rows[:, None] * K + k[None, :]
    a_scale_ptrs = a_scale_ptr + a_rows * (K // 128)
    w_ptrs = w_ptr + expert.to(tl.int64) * K * N + n[None, :] * K + k[:, None]
    w_scale_ptr += expert * (K // 128) * (N // 128) + (block * BN // 128) * w_scale_n
    y = tl.zeros((BM, BN), tl.float32)
    for i in range(0, K // 128):
        a = tl.load(a_ptrs)
        w = tl.load(w_ptrs)
        scale = tl.load(a_scale_ptrs + i) * tl.load(w_scale_ptr + i * w_scale_k)
        y += tl.dot(a, w) * scale[:, None]
        a_ptrs += 128
        w_ptrs += 128
    y_rows = slots if SCATTERS else rows
    y_ptrs = y_ptr + y_rows[:, None] * N + n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=is_real[:, None])


@triton.jit
def swiglu_codes_kernel(h_ptr, gate_ptr, slots_ptr, codes_ptr, scale_ptr, R, F, BM: tl.constexpr):
    """a = silu(g * h_gate) * g * h_up in codes, [R, F] by row."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    is_real = rows < R
    n = block * 128 + tl.arange(0, 128)
    slots = tl.load(slots_ptr + rows, mask=is_real, other=0)
    gate = tl.load(gate_ptr + slots)[:, None]
    h_ptrs = h_ptr + rows[:, None] * (2 * F) + n[None, :]
    scaled = tl.load(h_ptrs, mask=is_real[:, None], other=0.0).to(tl.float32) * gate
    up = tl.load(h_ptrs + F, mask=is_real[:, None], other=0.0).to(tl.float32) * gate
    a = scaled * tl.sigmoid(scaled) * up
    codes, scale = _codes(a, tl.max(tl.abs(a), axis=1)[:, None])
    tl.store(codes_ptr + rows[:, None] * F + n[None, :], codes, mask=is_real[:, None])
    tl.store(scale_ptr + rows * (F // 128) + block, tl.sum(scale, axis=1), mask=is_real)


@triton.jit
def swiglu_gradient_kernel(
    h_ptr, da_ptr, gate_ptr, slots_ptr, a_ptr, dh_ptr, codes_ptr, scale_ptr, dgate_ptr,
    R, F, BM: tl.constexpr,
):  # fmt: skip
    """Through SwiGLU and the gate: a again, dh (also in codes), shares of the gate's gradient."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    is_real = rows < R
    mask = is_real[:, None]
    n = block * 128 + tl.arange(0, 128)
    slots = tl.load(slots_ptr + rows, mask=is_real, other=0)
    gate = tl.load(gate_ptr + slots)[:, None]
    offsets = rows[:, None] * (2 * F) + n[None, :]
    h_gate = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    h_up = tl.load(h_ptr + offsets + F, mask=mask, other=0.0).to(tl.float32)
    a_offsets = rows[:, None] * F + n[None, :]
    da = tl.load(da_ptr + a_offsets, mask=mask, other=0.0).to(tl.float32)
    scaled = gate * h_gate
    sigmoid = tl.sigmoid(scaled)
    silu = scaled * sigmoid
    tl.store(a_ptr + a_offsets, (silu * gate * h_up).to(a_ptr.dtype.element_ty), mask=mask)
    dscaled = da * gate * h_up * (sigmoid + silu * (1 - sigmoid))
    dscaled_up = da * silu
    dgate = tl.sum(dscaled * h_gate + dscaled_up * h_up, axis=1)
    tl.store(dgate_ptr + block.to(tl.int64) * R + slots, dgate, mask=is_real)
    scale_ptrs = scale_ptr + rows * (2 * F // 128) + block
    for half in tl.static_range(2):
        dh = gate * (dscaled_up if half else dscaled)
        codes, scale = _codes(dh, tl.max(tl.abs(dh), axis=1)[:, None])
        tl.store(dh_ptr + offsets + half * F, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(codes_ptr + offsets + half * F, codes, mask=mask)
        tl.store(scale_ptrs + half * (F // 128), tl.sum(scale, axis=1), mask=is_real)


ROWS = 16  # of an elementwise program


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """shapes: [M, K] -> codes [M, K], scale fp32 [M, K / 128]"""
    num_rows, depth = x_MK.shape
    codes = x_MK.new_empty(num_rows, depth, dtype=torch.float8_e4m3fn)
    scale = x_MK.new_empty(num_rows, depth // BLOCK, dtype=torch.float32)
    grid = (triton.cdiv(num_rows, ROWS), depth // BLOCK)
    quantize_rows_kernel[grid](x_MK, codes, scale, num_rows, depth, BM=ROWS)
    return codes, scale


def quantize_blocks(w_EKN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """shapes: [E, K, N] -> codes [E, K, N], the same turned [E, N, K], scale [E, K/128, N/128]"""
    num_experts, depth, columns = w_EKN.shape
    codes = torch.empty_like(w_EKN, dtype=torch.float8_e4m3fn)
    turned = codes.new_empty(num_experts, columns, depth)
    grid = (num_experts, depth // BLOCK, columns // BLOCK)
    scale = w_EKN.new_empty(grid, dtype=torch.float32)
    quantize_blocks_kernel[grid](w_EKN, codes, turned, scale, depth, columns)
    return codes, turned, scale


def product(
    a: tuple[Tensor, Tensor],
    w_ENK: Tensor,
    w_scale: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    *,
    gathers: bool = False,
    scatters: bool = False,
    turned_scale: bool = False,
    block_m: int | None = None,
) -> Tensor:
    """Each row times its expert's matrix. `turned_scale`: w_scale is [E, K/128, N/128].

    shapes: a codes [.., K], w [E, N, K], w_scale [E, N/128, K/128] -> [R, N]
    """
    codes, scale = a
    _, columns, depth = w_ENK.shape
    num_rows = groups.num_rows
    block_m = block_m or (128 if num_rows > 96 * groups.num_experts else 64)
    y = codes.new_empty(num_rows, columns, dtype=dtype)
    num_tiles = groups.max_tiles(block_m)
    strides = (w_scale.stride(1), w_scale.stride(2))
    scale_k, scale_n = strides if turned_scale else strides[::-1]
    rows_product[(num_tiles * (columns // BLOCK),)](
        codes, scale, w_ENK, w_scale, y, groups.slots, groups.ends, groups.tile_ends(block_m),
        num_tiles, groups.num_experts, depth, columns, scale_k, scale_n,
        TOP_K=groups.top_k if gathers else 0, SCATTERS=scatters,
        E_POWER=triton.next_power_of_2(groups.num_experts), BM=block_m, BN=BLOCK,
        num_warps=8 if block_m == 128 else 4, num_stages=3,
    )  # fmt: skip
    return y


def swiglu_codes(h_RF: Tensor, gate_R: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """shapes: h [R, 2F] by row, gate by slot -> codes [R, F], scale [R, F / 128]"""
    num_rows, width = len(h_RF), h_RF.shape[1] // 2
    codes = h_RF.new_empty(num_rows, width, dtype=torch.float8_e4m3fn)
    scale = h_RF.new_empty(num_rows, width // BLOCK, dtype=torch.float32)
    grid = (triton.cdiv(num_rows, ROWS), width // BLOCK)
    swiglu_codes_kernel[grid](h_RF, gate_R, groups.slots, codes, scale, num_rows, width, BM=ROWS)
    return codes, scale


def swiglu_gradient(
    h_RF: Tensor, da_RF: Tensor, gate_R: Tensor, groups: Groups
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """shapes: -> a [R, F], dh [R, 2F], the codes and scale of dh, dgate [R] by slot"""
    num_rows, width = da_RF.shape
    a_RF, dh_RF = torch.empty_like(da_RF), torch.empty_like(h_RF)
    codes = torch.empty_like(h_RF, dtype=torch.float8_e4m3fn)
    scale = h_RF.new_empty(num_rows, 2 * width // BLOCK, dtype=torch.float32)
    shares = gate_R.new_empty(width // BLOCK, num_rows)
    grid = (triton.cdiv(num_rows, ROWS), width // BLOCK)
    swiglu_gradient_kernel[grid](
        h_RF, da_RF, gate_R, groups.slots, a_RF, dh_RF, codes, scale, shares,
        num_rows, width, BM=ROWS,
    )  # fmt: skip
    return a_RF, dh_RF, (codes, scale), shares.sum(0)
