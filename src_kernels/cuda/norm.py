"""RMS norm of rows with a weight, forward and backward, in one pass over memory each.

in: x [M, D] with any row stride, weight [D]; out: the same shape and dtype
source: HF Llama4TextRMSNorm: statistics in fp32, cast back before the weight
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLS = 8192  # a row lies in registers whole; a wider one would spill in the backward
STRIPES = 512  # of rows: each sums its part of the weight's gradient, in a fixed order


@triton.jit
def norm_forward(x, weight, out, row_stride, num_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    is_real = cols < num_cols
    values = tl.load(x + row * row_stride + cols, mask=is_real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / num_cols + eps)
    dtype = out.dtype.element_ty
    normed = (values * scale).to(dtype).to(tl.float32)
    by = tl.load(weight + cols, mask=is_real, other=0.0).to(dtype).to(tl.float32)
    tl.store(out + row * num_cols + cols, (normed * by).to(dtype), mask=is_real)


@triton.jit
def norm_backward(
    x, weight, grad, dx, dweight, row_stride, grad_stride, num_rows, num_cols, stripe, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * stripe
    cols = tl.arange(0, BLOCK)
    is_real = cols < num_cols
    dtype = dx.dtype.element_ty
    by = tl.load(weight + cols, mask=is_real, other=0.0).to(dtype).to(tl.float32)
    dby = tl.zeros([BLOCK], tl.float32)
    for row in range(first, min(first + stripe, num_rows)):
        values = tl.load(x + row * row_stride + cols, mask=is_real, other=0.0).to(tl.float32)
        up = tl.load(grad + row * grad_stride + cols, mask=is_real, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 0) / num_cols + eps)
        normed = values * scale
        dby += up * normed
        up *= by
        # The norm takes away the part of the gradient that points along the row.
        along = tl.sum(up * normed, 0) / num_cols
        out = (up - normed * along) * scale
        tl.store(dx + row * num_cols + cols, out.to(dtype), mask=is_real)
    tl.store(dweight + tl.program_id(0) * num_cols + cols, dby, mask=is_real)


class _RMSNorm(torch.autograd.Function):
    """Saves x alone: the backward reads it anyway and squares it again on the way."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        num_rows, num_cols = x_MD.shape
        out_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device)
        if num_rows:
            block = triton.next_power_of_2(num_cols)
            norm_forward[(num_rows,)](
                x_MD, weight_D, out_MD, x_MD.stride(0), num_cols, eps, block,
                num_warps=num_warps(block),
            )  # fmt: skip
        ctx.save_for_backward(x_MD, weight_D)
        ctx.eps = eps
        return out_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MD, weight_D = ctx.saved_tensors
        grad_MD = unit_stride(grads[0])
        num_rows, num_cols = x_MD.shape
        dx_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device)
        if not num_rows:
            return dx_MD, torch.zeros_like(weight_D), None
        stripe = triton.cdiv(num_rows, STRIPES)
        stripes = triton.cdiv(num_rows, stripe)
        sums = torch.empty(stripes, num_cols, dtype=torch.float32, device=x_MD.device)
        block = triton.next_power_of_2(num_cols)
        norm_backward[(stripes,)](
            x_MD, weight_D, grad_MD, dx_MD, sums, x_MD.stride(0), grad_MD.stride(0),
            num_rows, num_cols, stripe, ctx.eps, block, num_warps=num_warps(block),
        )  # fmt: skip
        return dx_MD, sums.sum(0).to(weight_D.dtype), None


def rms_norm(x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, then scale by the weight."""
    return _RMSNorm.apply(unit_stride(x_MD), weight_D.contiguous(), eps)


def num_warps(block: int) -> int:
    """Up to 32 numbers a thread."""
    return min(max(block // 1024, 1), 16)


def unit_stride(x: Tensor) -> Tensor:
    """Rows may lie apart, the numbers of a row may not."""
    return x if x.stride(-1) == 1 else x.contiguous()
