"""The loss over the vocabulary, a chunk of tokens at a time.

in: hidden states, the head's weight, targets and their weights; out: the weighted sum of losses
source: softmax cross-entropy in fp32; gradients p - onehot are made in the forward, so that
no [M, V] buffer ever exists
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.ops.choice import FLOATS, REFERENCE, Op, Version, triton_version

CHUNK_ELEMENTS = 2**21  # logits held at once: 8 MiB in fp32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weights_M: Tensor, chunk: int
    ) -> Tensor:
        cast_VD = weight_VD.to(h_MD.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dh_MD = torch.empty_like(h_MD) if needs_grad else None
        dweight_VD = torch.zeros_like(weight_VD) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=h_MD.device)
        # One buffer for all chunks: fresh ones cost a page fault every 4 KiB on a CPU.
        buffer_MV = h_MD.new_empty(min(chunk, len(h_MD)), len(weight_VD), dtype=torch.float32)
        for start in range(0, len(h_MD), chunk):
            rows = slice(start, start + chunk)
            logits_MV = logits_into(buffer_MV, h_MD[rows], cast_VD)
            picked_M1 = labels_M[rows].unsqueeze(-1)
            top_M1 = logits_MV.amax(-1, keepdim=True)
            target_M1 = logits_MV.gather(-1, picked_M1)
            exp_MV = logits_MV.sub_(top_M1).exp_()
            sum_M1 = exp_MV.sum(-1, keepdim=True)
            loss_M1 = sum_M1.log() + top_M1 - target_M1
            total += torch.dot(loss_M1.flatten(), weights_M[rows])
            if dh_MD is None or dweight_VD is None:
                continue
            weight_M1 = weights_M[rows].unsqueeze(-1)
            grad_MV = exp_MV.mul_(weight_M1 / sum_M1)
            grad_MV.scatter_add_(-1, picked_M1, -weight_M1)
            grad_MV = grad_MV.to(h_MD.dtype)
            torch.mm(grad_MV, cast_VD, out=dh_MD[rows])
            if dweight_VD.dtype == grad_MV.dtype:
                dweight_VD.addmm_(grad_MV.T, h_MD[rows])
            else:
                dweight_VD.add_(grad_MV.T @ h_MD[rows])
        ctx.save_for_backward(dh_MD, dweight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh_MD, dweight_VD = ctx.saved_tensors
        (scale,) = grads
        return dh_MD * scale.to(dh_MD.dtype), dweight_VD * scale, None, None, None


def logits_into(buffer_MV: Tensor, h_MD: Tensor, weight_VD: Tensor) -> Tensor:
    """The logits of these tokens in the buffer's first rows; h and weight are of one dtype."""
    logits_MV = buffer_MV[: len(h_MD)]
    if h_MD.dtype == logits_MV.dtype:
        return torch.mm(h_MD, weight_VD.T, out=logits_MV)
    return logits_MV.copy_(h_MD @ weight_VD.T)


def linear_cross_entropy(
    h_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    weights_M: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Weighted sum over tokens of -log softmax(h @ weight.T)[label], an fp32 scalar.

    Tokens of weight zero cost nothing. shapes: h [M, D], weight [V, D], labels [M], weights [M]
    """
    is_target_M = weights_M != 0
    if not bool(is_target_M.all()):
        index = is_target_M.nonzero().flatten()
        h_MD, labels_M, weights_M = h_MD[index], labels_M[index], weights_M[index]
    run = LINEAR_CROSS_ENTROPY.pick(h_MD)
    return run(h_MD, weight_VD, labels_M, weights_M.float(), chunk)


def _chunked(
    h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weights_M: Tensor, chunk: int | None
) -> Tensor:
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    return _LinearCrossEntropy.apply(h_MD, weight_VD, labels_M, weights_M, chunk)


def _load_triton() -> Callable[..., Tensor]:
    losses = _load_triton_losses()

    def without_logits(
        h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weights_M: Tensor, chunk: int | None
    ) -> Tensor:
        return torch.dot(losses(h_MD, weight_VD, labels_M, chunk), weights_M)

    return without_logits


def _load_triton_losses() -> Callable[..., Tensor]:
    from src_kernels.cuda import cross_entropy as kernels

    def without_logits(
        h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk: int | None
    ) -> Tensor:
        most = kernels.GRAD_ELEMENTS if chunk is None else chunk * len(weight_VD)
        return kernels.token_losses(h_MD, weight_VD, labels_M, most)

    return without_logits


def reference_linear_cross_entropy(
    h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weights_M: Tensor, chunk: int | None = None
) -> Tensor:
    """All logits at once."""
    logits_MV = (h_MD @ weight_VD.to(h_MD.dtype).T).float()
    return (F.cross_entropy(logits_MV, labels_M, reduction="none") * weights_M).sum()


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    [
        triton_version(_load_triton, "no logits in memory, three products for gradients", FLOATS),
        Version("chunked", lambda: _chunked, "gradients in the forward, 8 MiB of logits at once"),
        Version(REFERENCE, lambda: reference_linear_cross_entropy, "all logits at once"),
    ],
)


@torch.no_grad()
def token_losses(
    h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk: int | None = None
) -> Tensor:
    """-log softmax(h @ weight.T)[label] of each token, fp32 [M], without gradients."""
    return TOKEN_LOSSES.pick(h_MD)(h_MD, weight_VD, labels_M, chunk)


def _chunked_losses(h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk: int | None) -> Tensor:
    chunk = chunk or max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    cast_VD = weight_VD.to(h_MD.dtype)
    parts = [
        F.cross_entropy(
            (h_MD[i : i + chunk] @ cast_VD.T).float(), labels_M[i : i + chunk], reduction="none"
        )
        for i in range(0, len(h_MD), chunk)
    ]
    return torch.cat(parts) if parts else h_MD.new_zeros(0, dtype=torch.float32)


def _losses_at_once(h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, chunk: int | None) -> Tensor:
    return _chunked_losses(h_MD, weight_VD, labels_M, max(1, len(h_MD)))


TOKEN_LOSSES = Op(
    "token_losses",
    [
        triton_version(_load_triton_losses, "no logits in memory", FLOATS),
        Version("chunked", lambda: _chunked_losses, "8 MiB of logits at once"),
        Version(REFERENCE, lambda: _losses_at_once, "all logits at once"),
    ],
)
