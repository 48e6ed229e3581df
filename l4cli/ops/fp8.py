"""Routed experts computed in fp8: codes of 1 x 128 activations and 128 x 128 weights.

in, out: as `l4cli.ops.moe.routed_experts`, weights and activations in their usual dtypes
Products forward and towards the inputs are in fp8 with fp32 sums. The weights' gradients are
products of the unrounded tensors: their sums run over an expert's rows, whose number is ragged,
and feed an optimizer directly.
source: DeepSeek-V3 (arXiv 2412.19437, section 3.3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.ops.choice import REFERENCE, Op, Version, triton_why_not

BLOCK = 128
_LARGEST, _TINY = 448.0, 1e-30


def fp8_routed_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """`routed_experts` with its products in fp8. raises: L4Error when 128 divides a width not"""
    dim, width = x_MD.shape[1], w_out_EFD.shape[1]
    if dim % BLOCK or width % BLOCK:
        why = f"widths {dim} and {width} are not both multiples of {BLOCK}, the scales' blocks"
        raise L4Error("cannot compute experts in fp8", why=why, fix="train with `--dtype bf16`")
    return FP8_EXPERTS.pick(x_MD)(x_MD, gate_MA, expert_MA, w_in_EDF, w_out_EFD)


def rounded_rows(x_MK: Tensor) -> Tensor:
    """What is left of activations in fp8, fp32. shapes: [M, K] -> same"""
    blocks = x_MK.float().unflatten(-1, (-1, BLOCK))
    return _rounded(blocks, blocks.abs().amax(-1, keepdim=True)).flatten(-2)


def rounded_blocks(w_KN: Tensor) -> Tensor:
    """What is left of a weight in fp8, fp32. shapes: [K, N] -> same"""
    blocks = w_KN.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax((1, 3), keepdim=True)
    return _rounded(blocks, largest).flatten(2).flatten(0, 1)


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    scale = largest.clamp(min=_TINY) / _LARGEST
    return (x * (1.0 / scale)).to(torch.float8_e4m3fn).float() * scale


class _Product(torch.autograd.Function):
    """x @ w in emulated fp8; the weight's gradient from unrounded tensors."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_KN: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, w_KN)
        return (rounded_rows(x_MK) @ rounded_blocks(w_KN)).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_MK, w_KN = ctx.saved_tensors
        dx_MK = (rounded_rows(grads[0]) @ rounded_blocks(w_KN).T).to(x_MK.dtype)
        return dx_MK, (x_MK.float().T @ grads[0].float()).to(w_KN.dtype)


class _GatedSwiGLU(torch.autograd.Function):
    """silu(g * h_gate) * g * h_up in fp32; its gradient is rounded once, where it is coded."""

    @staticmethod
    def forward(ctx: Any, h_RF: Tensor, gate_R1: Tensor) -> Tensor:
        ctx.save_for_backward(h_RF, gate_R1)
        return _gated(h_RF.float(), gate_R1).to(h_RF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        h_RF, gate_R1 = ctx.saved_tensors
        with torch.enable_grad():
            h32, gate = h_RF.float().requires_grad_(), gate_R1.detach().requires_grad_()
            dh, dgate = torch.autograd.grad(_gated(h32, gate), (h32, gate), grads[0].float())
        return dh.to(h_RF.dtype), dgate


def _gated(h_RF: Tensor, gate_R1: Tensor) -> Tensor:
    scaled_RF, up_RF = (h_RF * gate_R1).chunk(2, dim=-1)
    return F.silu(scaled_RF) * up_RF


def reference_fp8_routed_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """The same roundings with plain products, an expert after the other."""
    top_k = expert_MA.shape[1]
    flat_R, gate_R1 = expert_MA.flatten(), gate_MA.float().view(-1, 1)
    y_RD = x_MD.new_zeros(len(flat_R), x_MD.shape[1])
    pairs = zip(w_in_EDF.unbind(0), w_out_EFD.unbind(0), strict=True)
    for expert, (w_in_DF, w_out_FD) in enumerate(pairs):
        slots = (flat_R == expert).nonzero().flatten()
        if len(slots) == 0:
            continue
        # The gate multiplies after the product, so that a token is coded once for all experts.
        h_RF = _Product.apply(x_MD[slots // top_k], w_in_DF)
        a_RF = _GatedSwiGLU.apply(h_RF, gate_R1[slots])
        y_RD = y_RD.index_copy(0, slots, _Product.apply(a_RF, w_out_FD))
    return y_RD if top_k == 1 else y_RD.unflatten(0, (-1, top_k)).sum(1)


def _load_triton() -> Callable[..., Tensor]:
    from l4cli.ops.triton_fp8 import routed_experts

    return routed_experts


def _triton_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    why = triton_why_not(device, dtype, (torch.bfloat16, torch.float32))
    if why is None and device.type == "cuda":
        version = torch.cuda.get_device_capability(device)
        if version < (8, 9):
            why = f"fp8 needs compute capability 8.9, this GPU has {version[0]}.{version[1]}"
    return why


FP8_EXPERTS = Op(
    "fp8_experts",
    [
        Version(
            "triton",
            _load_triton,
            "codes and products on tensor cores",
            _triton_why_not,
            for_tests_on_cpu=True,
        ),
        Version(REFERENCE, lambda: reference_fp8_routed_experts, "rounds as fp8, computes in fp32"),
    ],
)
