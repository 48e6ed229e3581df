"""Routed experts: products over ragged groups of rows, SwiGLU inside, forward and backward.

in: x [M, D], slots sorted by expert, weights [E, D, 2F] (gate columns, then up) and [E, F, D]
out: y [M * A, D] in the slots' order, and every gradient
Rows are gathered and scattered by the products themselves: no sorted copy of x is ever made.
The gate multiplies an expert's input; as a product is linear, it is applied to the fp32 result,
and the unscaled h = x @ w_in is what the backward keeps: the gate's gradient is then a row sum of
dh * h. An expert without rows costs nothing, and gets zero gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from src_kernels.cuda.grouping import Groups


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: rows, columns, the depth of a step; warps and stages of a block."""

    m: int = 128
    n: int = 128
    k: int = 64
    num_warps: int = 8
    num_stages: int = 3

    @property
    def half_n(self) -> int:
        """Columns where gate and up are computed side by side, in the registers of one."""
        return max(16, self.n // 2)


SMALL = Tiles(16, 16, 16, 4, 1)  # many tiles out of tiny tests


def tiles_for(num_rows: int, num_experts: int, dtype: torch.dtype) -> Tiles:
    """Tiles by how many rows an expert has on average. Reasoned, not measured."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    mean = num_rows / num_experts
    if mean <= 16:
        return Tiles(16, 128, 64, 4, 4)
    if mean <= 96:
        return Tiles(64, 128, 64, 4, 4)
    return Tiles()


@triton.jit
def rows_of_tile(
    tile, slots_ptr, ends_ptr, tile_ends_ptr, E, E_POWER: tl.constexpr, BM: tl.constexpr
):
    """The expert of a tile (E: none), its rows, which of them are real, and their slots."""
    experts = tl.arange(0, E_POWER)
    tile_ends = tl.load(tile_ends_ptr + experts, mask=experts < E, other=2147483647)
    is_before = tile_ends <= tile
    expert = tl.sum(is_before.to(tl.int32), axis=0)
    first_tile = tl.max(tl.where(is_before, tile_ends, 0), axis=0)
    start = tl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    end = tl.load(ends_ptr + expert, mask=expert < E, other=0)
    rows = start + (tile - first_tile) * BM + tl.arange(0, BM)
    is_real = rows < end
    # Rows past the end read slot 0, which exists, and are never stored.
    slots = tl.load(slots_ptr + rows, mask=is_real, other=0)
    return expert, rows.to(tl.int64), is_real, slots.to(tl.int64)


@triton.jit
def place(pid, num_tiles, num_blocks, BAND: tl.constexpr):
    """Walk bands of tiles column by column: neighbours share weights and rows in the cache."""
    per_band = BAND * num_blocks
    first = (pid // per_band) * BAND
    height = min(num_tiles - first, BAND)
    within = pid % per_band
    return first + within % height, within // height


@triton.jit
def swiglu_forward(
    x_ptr, w_ptr, gate_ptr, a_ptr, h_ptr, slots_ptr, ends_ptr, tile_ends_ptr,
    num_tiles, E, D, F,
    TOP_K: tl.constexpr, E_POWER: tl.constexpr, EVEN: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h = x[rows] @ w_in[expert] (kept when KEEP); a = silu(g * h_gate) * g * h_up."""
    tile, block = place(tl.program_id(0), num_tiles, tl.cdiv(F, BN), 8)
    expert, rows, is_real, slots = rows_of_tile(
        tile, slots_ptr, ends_ptr, tile_ends_ptr, E, E_POWER, BM
    )
    if expert >= E:
        return
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + (slots // TOP_K)[:, None] * D + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * D * 2 * F + k[:, None] * (2 * F) + n[None, :]
    h_gate = tl.zeros((BM, BN), tl.float32)
    h_up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if EVEN:
            x = tl.load(x_ptrs)
            w_gate = tl.load(w_ptrs)
            w_up = tl.load(w_ptrs + F)
        else:
            is_in = (k[:, None] < D - start) & (n[None, :] < F)
            x = tl.load(x_ptrs, mask=k[None, :] < D - start, other=0.0)
            w_gate = tl.load(w_ptrs, mask=is_in, other=0.0)
            w_up = tl.load(w_ptrs + F, mask=is_in, other=0.0)
        h_gate = tl.dot(x, w_gate, h_gate, input_precision=PRECISION)
        h_up = tl.dot(x, w_up, h_up, input_precision=PRECISION)
        x_ptrs += BK
        w_ptrs += BK * 2 * F
    is_stored = is_real[:, None] & (n[None, :] < F)
    if KEEP:
        h_ptrs = h_ptr + rows[:, None] * (2 * F) + n[None, :]
        tl.store(h_ptrs, h_gate.to(h_ptr.dtype.element_ty), mask=is_stored)
        tl.store(h_ptrs + F, h_up.to(h_ptr.dtype.element_ty), mask=is_stored)
    gate = tl.load(gate_ptr + slots)[:, None]
    scaled = gate * h_gate
    a = scaled * tl.sigmoid(scaled) * gate * h_up
    a_ptrs = a_ptr + rows[:, None] * F + n[None, :]
    tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=is_stored)


@triton.jit
def rows_product(
    a_ptr, w_ptr, y_ptr, slots_ptr, ends_ptr, tile_ends_ptr,
    num_tiles, E, K, N,
    TRANSPOSED: tl.constexpr, E_POWER: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[slot] = a[row] @ w[expert]; w is [E, K, N], or [E, N, K] when TRANSPOSED."""
    tile, block = place(tl.program_id(0), num_tiles, tl.cdiv(N, BN), 8)
    expert, rows, is_real, slots = rows_of_tile(
        tile, slots_ptr, ends_ptr, tile_ends_ptr, E, E_POWER, BM
    )
    if expert >= E:
        return
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + tl.where(is_real, rows, 0)[:, None] * K + k[None, :]
    w_ptr += expert.to(tl.int64) * K * N
    if TRANSPOSED:
        w_ptrs = w_ptr + n[None, :] * K + k[:, None]
    else:
        w_ptrs = w_ptr + k[:, None] * N + n[None, :]
    y = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            a = tl.load(a_ptrs, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs, mask=(k[:, None] < K - start) & (n[None, :] < N), other=0.0)
        y = tl.dot(a, w, y, input_precision=PRECISION)
        a_ptrs += BK
        w_ptrs += BK if TRANSPOSED else BK * N
    y_ptrs = y_ptr + slots[:, None] * N + n[None, :]
    is_stored = is_real[:, None] & (n[None, :] < N)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=is_stored)


@triton.jit
def swiglu_backward(
    dy_ptr, w_ptr, gate_ptr, h_ptr, a_ptr, dh_ptr, dgate_ptr,
    slots_ptr, ends_ptr, tile_ends_ptr,
    num_tiles, E, D, F, R,
    TOP_K: tl.constexpr, E_POWER: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """da = dy[rows] @ w_out[expert].T, then through SwiGLU and the gate.

    Writes a again, the gradient of the unscaled h, and this block's share of the gate's gradient.
    """
    tile, block = place(tl.program_id(0), num_tiles, tl.cdiv(F, BN), 8)
    expert, rows, is_real, slots = rows_of_tile(
        tile, slots_ptr, ends_ptr, tile_ends_ptr, E, E_POWER, BM
    )
    if expert >= E:
        return
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    dy_ptrs = dy_ptr + (slots // TOP_K)[:, None] * D + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * D * F + n[None, :] * D + k[:, None]
    da = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if EVEN:
            dy = tl.load(dy_ptrs)
            w = tl.load(w_ptrs)
        else:
            dy = tl.load(dy_ptrs, mask=k[None, :] < D - start, other=0.0)
            w = tl.load(w_ptrs, mask=(k[:, None] < D - start) & (n[None, :] < F), other=0.0)
        da = tl.dot(dy, w, da, input_precision=PRECISION)
        dy_ptrs += BK
        w_ptrs += BK
    is_stored = is_real[:, None] & (n[None, :] < F)
    h_offsets = rows[:, None] * (2 * F) + n[None, :]
    h_gate = tl.load(h_ptr + h_offsets, mask=is_stored, other=0.0).to(tl.float32)
    h_up = tl.load(h_ptr + h_offsets + F, mask=is_stored, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + slots)[:, None]
    scaled = gate * h_gate
    sigmoid = tl.sigmoid(scaled)
    silu = scaled * sigmoid
    a = silu * gate * h_up
    a_ptrs = a_ptr + rows[:, None] * F + n[None, :]
    tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=is_stored)
    dscaled = da * gate * h_up * (sigmoid + silu * (1 - sigmoid))
    dscaled_up = da * silu
    tl.store(dh_ptr + h_offsets, (gate * dscaled).to(dh_ptr.dtype.element_ty), mask=is_stored)
    dh_up = (gate * dscaled_up).to(dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + h_offsets + F, dh_up, mask=is_stored)
    dgate = tl.sum(dscaled * h_gate + dscaled_up * h_up, axis=1)
    tl.store(dgate_ptr + block.to(tl.int64) * R + slots, dgate, mask=is_real)


@triton.jit
def weight_gradient(
    a_ptr, b_ptr, dw_ptr, slots_ptr, ends_ptr,
    E, M, N,
    A_TOP_K: tl.constexpr, B_TOP_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw[expert] = a[rows].T @ b[rows], [E, M, N].

    A side whose TOP_K is not 0 holds tokens and is gathered by slot; else it is sorted already.
    """
    pid = tl.program_id(0)
    per_expert = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    expert = pid // per_expert
    tile, block = place(pid % per_expert, tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    m = tile * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    dw = tl.zeros((BM, BN), tl.float32)
    for first in range(start, end, BK):
        rows = first + tl.arange(0, BK)
        is_real = rows < end
        slots = tl.load(slots_ptr + rows, mask=is_real, other=0)
        a_rows = (slots // A_TOP_K if A_TOP_K else rows).to(tl.int64)
        b_rows = (slots // B_TOP_K if B_TOP_K else rows).to(tl.int64)
        a_mask = is_real[None, :] if EVEN else is_real[None, :] & (m[:, None] < M)
        b_mask = is_real[:, None] if EVEN else is_real[:, None] & (n[None, :] < N)
        a = tl.load(a_ptr + a_rows[None, :] * M + m[:, None], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + b_rows[:, None] * N + n[None, :], mask=b_mask, other=0.0)
        dw = tl.dot(a, b, dw, input_precision=PRECISION)
    dw_ptrs = dw_ptr + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    is_stored = (m[:, None] < M) & (n[None, :] < N)
    tl.store(dw_ptrs, dw.to(dw_ptr.dtype.element_ty), mask=is_stored)


def precision_of(dtype: torch.dtype) -> str:
    """fp32 products are exact unless the user lets torch round them, too."""
    is_rounded = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if is_rounded or dtype != torch.float32 else "ieee"


def forward(
    x_MD: Tensor,
    gate_R: Tensor,
    groups: Groups,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    *,
    keep: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Every slot through its expert; and h for the backward when `keep`.

    shapes: gate fp32 [R] by slot -> y_RD by slot, h_RF [R, 2F] by row
    """
    dim, width = x_MD.shape[1], w_out_EFD.shape[1]
    tiles = tiles or tiles_for(groups.num_rows, groups.num_experts, x_MD.dtype)
    halves = tiles.half_n
    a_RF = x_MD.new_empty(groups.num_rows, width)
    h_RF = x_MD.new_empty(groups.num_rows, 2 * width) if keep else None
    tile_ends, num_tiles = groups.tile_ends(tiles.m), groups.max_tiles(tiles.m)
    common = _common(groups, x_MD.dtype)
    swiglu_forward[(num_tiles * triton.cdiv(width, halves),)](
        x_MD, w_in_EDF, gate_R, a_RF, a_RF if h_RF is None else h_RF,
        groups.slots, groups.ends, tile_ends, num_tiles, groups.num_experts, dim, width,
        TOP_K=groups.top_k, EVEN=dim % tiles.k == 0 and width % halves == 0, KEEP=keep,
        BM=tiles.m, BN=halves, BK=tiles.k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **common,
    )  # fmt: skip
    y_RD = product(a_RF, w_out_EFD, groups, tiles=tiles, tile_ends=tile_ends)
    return y_RD, h_RF


def product(
    a_RK: Tensor,
    w: Tensor,
    groups: Groups,
    *,
    transposed: bool = False,
    tiles: Tiles | None = None,
    tile_ends: Tensor | None = None,
) -> Tensor:
    """Rows sorted by expert times their expert's matrix, put where their slots are.

    shapes: a [R, K], w [E, K, N] ([E, N, K] when `transposed`) -> [R, N] by slot
    """
    depth, columns = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    tiles = tiles or tiles_for(groups.num_rows, groups.num_experts, a_RK.dtype)
    if tile_ends is None:
        tile_ends = groups.tile_ends(tiles.m)
    num_tiles = groups.max_tiles(tiles.m)
    y_RN = a_RK.new_empty(groups.num_rows, columns)
    rows_product[(num_tiles * triton.cdiv(columns, tiles.n),)](
        a_RK, w, y_RN, groups.slots, groups.ends, tile_ends,
        num_tiles, groups.num_experts, depth, columns,
        TRANSPOSED=transposed, EVEN=depth % tiles.k == 0 and columns % tiles.n == 0,
        BM=tiles.m, BN=tiles.n, BK=tiles.k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **_common(groups, a_RK.dtype),
    )  # fmt: skip
    return y_RN


def backward_hidden(
    dy_MD: Tensor,
    gate_R: Tensor,
    h_RF: Tensor,
    groups: Groups,
    w_out_EFD: Tensor,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back to the unscaled h. shapes: -> a [R, F], dh [R, 2F], both by row; dgate [R] by slot"""
    dim, width, num_rows = dy_MD.shape[1], w_out_EFD.shape[1], groups.num_rows
    tiles = tiles or tiles_for(num_rows, groups.num_experts, dy_MD.dtype)
    a_RF, dh_RF = dy_MD.new_empty(num_rows, width), torch.empty_like(h_RF)
    num_blocks, num_tiles = triton.cdiv(width, tiles.half_n), groups.max_tiles(tiles.m)
    shares = gate_R.new_empty(num_blocks, num_rows)
    swiglu_backward[(num_tiles * num_blocks,)](
        dy_MD, w_out_EFD, gate_R, h_RF, a_RF, dh_RF, shares,
        groups.slots, groups.ends, groups.tile_ends(tiles.m),
        num_tiles, groups.num_experts, dim, width, num_rows,
        TOP_K=groups.top_k, EVEN=dim % tiles.k == 0 and width % tiles.half_n == 0,
        BM=tiles.m, BN=tiles.half_n, BK=tiles.k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **_common(groups, dy_MD.dtype),
    )  # fmt: skip
    return a_RF, dh_RF, shares.sum(0)


def outer_products(
    a: Tensor,
    b: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    *,
    gathers_a: bool = False,
    gathers_b: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """Each expert's a.T @ b over its rows; a gathered side holds tokens, the other sorted rows.

    shapes: a [.., K], b [.., N] -> [E, K, N] in `dtype`
    """
    if tiles is None:  # the depth is an expert's rows, the sides are never small
        tiles = tiles_for(1 << 20, 1, a.dtype)
    num_experts, rows, columns = groups.num_experts, a.shape[1], b.shape[1]
    dw = a.new_empty(num_experts, rows, columns, dtype=dtype)
    grid = (num_experts * triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n),)
    weight_gradient[grid](
        a, b, dw, groups.slots, groups.ends, num_experts, rows, columns,
        A_TOP_K=groups.top_k if gathers_a else 0, B_TOP_K=groups.top_k if gathers_b else 0,
        EVEN=rows % tiles.m == 0 and columns % tiles.n == 0, PRECISION=precision_of(a.dtype),
        BM=tiles.m, BN=tiles.n, BK=tiles.k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return dw


def _common(groups: Groups, dtype: torch.dtype) -> dict[str, object]:
    power = triton.next_power_of_2(groups.num_experts)
    return {"E_POWER": power, "PRECISION": precision_of(dtype)}
