"""Attention of rows that see every key of several parts: what decoding does with a cache.

in: q [K, R, H] (the heads of a group are rows), parts of keys and values [K, S, H] or their codes
out: [K, R, H] and the log of the softmax's denominator [K, R], both fp32, so that more can join
source: flash attention's log-sum-exp merge (arXiv 2205.14135); torch's kernels return that sum
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from l4cli.ops.choice import FLOATS, REFERENCE, Op, Version, triton_version

Summed = tuple[Tensor, Tensor]  # a softmax's output and the log of its denominator
Attend = Callable[..., Summed]
# More rows than this fill a GPU without splitting the keys, and torch's tiles are larger.
FEW_ROWS = 512


class Codes(Protocol):
    """Keys and values in codes of 8 or 4 bits, as a cache keeps them."""

    bits: int
    tensors: tuple[Tensor, ...]  # keys, key scale, key low, values, value scale, value low

    def view(self) -> Codes:
        """What is filled, sharing memory."""

    def load(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As numbers again: keys and values [K, S, H]."""


Part = tuple[Tensor, Tensor] | Codes


def attend_parts(
    q_KRH: Tensor,
    parts: Sequence[Part],
    before: Summed | None = None,
    factor_R: Tensor | None = None,
) -> Summed:
    """Attend with rows that see every key, joined with what they saw `before`.

    `factor_R` (fp32) multiplies a row's scores: the temperature of its position.
    """
    assert parts or before is not None
    return ATTEND_PARTS.pick(q_KRH)(q_KRH, parts, before, factor_R)


def splits_keys(q_KRH: Tensor) -> bool:
    """Whether rows like these are better attended with through `attend_parts`, even to one part."""
    return ATTEND_PARTS.pick(q_KRH) is not part_by_part


def part_by_part(
    q_KRH: Tensor, parts: Sequence[Part], before: Summed | None, factor_R: Tensor | None
) -> Summed:
    """torch's kernels, a part at a time."""
    return _join(attention, q_KRH, parts, before, factor_R)


def reference_attend_parts(
    q_KRH: Tensor, parts: Sequence[Part], before: Summed | None, factor_R: Tensor | None
) -> Summed:
    """The formula, a part at a time."""
    return _join(reference_attention, q_KRH, parts, before, factor_R)


def _join(
    attend: Attend,
    q_KRH: Tensor,
    parts: Sequence[Part],
    before: Summed | None,
    factor_R: Tensor | None,
) -> Summed:
    if factor_R is not None:
        q_KRH = (q_KRH * factor_R.unsqueeze(-1)).to(q_KRH.dtype)
    merged = before
    for part in parts:
        keys_KSH, values_KSH = _load(part, q_KRH.dtype)
        out, lse = attend(q_KRH[None], keys_KSH[None], values_KSH[None])
        merged = (out[0], lse[0]) if merged is None else merge(merged, (out[0], lse[0]))
    assert merged is not None
    return merged[0].float(), merged[1]


def _load(part: Part, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(part, tuple):
        return part[0].to(dtype), part[1].to(dtype)
    return part.load(dtype)


def _load_triton() -> Attend:
    from src_kernels.cuda import decode as kernels

    def as_kept(part: Part) -> kernels.Part:
        if isinstance(part, tuple):
            keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in part)
            return kernels.Part(0, keys, values)
        keys, key_scale, key_low, values, value_scale, value_low = part.view().tensors
        return kernels.Part(part.bits, keys, values, key_scale, key_low, value_scale, value_low)

    def split_over_keys(
        q_KRH: Tensor, parts: Sequence[Part], before: Summed | None, factor_R: Tensor | None
    ) -> Summed:
        if q_KRH.shape[1] > FEW_ROWS or q_KRH.shape[2] > kernels.MAX_HEAD_DIM:
            return part_by_part(q_KRH, parts, before, factor_R)
        return kernels.attend_parts(q_KRH, [as_kept(part) for part in parts], before, factor_R)

    return split_over_keys


_SPLIT = "keys split, codes unpacked inside; over 512 rows or 128 channels part by part"
ATTEND_PARTS = Op(
    "attend_parts",
    [
        triton_version(_load_triton, _SPLIT, FLOATS),
        Version("part-by-part", lambda: part_by_part, "torch's kernels, a part at a time"),
        Version(REFERENCE, lambda: reference_attend_parts, "the formula, a part at a time"),
    ],
)


def merge(one: Summed, other: Summed) -> Summed:
    """Join softmaxes over disjoint keys, each weighted by its share of the whole sum."""
    (out, lse), (more, more_lse) = one, other
    joined = torch.logaddexp(lse, more_lse)
    share, rest = ((x - joined).exp().unsqueeze(-1) for x in (lse, more_lse))
    return torch.addcmul(out * share, more, rest), joined


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Summed:
    """Attention and the log of its softmax's denominator (fp32).

    shapes: [B, heads, rows, H] -> the same, [B, heads, rows]
    """
    aten = torch.ops.aten
    # PyTorch's public call hides the log-sum-exp; the operators behind it return it.
    if q.device.type == "cpu" and hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[:2]
    if q.device.type == "cuda":
        efficient = aten._scaled_dot_product_efficient_attention
        out, lse = efficient(q, k, v, None, True, 0.0, is_causal)[:2]
        return out, lse[..., : q.shape[2]]  # its sums are padded
    return reference_attention(q, k, v, is_causal)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Summed:
    """What `attention` promises, written out in fp32."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.float()).to(q.dtype), lse
