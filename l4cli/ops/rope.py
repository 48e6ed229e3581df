"""Rotary positions: angles from positions, and the rotation of interleaved pairs.

in: position_ids, q or k [B, T, N, H]; out: the same shapes, pairs (x[2j], x[2j+1]) turned
source: HF Llama4TextRotaryEmbedding, Llama4VisionRotaryEmbedding, `ROPE_INIT_FUNCTIONS`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l4cli.ops.autograd import apply
from l4cli.ops.choice import FLOATS, REFERENCE, Op, Version, triton_version
from l4cli.ops.norm import unit_rms


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Angle per position of each pair, fp32 [head_dim / 2], stretched as `scaling` says.

    Not from fp64: at positions near 10M the fp32 rounding is part of the published model.
    """
    rope_type = (scaling or {}).get("rope_type", "default")
    if rope_type == "yarn":
        assert scaling is not None
        return _yarn(head_dim, theta, scaling)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (theta**exponent)
    if not scaling or rope_type == "default":
        return inverse
    if rope_type == "linear":
        return inverse / float(scaling["factor"])
    factor, low, high = (
        float(scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > context / low, inverse / factor, inverse)
    if high == low:  # Scout: the middle band is empty and its slope undefined
        return scaled
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    is_middle = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(is_middle, blended, scaled)


def _yarn(head_dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Fast pairs as they are, slow ones interpolated, a ramp between (arXiv 2309.00071)."""
    frequency = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    trained = float(scaling["original_max_position_embeddings"])

    def pair_that_turns(times: float) -> float:
        """Which pair turns so often within the trained length."""
        return head_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)), head_dim - 1)
    span = high - low or 0.001
    slow = ((torch.arange(head_dim // 2).float() - low) / span).clamp(0, 1)
    return (1 / (float(scaling["factor"]) * frequency)) * slow + (1 / frequency) * (1 - slow)


def attention_factor(scaling: dict[str, Any] | None) -> float:
    """What queries and keys are each multiplied with: above 1 for YaRN only."""
    if not scaling or scaling.get("rope_type") != "yarn":
        return 1.0
    given = scaling.get("attention_factor")
    factor = float(scaling["factor"])
    return float(given) if given is not None else 0.1 * math.log(max(factor, 1.0)) + 1


def rotation(position_ids_BT: Tensor, inverse: Tensor, length: float = 1.0) -> Tensor:
    """The turn of each position and pair, times `length`, as complex64 [B, T, H / 2]."""
    angle = position_ids_BT.float().unsqueeze(-1) * inverse.to(position_ids_BT.device)
    return torch.polar(torch.full_like(angle, length), angle)


def rotate(x_BTNH: Tensor, turn_BTH: Tensor) -> Tensor:
    """Turn the interleaved pairs of every head, in fp32. shapes: [B, T, N, H] -> same"""
    pairs = torch.view_as_complex(x_BTNH.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turn_BTH.unsqueeze(2)).flatten(-2)
    return turned.to(x_BTNH.dtype)


class _RotateUnit(torch.autograd.Function):
    """Rotation and weightless RMS norm in one: turning a pair does not change its length.

    Saves the input and one number a head; eager autograd keeps four fp32 copies.
    """

    @staticmethod
    def forward(ctx: Any, x_BTNH: Tensor, turn_BTH: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x_BTNH, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square_() / x_BTNH.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_BTNH, turn_BTH, inverse)
        turned = _turned(x_BTNH, turn_BTH)
        return turned.mul_(inverse).to(x_BTNH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x_BTNH, turn_BTH, inverse = ctx.saved_tensors
        (grad,) = grads
        # The turn is orthogonal: its transpose is the turn back.
        back = _turned(grad, turn_BTH.conj())
        x = x_BTNH.float()
        dot = torch.linalg.vecdot(back, x).unsqueeze(-1)
        scale = dot * inverse.pow(3) / x.shape[-1]
        return back.mul_(inverse).addcmul_(x, scale, value=-1).to(x_BTNH.dtype), None, None


def _turned(x_BTNH: Tensor, turn_BTH: Tensor) -> Tensor:
    """A turned fp32 copy."""
    x = x_BTNH.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn_BTH.unsqueeze(2))
    return x


def rotate_unit(x_BTNH: Tensor, turn_BTH: Tensor, eps: float) -> Tensor:
    """`unit_rms(rotate(x))`: what queries and keys of a RoPE layer with QK norm go through."""
    return ROTATE_UNIT.pick(x_BTNH)(x_BTNH, turn_BTH, eps)


def _in_place(x_BTNH: Tensor, turn_BTH: Tensor, eps: float) -> Tensor:
    return apply(_RotateUnit, x_BTNH, turn_BTH, eps)


def _load_triton() -> Callable[..., Tensor]:
    from src_kernels.cuda import rotate as kernels

    def one_pass(x_BTNH: Tensor, turn_BTH: Tensor, eps: float) -> Tensor:
        if math.prod(kernels.block_sizes(*x_BTNH.shape[2:])) > kernels.MAX_POSITION:
            return _in_place(x_BTNH, turn_BTH, eps)
        return kernels.rotate_unit(x_BTNH, turn_BTH, eps)

    return one_pass


def reference_rotate_unit(x_BTNH: Tensor, turn_BTH: Tensor, eps: float) -> Tensor:
    """One after the other."""
    return unit_rms(rotate(x_BTNH, turn_BTH), eps)


ROTATE_UNIT = Op(
    "rotate_unit",
    [
        triton_version(_load_triton, "one pass; over 32768 numbers a position, in place", FLOATS),
        Version("in-place", lambda: _in_place, "rotation and QK norm in one"),
        Version(REFERENCE, lambda: reference_rotate_unit, "rotation, then the norm"),
    ],
)


def vision_rotation(grid: int, head_dim: int, theta: float) -> Tensor:
    """Turns of a grid of patches and the class token, complex64 [1, grid^2 + 1, head_dim / 2].

    Columns turn the first half of the pairs, rows the second, both counted from one;
    the class token, last, is not turned.
    """
    half = head_dim // 2
    inverse = 1.0 / (theta ** (torch.arange(0, half, 2).float() / half))
    index = torch.arange(grid * grid)
    column = (index % grid + 1).float().unsqueeze(-1) * inverse
    row = (index // grid + 1).float().unsqueeze(-1) * inverse
    angle = torch.cat([column, row], dim=-1)
    angle = torch.cat([angle, angle.new_zeros(1, half)])
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(0)
