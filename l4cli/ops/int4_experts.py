"""Routed experts with int4 weights, for answering: few tokens, weights read once.

in: x [M, D], gates, choices and each expert's two maps in codes; out: y [M, D]. No gradients
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l4cli.ops.choice import REFERENCE, Op, Version, triton_version
from src_kernels.cuda.int4_layout import PackedInt4, pack, unpack

__all__ = ["INT4_EXPERTS", "PackedInt4", "dequantized", "int4_experts", "pack"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def int4_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in: PackedInt4, w_out: PackedInt4
) -> Tensor:
    """`routed_experts` over packed maps: w_in [2F, D] (gate rows, then up), w_out [D, F]."""
    return INT4_EXPERTS.pick(x_MD)(x_MD, gate_MA, expert_MA, w_in, w_out)


def dequantized(packed: PackedInt4, dtype: torch.dtype) -> Tensor:
    """The weights that the codes stand for, right-multiplied. shapes: -> [E, I, O]"""
    codes_EOI, scale_EOG, zero_EOG = unpack(packed)
    groups = codes_EOI.float().unflatten(-1, (scale_EOG.shape[-1], -1))
    if zero_EOG is not None:
        groups = groups - zero_EOG.float().unsqueeze(-1)
    return (groups * scale_EOG.float().unsqueeze(-1)).flatten(2).transpose(1, 2).to(dtype)


@torch.no_grad()
def reference_int4_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in: PackedInt4, w_out: PackedInt4
) -> Tensor:
    """Widen everything, then the plain loop."""
    from l4cli.ops.moe import reference_routed_experts

    weights = (dequantized(w, x_MD.dtype) for w in (w_in, w_out))
    return reference_routed_experts(x_MD, gate_MA, expert_MA, *weights)


def _load_triton() -> Callable[..., Tensor]:
    from src_kernels.cuda.int4 import routed_experts

    return routed_experts


INT4_EXPERTS = Op(
    "int4_experts",
    [
        triton_version(_load_triton, "widened in registers, for a few dozen rows", _DTYPES),
        Version(REFERENCE, lambda: reference_int4_experts, "widened in memory first"),
    ],
)
