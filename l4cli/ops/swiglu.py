"""silu(gate) * up, keeping two tensors for the backward instead of four.

in: gate and up [..., F]; out: the same shape
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.ops.autograd import apply
from l4cli.ops.choice import FLOATS, REFERENCE, Op, Version, triton_version


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        dup = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation of every Llama feed-forward."""
    return SWIGLU.pick(gate)(gate, up)


def _recomputed(gate: Tensor, up: Tensor) -> Tensor:
    return apply(_SwiGLU, gate, up)


def _load_triton() -> Callable[..., Tensor]:
    from src_kernels.cuda import swiglu as kernels

    def one_pass(gate: Tensor, up: Tensor) -> Tensor:
        rows = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        return kernels.swiglu(*rows).view(gate.shape)

    return one_pass


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The formula."""
    return F.silu(gate) * up


SWIGLU = Op(
    "swiglu",
    [
        triton_version(_load_triton, "one pass each way", FLOATS),
        Version("recomputed", lambda: _recomputed, "keeps two tensors for the backward"),
        Version(REFERENCE, lambda: reference_swiglu, "the formula"),
    ],
)
