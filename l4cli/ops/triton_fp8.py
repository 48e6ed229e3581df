"""Routed experts in fp8 on CUDA: the Triton kernels behind autograd.

in, out: as `l4cli.ops.fp8.fp8_routed_experts`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l4cli.ops.autograd import apply
from src_kernels.cuda import fp8 as kernels
from src_kernels.cuda import moe
from src_kernels.cuda.grouping import Groups


class _RoutedExperts(torch.autograd.Function):
    """Keeps x, the gates, h [R, 2F] and what the weights' codes for the way back are."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        gate_MA: Tensor,
        expert_MA: Tensor,
        w_in_EDF: Tensor,
        w_out_EFD: Tensor,
        block_m: int | None,
    ) -> Tensor:
        x_MD, gate_R = x_MD.contiguous(), gate_MA.float().flatten()
        groups, dtype = Groups.from_choices(expert_MA, len(w_in_EDF)), x_MD.dtype
        in_EDF, in_EFD, in_scale = kernels.quantize_blocks(w_in_EDF.contiguous())
        out_EFD, out_EDF, out_scale = kernels.quantize_blocks(w_out_EFD.contiguous())

        def product(a: tuple[Tensor, Tensor], w: Tensor, scale: Tensor, **how: bool) -> Tensor:
            how = {"turned_scale": True, **how}
            return kernels.product(a, w, scale, groups, dtype, block_m=block_m, **how)

        h_RF = product(kernels.quantize_rows(x_MD), in_EFD, in_scale, gathers=True)
        a = kernels.swiglu_codes(h_RF, gate_R, groups)
        y_RD = product(a, out_EDF, out_scale, scatters=True)
        ctx.save_for_backward(x_MD, gate_R, h_RF, in_EDF, in_scale, out_EFD, out_scale)
        ctx.groups, ctx.block_m = groups, block_m
        ctx.gate = (gate_MA.shape, gate_MA.dtype)
        ctx.dtypes = (w_in_EDF.dtype, w_out_EFD.dtype)
        return groups.summed(y_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_R, h_RF, in_EDF, in_scale, out_EFD, out_scale = ctx.saved_tensors
        groups, dtype = ctx.groups, x_MD.dtype
        how = {"block_m": ctx.block_m}
        dy_MD = grads[0].contiguous()
        dy = kernels.quantize_rows(dy_MD)
        da_RF = kernels.product(dy, out_EFD, out_scale, groups, dtype, gathers=True, **how)
        a_RF, dh_RF, dh, dgate_R = kernels.swiglu_gradient(h_RF, da_RF, gate_R, groups)
        dx_RD = kernels.product(dh, in_EDF, in_scale, groups, dtype, scatters=True, **how)
        tiles = None if ctx.block_m is None else moe.Tiles(128, 128, 16, 4, 1)
        dw_in = moe.outer_products(x_MD, dh_RF, groups, ctx.dtypes[0], gathers_a=True, tiles=tiles)
        dw_out = moe.outer_products(a_RF, dy_MD, groups, ctx.dtypes[1], gathers_b=True, tiles=tiles)
        shape, gate_dtype = ctx.gate
        dgate_MA = dgate_R.view(shape).to(gate_dtype)
        return groups.summed(dx_RD), dgate_MA, None, dw_in, dw_out, None


def routed_experts(
    x_MD: Tensor,
    gate_MA: Tensor,
    expert_MA: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    block_m: int | None = None,
) -> Tensor:
    """As `l4cli.ops.fp8.fp8_routed_experts`; `block_m` is for tests."""
    if len(x_MD) == 0:
        return x_MD.clone()
    return apply(_RoutedExperts, x_MD, gate_MA, expert_MA, w_in_EDF, w_out_EFD, block_m)
