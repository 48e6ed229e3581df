"""Routed experts and single maps with int4 weights, for answering: few tokens, weights read once.

in: x [M, D], for experts gates and choices too, and the maps in codes; out: y. No gradients
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.ops.choice import REFERENCE, Op, Version, triton_version
from src_kernels.cuda.int4_layout import PackedInt4, pack, unpack

__all__ = [
    "INT4_EXPERTS",
    "INT4_LINEAR",
    "PackedInt4",
    "dequantized",
    "dequantized_map",
    "int4_experts",
    "int4_linear",
    "pack",
]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def int4_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in: PackedInt4, w_out: PackedInt4
) -> Tensor:
    """`routed_experts` over packed maps: w_in [2F, D] (gate rows, then up), w_out [D, F]."""
    return INT4_EXPERTS.pick(x_MD)(x_MD, gate_MA, expert_MA, w_in, w_out)


def int4_linear(x_MI: Tensor, weight: PackedInt4) -> Tensor:
    """x @ weight.T of one packed map [O, I]. shapes: -> [M, O]"""
    return INT4_LINEAR.pick(x_MI)(x_MI, weight)


def dequantized(packed: PackedInt4, dtype: torch.dtype) -> Tensor:
    """The weights that the codes stand for, right-multiplied. shapes: -> [E, I, O]"""
    codes_EOI, scale_EOG, zero_EOG = unpack(packed)
    groups = codes_EOI.float().unflatten(-1, (scale_EOG.shape[-1], -1))
    if zero_EOG is not None:
        groups = groups - zero_EOG.float().unsqueeze(-1)
    return (groups * scale_EOG.float().unsqueeze(-1)).flatten(2).transpose(1, 2).to(dtype)


@torch.no_grad()
def dequantized_map(packed: PackedInt4, expert: int, dtype: torch.dtype) -> Tensor:
    """One map alone, for a plain product: as `dequantized`, of the last bit. shapes: -> [O, I]

    Little memory beside the result: (code - zero) is exact in any dtype, so where the scale has
    the result's dtype one product rounds once, as through fp32.
    """
    scale = packed.scale[expert].unsqueeze(-1)  # [tiles, groups, 64, 1]
    within = dtype if scale.dtype == dtype else torch.float32
    zero = 8 if packed.zero is None else packed.zero[expert].unsqueeze(-1).to(within)
    codes = packed.codes[expert]  # [tiles, groups, 64, G / 2]
    num_tiles, num_groups, outputs, half = codes.shape
    weight = torch.empty(num_tiles, outputs, num_groups, 2, half, dtype=dtype, device=codes.device)
    for part, nibbles in enumerate((codes & 15, codes >> 4)):
        values = nibbles.to(within).sub_(zero).mul_(scale)
        weight[:, :, :, part] = values.transpose(1, 2)
    return weight.flatten(2).flatten(0, 1)[: packed.num_outputs]


@torch.no_grad()
def reference_int4_linear(x_MI: Tensor, weight: PackedInt4) -> Tensor:
    """Widen it, then a plain product."""
    return F.linear(x_MI, dequantized_map(weight, 0, x_MI.dtype))


@torch.no_grad()
def reference_int4_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in: PackedInt4, w_out: PackedInt4
) -> Tensor:
    """Widen the experts that are called, then the plain loop."""
    from l4cli.ops.moe import reference_routed_experts

    called, place_MA = expert_MA.unique(return_inverse=True)
    w_in_EDF, w_out_EFD = (
        torch.stack([dequantized_map(w, e, x_MD.dtype).T for e in called.tolist()])
        for w in (w_in, w_out)
    )
    return reference_routed_experts(x_MD, gate_MA, place_MA, w_in_EDF, w_out_EFD)


def _load_triton() -> Callable[..., Tensor]:
    from src_kernels.cuda.int4 import routed_experts

    return routed_experts


def _load_triton_linear() -> Callable[..., Tensor]:
    from src_kernels.cuda.int4 import linear

    return linear


INT4_EXPERTS = Op(
    "int4_experts",
    [
        triton_version(_load_triton, "widened in registers, for a few dozen rows", _DTYPES),
        Version(REFERENCE, lambda: reference_int4_experts, "widened in memory first"),
    ],
)

INT4_LINEAR = Op(
    "int4_linear",
    [
        triton_version(_load_triton_linear, "widened in registers, for a few dozen rows", _DTYPES),
        Version(REFERENCE, lambda: reference_int4_linear, "widened in memory first"),
    ],
)
