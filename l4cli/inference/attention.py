"""Attend to keys that lie in several places, without ever building a mask.

in: queries of T consecutive new tokens, parts of the past (all visible), the T new keys (causal)
out: the same as one softmax over all of it
source: flash attention's log-sum-exp merge (arXiv 2205.14135); torch's kernels return that sum
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[Tensor, Tensor]  # keys_KSH, values_KSH


def attend_to_all(q_1NH: Tensor, parts: list[Part]) -> Tensor:
    """Attend with one token that sees every key of every part.

    shapes: q_1NH -> out_1NH
    """
    num_kv_heads = parts[0][0].shape[0]
    # The heads of a group are the rows of one product: keys are read once, not once a head.
    q_KGH = q_1NH.view(num_kv_heads, -1, q_1NH.shape[-1])
    if len(parts) == 1:
        keys_KSH, values_KSH = parts[0]
        out = F.scaled_dot_product_attention(q_KGH[None], keys_KSH[None], values_KSH[None])
        return out.reshape(q_1NH.shape)
    pieces = [_attention(q_KGH[None], keys[None], values[None]) for keys, values in parts]
    return _merge(pieces).to(q_1NH.dtype).reshape(q_1NH.shape)


def attend_causally(q_CTNH: Tensor, k_CTKH: Tensor, v_CTKH: Tensor, past: list[Part]) -> Tensor:
    """Attend with C runs of T new tokens, causal inside a run; `past` is seen by all (C = 1).

    shapes: q_CTNH -> out_CTNH
    """
    num_runs, length, num_heads, head_dim = q_CTNH.shape
    num_kv_heads = k_CTKH.shape[2]
    num_groups = num_heads // num_kv_heads
    q_CTKGH = q_CTNH.view(num_runs, length, num_kv_heads, num_groups, head_dim)
    # One run expands without a copy; several copy their keys once a group, small beside T x T.
    wide = (num_runs, num_groups, num_kv_heads, length, head_dim)
    k_BKTH, v_BKTH = (
        x_CTKH.permute(0, 2, 1, 3).unsqueeze(1).expand(wide).reshape(-1, *wide[2:])
        for x_CTKH in (k_CTKH, v_CTKH)
    )
    q_BKTH = q_CTKGH.permute(0, 3, 2, 1, 4).reshape(-1, *wide[2:])
    if not past:
        out_BKTH = F.scaled_dot_product_attention(q_BKTH, k_BKTH, v_BKTH, is_causal=True)
    else:
        assert num_runs == 1
        pieces = [_attention(q_BKTH, k_BKTH, v_BKTH, is_causal=True)]
        pieces += [_attend_groups(q_BKTH, keys, values) for keys, values in past]
        out_BKTH = _merge(pieces).to(q_CTNH.dtype)
    return out_BKTH.reshape(wide).permute(0, 3, 2, 1, 4).reshape(q_CTNH.shape)


def _attend_groups(q_GKTH: Tensor, keys_KSH: Tensor, values_KSH: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of whole groups to keys that all of their rows see."""
    num_groups, num_kv_heads, length, head_dim = q_GKTH.shape
    rows = q_GKTH.transpose(0, 1).reshape(1, num_kv_heads, num_groups * length, head_dim)
    out, lse = _attention(rows, keys_KSH[None], values_KSH[None])
    split = (num_groups, length)
    return out[0].unflatten(1, split).transpose(0, 1), lse[0].unflatten(1, split).transpose(0, 1)


def _merge(pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Join softmaxes over disjoint keys, each weighted by its share of the whole sum."""
    lse = torch.stack([lse for _, lse in pieces])
    share = (lse - lse.logsumexp(0)).exp().unsqueeze(-1)
    merged = pieces[0][0] * share[0]
    for i, (out, _) in enumerate(pieces[1:], start=1):
        merged = torch.addcmul(merged, out, share[i])
    return merged


def _attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> tuple[Tensor, Tensor]:
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


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """What `_attention` promises, written out in fp32."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.float()).to(q.dtype), lse
