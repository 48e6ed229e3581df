"""Routed experts on CUDA: the Triton kernels behind autograd.

in, out: as `l4cli.ops.moe.routed_experts`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l4cli.ops.autograd import apply
from src_kernels.cuda import moe as kernels
from src_kernels.cuda.grouping import Groups


class _RoutedExperts(torch.autograd.Function):
    """Keeps x, the gates and h = x @ w_in, [R, 2F] in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        gate_MA: Tensor,
        expert_MA: Tensor,
        w_in_EDF: Tensor,
        w_out_EFD: Tensor,
        tiles: kernels.Tiles | None,
        keep: bool,
    ) -> Tensor:
        x_MD, gate_R = x_MD.contiguous(), gate_MA.float().flatten()
        groups = Groups.from_choices(expert_MA, len(w_in_EDF))
        weights = (w.to(x_MD.dtype).contiguous() for w in (w_in_EDF, w_out_EFD))
        y_RD, h_RF = kernels.forward(x_MD, gate_R, groups, *weights, keep=keep, tiles=tiles)
        ctx.save_for_backward(x_MD, gate_R, h_RF, w_in_EDF, w_out_EFD)
        ctx.groups, ctx.tiles, ctx.gate = groups, tiles, (gate_MA.shape, gate_MA.dtype)
        return groups.summed(y_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_R, h_RF, w_in_EDF, w_out_EFD = ctx.saved_tensors
        groups, tiles = ctx.groups, ctx.tiles
        dy_MD = grads[0].contiguous()
        w_in, w_out = (w.to(x_MD.dtype).contiguous() for w in (w_in_EDF, w_out_EFD))
        a_RF, dh_RF, dgate_R = kernels.backward_hidden(
            dy_MD, gate_R, h_RF, groups, w_out, tiles=tiles
        )
        dw_out = kernels.outer_products(
            a_RF, dy_MD, groups, w_out_EFD.dtype, gathers_b=True, tiles=tiles
        )
        dw_in = kernels.outer_products(
            x_MD, dh_RF, groups, w_in_EDF.dtype, gathers_a=True, tiles=tiles
        )
        dx_RD = kernels.product(dh_RF, w_in, groups, transposed=True, tiles=tiles)
        shape, dtype = ctx.gate
        dgate_MA = dgate_R.view(shape).to(dtype)
        return groups.summed(dx_RD), dgate_MA, None, dw_in, dw_out, None, None


def routed_experts(
    x_MD: Tensor,
    gate_MA: Tensor,
    expert_MA: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    tiles: kernels.Tiles | None = None,
) -> Tensor:
    """As `l4cli.ops.moe.routed_experts`; `tiles` are for tests."""
    keep = torch.is_grad_enabled()
    args = (x_MD, gate_MA, expert_MA, w_in_EDF, w_out_EFD, tiles, keep)
    return x_MD.clone() if len(x_MD) == 0 else apply(_RoutedExperts, *args)
