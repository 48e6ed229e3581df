"""The loss over the vocabulary from hidden states, without logits in memory.

in: h [M, D], the head's weight [V, D], labels [M]; out: each token's loss, fp32 [M]
source: online log-sum-exp as in flash attention; cut cross-entropy (arXiv 2411.09009) for the idea
Two passes: the forward keeps one number a token, the backward makes p - onehot again, a block of
the vocabulary at a time in the dtype of h, and multiplies it with torch's products: that is three
products for two gradients, no atomics, and each block of the weight's gradient written once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GRAD_ELEMENTS = 2**25  # of p - onehot at once: 64 MiB in bf16
PROGRAMS = 264  # two a multiprocessor of an H100: fewer leave some of them idle
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _logits(
    h, weight, rows, cols, is_row, is_col, num_dims, h_row, weight_row,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of h @ weight.T in fp32."""
    dims = tl.arange(0, BLOCK_D)
    at_h = h + rows.to(tl.int64)[:, None] * h_row + dims[None, :]
    at_weight = weight + cols.to(tl.int64)[:, None] * weight_row + dims[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for dim in range(0, num_dims, BLOCK_D):
        is_dim = (dims < num_dims - dim)[None, :]
        a = tl.load(at_h + dim, mask=is_row[:, None] & is_dim, other=0.0)
        b = tl.load(at_weight + dim, mask=is_col[:, None] & is_dim, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def sums_forward(
    h, weight, labels, lse, target, num_rows, num_cols, num_dims, h_row, weight_row, span,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over a span of the vocabulary: log2 of the sum of exponentials, and the label's logit."""
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    label = tl.load(labels + rows, mask=is_row, other=-1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(part * span, min(part * span + span, num_cols), BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        is_col = cols < num_cols
        logits = _logits(
            h, weight, rows, cols, is_row, is_col, num_dims, h_row, weight_row,
            BLOCK_M, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        logits = tl.where(is_col[None, :], logits * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
        is_label = cols[None, :] == label[:, None]
        picked = tl.maximum(picked, tl.max(tl.where(is_label, logits, float("-inf")), 1))
    to = part.to(tl.int64) * num_rows + rows
    tl.store(lse + to, top + tl.log2(total), mask=is_row)
    tl.store(target + to, picked, mask=is_row)


@triton.jit
def grad_block(
    h, weight, labels, lse, scales, out, first_col, num_rows, num_cols, num_dims, h_row,
    weight_row, out_row, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(softmax - onehot) * scale of a block of the vocabulary."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = first_col + own
    is_row, is_col = rows < num_rows, own < num_cols
    logits = _logits(
        h, weight, rows, cols, is_row, is_col, num_dims, h_row, weight_row,
        BLOCK_M, BLOCK_V, BLOCK_D, PRECISION,
    )  # fmt: skip
    total = tl.load(lse + rows, mask=is_row, other=0.0)
    label = tl.load(labels + rows, mask=is_row, other=-1)
    scale = tl.load(scales + rows, mask=is_row, other=0.0)
    probs = tl.exp2(logits * LOG2E - total[:, None])
    probs -= tl.where(cols[None, :] == label[:, None], 1.0, 0.0)
    grad = (probs * scale[:, None]).to(out.dtype.element_ty)
    to = out + rows.to(tl.int64)[:, None] * out_row + own[None, :]
    tl.store(to, grad, mask=is_row[:, None] & is_col[None, :])


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, most: int) -> Tensor:
        cast_VD = weight_VD.to(h_MD.dtype)
        num_rows, num_dims = h_MD.shape
        num_cols, tile = len(cast_VD), options(h_MD.dtype)
        row_tiles = triton.cdiv(num_rows, tile["BLOCK_M"])
        col_tiles = triton.cdiv(num_cols, tile["BLOCK_V"])
        # Few tokens: the vocabulary is shared out too, and the parts' sums are joined after.
        parts = min(col_tiles, max(1, PROGRAMS // max(1, row_tiles)))
        span = triton.cdiv(col_tiles, parts) * tile["BLOCK_V"]
        parts = triton.cdiv(num_cols, span)
        lse, target = h_MD.new_empty(2, parts, num_rows, dtype=torch.float32)
        if num_rows:
            sums_forward[(row_tiles, parts)](
                h_MD, cast_VD, labels_M, lse, target, num_rows, num_cols, num_dims,
                h_MD.stride(0), cast_VD.stride(0), span, **tile,
            )  # fmt: skip
        top_M = lse.amax(0)
        lse_M = top_M + (lse - top_M).exp2().sum(0).log2()
        ctx.save_for_backward(h_MD, weight_VD, labels_M, lse_M)
        ctx.most = most
        return (lse_M - target.amax(0)) * math.log(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h_MD, weight_VD, labels_M, lse_M = ctx.saved_tensors
        cast_VD = weight_VD.to(h_MD.dtype)
        num_rows, num_dims = h_MD.shape
        num_cols, tile = len(cast_VD), options(h_MD.dtype)
        scales_M = grads[0].float().contiguous()
        # Many blocks add to it: in fp32, or the sum is rounded once a block.
        needs_dh, needs_dweight = ctx.needs_input_grad[:2]
        dh_MD = torch.zeros(h_MD.shape, dtype=torch.float32, device=h_MD.device)
        dweight_VD = torch.empty_like(weight_VD) if needs_dweight else None
        width = max(1, ctx.most // max(1, num_rows)) // tile["BLOCK_V"] * tile["BLOCK_V"]
        width = min(max(width, tile["BLOCK_V"]), num_cols)
        buffer = h_MD.new_empty(num_rows, width)
        for first in range(0, num_cols, width):
            block = slice(first, min(first + width, num_cols))
            grad_MV = buffer[:, : block.stop - first]
            row_tiles = triton.cdiv(num_rows, tile["BLOCK_M"])
            if num_rows:
                grad_block[(row_tiles, triton.cdiv(grad_MV.shape[1], tile["BLOCK_V"]))](
                    h_MD, cast_VD, labels_M, lse_M, scales_M, grad_MV, first, num_rows,
                    grad_MV.shape[1], num_dims, h_MD.stride(0), cast_VD.stride(0), width, **tile,
                )  # fmt: skip
            if needs_dh:
                dh_MD += grad_MV @ cast_VD[block]
            if dweight_VD is not None:
                dweight_VD[block] = grad_MV.T @ h_MD
        return dh_MD.to(h_MD.dtype) if needs_dh else None, dweight_VD, None, None


def options(dtype: torch.dtype) -> dict[str, Any]:
    """Tiles that compile without spills."""
    if dtype == torch.float32:  # no tensor cores: products stay exact
        sizes, precision, num_warps = (32, 32, 32), "ieee", 4
    else:
        sizes, precision, num_warps = (128, 128, 64), "tf32", 8
    names = ("BLOCK_M", "BLOCK_V", "BLOCK_D")
    more = {"PRECISION": precision, "num_warps": num_warps, "num_stages": 3}
    return {**dict(zip(names, sizes, strict=True)), **more}


def token_losses(
    h_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, most: int = GRAD_ELEMENTS
) -> Tensor:
    """-log softmax(h @ weight.T)[label] of each token; `most` numbers of a gradient at once."""
    h_MD, weight_VD = (x if x.stride(-1) == 1 else x.contiguous() for x in (h_MD, weight_VD))
    return _TokenLosses.apply(h_MD, weight_VD, labels_M.contiguous(), most)
