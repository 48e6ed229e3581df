"""silu(gate) * up, forward and backward, one pass over memory each.

in: gate and up [M, F] with any row stride (halves of one product); out: [M, F]
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from src_kernels.cuda.norm import unit_stride

BLOCK = 1024


@triton.jit
def swiglu_forward(gate, up, out, gate_stride, up_stride, num_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = cols < num_cols
    a = tl.load(gate + row * gate_stride + cols, mask=is_real, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + cols, mask=is_real, other=0.0).to(tl.float32)
    tl.store(out + row * num_cols + cols, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), is_real)


@triton.jit
def swiglu_backward(
    gate, up, grad, dgate, dup, gate_stride, up_stride, grad_stride, num_cols, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = cols < num_cols
    a = tl.load(gate + row * gate_stride + cols, mask=is_real, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + cols, mask=is_real, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + cols, mask=is_real, other=0.0).to(tl.float32)
    share = tl.sigmoid(a)
    da = g * b * share * (1 + a * (1 - share))
    tl.store(dgate + row * num_cols + cols, da.to(dgate.dtype.element_ty), is_real)
    tl.store(dup + row * num_cols + cols, (g * a * share).to(dup.dtype.element_ty), is_real)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if out.numel():
            num_cols = gate.shape[1]
            swiglu_forward[(len(gate), triton.cdiv(num_cols, BLOCK))](
                gate, up, out, gate.stride(0), up.stride(0), num_cols, BLOCK, num_warps=4
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = unit_stride(grads[0])
        dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        if dgate.numel():
            num_cols = gate.shape[1]
            swiglu_backward[(len(gate), triton.cdiv(num_cols, BLOCK))](
                gate, up, grad, dgate, dup, gate.stride(0), up.stride(0), grad.stride(0),
                num_cols, BLOCK, num_warps=4,
            )  # fmt: skip
        return dgate, dup


def swiglu(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """The gated activation of rows."""
    return _SwiGLU.apply(unit_stride(gate_MF), unit_stride(up_MF))
