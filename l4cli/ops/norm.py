"""RMS norms: the weighted one between blocks and the weightless one of queries and keys.

in: x [..., D]; out: the same shape and dtype
source: HF Llama4TextRMSNorm, Llama4TextL2Norm; statistics in fp32, cast back before the weight
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l4cli.ops.autograd import apply
from l4cli.ops.choice import FLOATS, REFERENCE, Op, Version, triton_version


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number a row; three passes forward, five backward.

    Eager autograd of the formula keeps four tensors of x's size and takes twice the time on CPUs.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse_M1 = _inverse_rms(x_MD, eps)
        ctx.save_for_backward(x_MD, weight_D, inverse_M1)
        normed_MD = x_MD * inverse_M1.to(x_MD.dtype)
        return normed_MD.mul_(weight_D.to(x_MD.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MD, weight_D, inverse_M1 = ctx.saved_tensors
        dtype, dim = x_MD.dtype, x_MD.shape[-1]
        (grad_MD,) = grads
        # dw = sum_m grad * x * inverse, as one matrix-free pass over the product.
        product_MD = grad_MD * x_MD
        dweight_D = (inverse_M1.to(dtype).T @ product_MD)[0].to(weight_D.dtype)
        weight_cast_D = weight_D.to(dtype)
        dot_M1 = (product_MD @ weight_cast_D).float().unsqueeze(-1)
        scale_M1 = (dot_M1 * inverse_M1.pow(3) / dim).to(dtype)
        dx_MD = (grad_MD * weight_cast_D).mul_(inverse_M1.to(dtype))
        return dx_MD.addcmul_(x_MD, scale_M1, value=-1), dweight_D, None


def _inverse_rms(x_MD: Tensor, eps: float) -> Tensor:
    norm_M1 = torch.linalg.vector_norm(x_MD, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm_M1.square() / x_MD.shape[-1] + eps).rsqrt()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, then scale by the weight."""
    return RMS_NORM.pick(x)(x, weight_D, eps)


def _two_pass(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return apply(_RMSNorm, x.reshape(-1, x.shape[-1]), weight_D, eps).view(x.shape)


def _load_triton() -> Callable[..., Tensor]:
    from src_kernels.cuda import norm

    def one_pass(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if x.shape[-1] > norm.MAX_COLS:
            return reference_rms_norm(x, weight_D, eps)
        return norm.rms_norm(x.reshape(-1, x.shape[-1]), weight_D, eps).view(x.shape)

    return one_pass


def reference_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula as Hugging Face writes it."""
    x32 = x.float()
    normed = x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed.to(x.dtype) * weight_D.to(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Weightless norm of each head: QK norm, called L2 norm but an RMS norm."""
    x32 = x.float()
    return (x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _two_pass_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda" and dtype != torch.float32:
        return "its passes were chosen and measured on CPUs"
    return None


RMS_NORM = Op(
    "rms_norm",
    [
        triton_version(_load_triton, "one pass each way; over 8192 channels the formula", FLOATS),
        Version("two-pass", lambda: _two_pass, "keeps x and a number a row", _two_pass_why_not),
        Version(REFERENCE, lambda: reference_rms_norm, "the formula in fp32"),
    ],
)
