"""Choose experts and run them: the sparse half of a Llama 4 block.

in: x [M, D], tokens flattened over batch and time; out: y [M, D], same dtype
source: HF Llama4TextMoe; bias and its rules: arXiv 2408.15664
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.ops.autograd import apply
from l4cli.ops.choice import REFERENCE, Op, Version, triton_version


class Routing(Protocol):
    """Who watches and steers the choice of experts in training; absent, the model is Llama 4."""

    def bias(self, layer_idx: int) -> Tensor | None:
        """What is added to a layer's scores for the choice only, fp32 [E]."""

    def record(self, layer_idx: int, logits_BTE: Tensor, expert_BTA: Tensor) -> None:
        """Note a layer's router logits (differentiable, fp32) and choices."""


def route(
    logits_ME: Tensor, num_experts_per_tok: int, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pick the top experts of each token and how much each counts.

    shapes: logits_ME fp32 -> gate_MA fp32, expert_MA
    """
    if bias_E is None:
        top_MA, expert_MA = logits_ME.topk(num_experts_per_tok, dim=-1)
    else:
        # The bias moves the choice only; the gate stays the plain score.
        expert_MA = (logits_ME.sigmoid() + bias_E).topk(num_experts_per_tok, dim=-1).indices
        top_MA = logits_ME.gather(-1, expert_MA)
    # Sigmoid after top-k, not a softmax: gates do not sum to one.
    return top_MA.sigmoid(), expert_MA


class _RoutedExperts(torch.autograd.Function):
    """Sort tokens by expert, one pair of products an expert, add back in place.

    Indexing `weight[e]` under autograd would make a full-size zero gradient an expert, so the
    backward writes each expert's gradient into its slice. silu(g) * u is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        gate_MA: Tensor,
        expert_MA: Tensor,
        w_in_EDF: Tensor,
        w_out_EFD: Tensor,
    ) -> Tensor:
        num_experts, top_k = w_in_EDF.shape[0], expert_MA.shape[1]
        order_R = expert_MA.flatten().argsort(stable=True)
        counts = torch.bincount(expert_MA.flatten(), minlength=num_experts).tolist()
        token_R = order_R if top_k == 1 else order_R // top_k
        gate_R1 = gate_MA.flatten()[order_R].to(x_MD.dtype).unsqueeze(-1)
        # The score multiplies the expert's input, not its output.
        x_RD = x_MD[token_R].mul_(gate_R1)
        h_RF = x_RD.new_empty(len(order_R), w_in_EDF.shape[2])
        y_RD = torch.empty_like(x_RD)
        for expert, rows in _slices(counts):
            torch.mm(x_RD[rows], w_in_EDF[expert].to(x_RD.dtype), out=h_RF[rows])
            torch.mm(_swiglu(h_RF[rows]), w_out_EFD[expert].to(x_RD.dtype), out=y_RD[rows])
        ctx.save_for_backward(x_MD, gate_R1, token_R, h_RF, w_in_EDF, w_out_EFD)
        ctx.counts, ctx.order_R = counts, order_R
        if top_k == 1:
            return torch.empty_like(x_MD).index_copy_(0, token_R, y_RD)
        return torch.zeros_like(x_MD).index_add_(0, token_R, y_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_R1, token_R, h_RF, w_in_EDF, w_out_EFD = ctx.saved_tensors
        (dy_MD,) = grads
        dtype = x_MD.dtype
        dy_RD, x_RD = dy_MD[token_R], x_MD[token_R]
        scaled_RD = x_RD * gate_R1
        dx_RD = torch.empty_like(dy_RD)
        dw_in_EDF, dw_out_EFD = torch.empty_like(w_in_EDF), torch.empty_like(w_out_EFD)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                dw_in_EDF[expert].zero_()
                dw_out_EFD[expert].zero_()
        for expert, rows in _slices(ctx.counts):
            a_RF, dh_RF = _swiglu_backward(h_RF[rows], dy_RD[rows] @ w_out_EFD[expert].to(dtype).T)
            _product_into(dw_out_EFD[expert], a_RF.T, dy_RD[rows])
            _product_into(dw_in_EDF[expert], scaled_RD[rows].T, dh_RF)
            torch.mm(dh_RF, w_in_EDF[expert].to(dtype).T, out=dx_RD[rows])
        dgate_R = (dx_RD * x_RD).sum(-1, dtype=torch.float32)
        dgate_MA = torch.empty_like(dgate_R).index_copy_(0, ctx.order_R, dgate_R)
        dgate_MA = dgate_MA.view(len(x_MD), -1)
        dx_RD.mul_(gate_R1)
        if len(token_R) == len(x_MD):
            dx_MD = torch.empty_like(x_MD).index_copy_(0, token_R, dx_RD)
        else:
            dx_MD = torch.zeros_like(x_MD).index_add_(0, token_R, dx_RD)
        return dx_MD, dgate_MA, None, dw_in_EDF, dw_out_EFD


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """The rows of each expert that has any."""
    slices, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, slice(start, start + count)))
        start += count
    return slices


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _swiglu(h_RF: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF.chunk(2, dim=-1)
    return F.silu(gate_RF).mul_(up_RF)


def _swiglu_backward(h_RF: Tensor, da_RF: Tensor) -> tuple[Tensor, Tensor]:
    """The activation again, and the gradient of gate and up side by side."""
    gate_RF, up_RF = h_RF.chunk(2, dim=-1)
    silu_RF = F.silu(gate_RF)
    dh_RF = torch.empty_like(h_RF)
    dgate_RF, dup_RF = dh_RF.chunk(2, dim=-1)
    torch.mul(da_RF, silu_RF, out=dup_RF)
    dgate_RF.copy_(torch.ops.aten.silu_backward(da_RF.mul_(up_RF), gate_RF))
    return silu_RF.mul_(up_RF), dh_RF


def in_turn(
    x_MD: Tensor,
    gate_MA: Tensor,
    expert_MA: Tensor,
    num_experts: int,
    run: Callable[[list[Tensor]], Iterable[Tensor]],
) -> Tensor:
    """Sort tokens by expert, let `run` have each expert's rows, and add up. No gradients.

    shapes: run: rows [R, D] of each expert, some without any -> y [R, D] in the same order -> y_MD
    """
    flat_R = expert_MA.flatten()
    order_R = flat_R.argsort(stable=True)
    counts = torch.bincount(flat_R, minlength=num_experts).tolist()
    token_R = order_R // expert_MA.shape[1]
    # The score multiplies the expert's input, not its output.
    x_RD = x_MD[token_R].mul_(gate_MA.flatten()[order_R].to(x_MD.dtype).unsqueeze(-1))
    y_RD = torch.cat(list(run(list(x_RD.split(counts)))))
    return torch.zeros_like(x_MD).index_add_(0, token_R, y_RD)


def routed_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """Run each token through its experts and sum. No expert sees a token it was not given.

    shapes: w_in [E, D, 2F] (gate columns, then up), w_out [E, F, D] -> y_MD
    """
    return ROUTED_EXPERTS.pick(x_MD)(x_MD, gate_MA, expert_MA, w_in_EDF, w_out_EFD)


def _sorted(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
) -> Tensor:
    if len(x_MD) == 1 and not torch.is_grad_enabled():
        return _one_token(x_MD, gate_MA, expert_MA, w_in_EDF, w_out_EFD)
    return apply(_RoutedExperts, x_MD, gate_MA, expert_MA, w_in_EDF, w_out_EFD)


def _one_token(
    x_1D: Tensor, gate_1A: Tensor, expert_1A: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """Decoding: one token has nothing to sort."""
    y_1D = None
    for a, expert in enumerate(expert_1A[0].tolist()):
        scaled_1D = x_1D * gate_1A[:, a : a + 1].to(x_1D.dtype)
        h_1F = scaled_1D @ w_in_EDF[expert].to(x_1D.dtype)
        part_1D = _swiglu(h_1F) @ w_out_EFD[expert].to(x_1D.dtype)
        y_1D = part_1D if y_1D is None else y_1D + part_1D
    assert y_1D is not None
    return y_1D


def reference_routed_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """The plain loop: every token alone, every chosen expert in turn."""
    rows = []
    for x_D, gates, experts in zip(x_MD, gate_MA, expert_MA, strict=True):
        y_D = torch.zeros_like(x_D)
        for gate, expert in zip(gates, experts, strict=True):
            h_F = (x_D * gate.to(x_D.dtype)) @ w_in_EDF[expert].to(x_D.dtype)
            y_D = y_D + _plain_swiglu(h_F) @ w_out_EFD[expert].to(x_D.dtype)
        rows.append(y_D)
    return torch.stack(rows)


def _plain_swiglu(h_F: Tensor) -> Tensor:
    gate_F, up_F = h_F.chunk(2, dim=-1)
    return F.silu(gate_F) * up_F


def _load_triton() -> Callable[..., Tensor]:
    from l4cli.ops.triton_moe import routed_experts

    return routed_experts


def _load_grouped() -> Callable[..., Tensor]:
    from l4cli.ops.grouped_moe import routed_experts

    return routed_experts


def _grouped_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    from l4cli.ops.grouped_moe import why_not

    return why_not(device, dtype)


# The first two in the order of what is proven, not measured: at Scout's width the products weigh
# nine times what gathering, gating and SwiGLU move, and torch's products are tuned on the device;
# at a width of 1024 twice, where ours, which move none of it, should win.
# `tests/bench/cuda_ops.py` decides where there is a GPU.
ROUTED_EXPERTS = Op(
    "routed_experts",
    [
        Version(
            "grouped-mm",
            _load_grouped,
            "torch's grouped products between sorting passes",
            _grouped_why_not,
            for_tests_on_cpu=True,
        ),
        triton_version(_load_triton, "rows gathered inside the products, SwiGLU fused"),
        Version("sorted", lambda: _sorted, "sorted by expert; an expert's rows in one product"),
        Version(REFERENCE, lambda: reference_routed_experts, "every token alone"),
    ],
)
