"""Rotation of interleaved pairs and the weightless norm of each head, in one pass.

in: x [B, T, N, H], the turn of each position and pair complex64 [B, T, H / 2]; out: as x
source: HF Llama4 `apply_rotary_emb` and Llama4TextL2Norm; a turn keeps a pair's length, so that
the norm may be taken before it
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_POSITION = 32768  # numbers of a position, each size rounded up to a power of two


@triton.jit
def _turned(x, turn, BACK: tl.constexpr):
    """Pairs times their turn, or turned back. shapes: x [heads, H], turn [H] (cos, sin in turn)"""
    heads: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    real, imaginary = tl.split(tl.reshape(x, [heads, half, 2]))
    cos, sin = tl.split(tl.reshape(turn, [half, 2]))
    cos, sin = cos[None, :], sin[None, :]
    if BACK:
        sin = -sin
    return tl.reshape(
        tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), [heads, half * 2]
    )


@triton.jit
def _loaded(
    x, turn, length, batch_stride, row_stride, head_stride, turn_batch, turn_row,
    num_heads, head_dim, eps, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All heads of one position: values, turn, 1 / rms, where results go, which are real."""
    row = tl.program_id(0).to(tl.int64)
    batch, time = row // length, row % length
    heads, dims = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_H)
    is_real = (heads < num_heads) & (dims < head_dim)[None, :]
    at = batch * batch_stride + time * row_stride + heads * head_stride + dims[None, :]
    values = tl.load(x + at, mask=is_real, other=0.0).to(tl.float32)
    by = tl.load(turn + batch * turn_batch + time * turn_row + dims, dims < head_dim, other=0.0)
    scale = tl.rsqrt(tl.sum(values * values, 1) / head_dim + eps)[:, None]
    to = (row * num_heads + heads) * head_dim + dims[None, :]
    return values, by, scale, to, is_real


@triton.jit
def rotate_forward(
    x, turn, out, length, batch_stride, row_stride, head_stride, turn_batch, turn_row,
    num_heads, head_dim, eps, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    values, by, scale, to, is_real = _loaded(
        x, turn, length, batch_stride, row_stride, head_stride, turn_batch, turn_row,
        num_heads, head_dim, eps, BLOCK_N, BLOCK_H,
    )  # fmt: skip
    turned = _turned(values, by, False) * scale
    tl.store(out + to, turned.to(out.dtype.element_ty), mask=is_real)


@triton.jit
def rotate_backward(
    x, turn, grad, dx, length, batch_stride, row_stride, head_stride, turn_batch, turn_row,
    num_heads, head_dim, eps, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    values, by, scale, to, is_real = _loaded(
        x, turn, length, batch_stride, row_stride, head_stride, turn_batch, turn_row,
        num_heads, head_dim, eps, BLOCK_N, BLOCK_H,
    )  # fmt: skip
    up = tl.load(grad + to, mask=is_real, other=0.0).to(tl.float32)
    # The turn is orthogonal up to its length: its transpose is the turn back.
    up = _turned(up, by, True)
    normed = values * scale
    along = tl.sum(up * normed, 1)[:, None] / head_dim
    tl.store(dx + to, ((up - normed * along) * scale).to(dx.dtype.element_ty), mask=is_real)


class _RotateUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTNH: Tensor, turn_BTH: Tensor, eps: float) -> Tensor:
        out_BTNH = torch.empty(x_BTNH.shape, dtype=x_BTNH.dtype, device=x_BTNH.device)
        _launch(rotate_forward, x_BTNH, turn_BTH, (out_BTNH,), eps)
        ctx.save_for_backward(x_BTNH, turn_BTH)
        ctx.eps = eps
        return out_BTNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x_BTNH, turn_BTH = ctx.saved_tensors
        dx_BTNH = torch.empty(x_BTNH.shape, dtype=x_BTNH.dtype, device=x_BTNH.device)
        _launch(rotate_backward, x_BTNH, turn_BTH, (grads[0].contiguous(), dx_BTNH), ctx.eps)
        return dx_BTNH, None, None


def block_sizes(num_heads: int, head_dim: int) -> tuple[int, int]:
    """All heads of a position lie in registers together."""
    return triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)


def _launch(
    kernel: Any, x_BTNH: Tensor, turn_BTH: Tensor, more: tuple[Tensor, ...], eps: float
) -> None:
    """One program a position."""
    batch, length, num_heads, head_dim = x_BTNH.shape
    if not x_BTNH.numel():
        return
    pairs = torch.view_as_real(turn_BTH).flatten(-2)
    block_n, block_h = block_sizes(num_heads, head_dim)
    kernel[(batch * length,)](
        x_BTNH, pairs, *more, length, *x_BTNH.stride()[:3], pairs.stride(0), pairs.stride(1),
        num_heads, head_dim, eps, block_n, block_h,
        num_warps=min(max(block_n * block_h // 512, 1), 8),
    )  # fmt: skip


def rotate_unit(x_BTNH: Tensor, turn_BTH: Tensor, eps: float) -> Tensor:
    """Turn the pairs of every head and divide by the head's root mean square."""
    if x_BTNH.stride(-1) != 1:
        x_BTNH = x_BTNH.contiguous()
    if turn_BTH.stride(-1) != 1:
        turn_BTH = turn_BTH.contiguous()
    turn_BTH = turn_BTH.expand(*x_BTNH.shape[:2], -1)
    return _RotateUnit.apply(x_BTNH, turn_BTH, eps)
