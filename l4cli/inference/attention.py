"""Attend to keys that lie in several places, without ever building a mask.

in: queries of T consecutive new tokens, parts of the past (all visible), the T new keys (causal)
out: the same as one softmax over all of it
source: flash attention's log-sum-exp merge (arXiv 2205.14135); torch's kernels return that sum
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.inference.kept import Part, load, part_tensors
from l4cli.ops.parts_attention import Summed, attend_parts, attention, splits_keys

SHORT_RUN = 512  # up to here explicit products beat torch's fused CPU kernel (read_speed.py)
SCORES = 2**20  # of those held at once


def attend_to_all(q_1NH: Tensor, parts: Sequence[Part]) -> Tensor:
    """Attend with one token that sees every key of every part.

    shapes: q_1NH -> out_1NH
    """
    if len(parts) > 1 or splits_keys(q_1NH):
        out_KRH, _ = attend_rows(as_rows(q_1NH, part_tensors(parts[-1])[0].shape[0]), parts)
        return as_heads(out_KRH, q_1NH)
    keys_KSH, values_KSH = load(parts[0], q_1NH.dtype)
    # The heads of a group are the rows of one product: keys are read once, not once a head.
    q_KGH = q_1NH.view(keys_KSH.shape[0], -1, q_1NH.shape[-1])
    out = F.scaled_dot_product_attention(q_KGH[None], keys_KSH[None], values_KSH[None])
    return out.reshape(q_1NH.shape)


def attend_causally(q_CTNH: Tensor, k_CTKH: Tensor, v_CTKH: Tensor, past: Sequence[Part]) -> Tensor:
    """Attend with C runs of T new tokens, causal inside a run; `past` is seen by all (C = 1).

    shapes: q_CTNH -> out_CTNH
    """
    if past:
        return attend_after(q_CTNH, k_CTKH, v_CTKH, lambda q, own: attend_rows(q, past, own))
    if q_CTNH.device.type == "cpu" and q_CTNH.shape[1] <= SHORT_RUN and len(q_CTNH) > 1:
        return _attend_short_runs(q_CTNH, k_CTKH, v_CTKH)
    q, k, v, wide = _by_group(q_CTNH, k_CTKH, v_CTKH)
    return _from_groups(F.scaled_dot_product_attention(q, k, v, is_causal=True), wide, q_CTNH)


def _attend_short_runs(q_CTNH: Tensor, k_CTKH: Tensor, v_CTKH: Tensor) -> Tensor:
    """Explicit products over many short runs: the heads of a group are rows of one matrix."""
    num_runs, length, num_heads, head_dim = q_CTNH.shape
    num_kv_heads = k_CTKH.shape[2]
    group = num_heads // num_kv_heads
    q_CKTGH = q_CTNH.unflatten(2, (num_kv_heads, group)).transpose(1, 2)
    q_ZRH = q_CKTGH.reshape(-1, length * group, head_dim)
    k_ZTH, v_ZTH = (x.transpose(1, 2).reshape(-1, length, head_dim) for x in (k_CTKH, v_CTKH))
    mask_RT = torch.full((length, length), -torch.inf, dtype=q_CTNH.dtype).triu_(1)
    mask_RT = mask_RT.repeat_interleave(group, 0)
    out_ZRH = torch.empty_like(q_ZRH)
    step = max(1, SCORES // mask_RT.numel())
    # Products in fp32 cost more than the calls: half of what lies above the diagonal is spared.
    half = length // 2 if q_CTNH.dtype == torch.float32 and length % 2 == 0 else length
    for runs in (slice(start, start + step) for start in range(0, len(q_ZRH), step)):
        for end in range(half, length + 1, half):
            rows = slice((end - half) * group, end * group)
            q, k, v = q_ZRH[runs, rows], k_ZTH[runs, :end], v_ZTH[runs, :end]
            mask = mask_RT[rows, :end].expand(len(q), -1, -1)
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=head_dim**-0.5)
            out_ZRH[runs, rows] = torch.bmm(scores.softmax(-1), v)
    out_CKTGH = out_ZRH.view(num_runs, num_kv_heads, length, group, head_dim)
    return out_CKTGH.transpose(1, 2).reshape(q_CTNH.shape)


def attend_after(
    q_CTNH: Tensor, k_CTKH: Tensor, v_CTKH: Tensor, see: Callable[[Tensor, Summed], Summed]
) -> Tensor:
    """One run, causal inside; `see` joins to that what its rows see of the past.

    shapes: q_CTNH -> out_CTNH; see: q_KRH, what was seen -> out_KRH, log-sum-exp_KR
    """
    assert len(q_CTNH) == 1
    num_kv_heads = k_CTKH.shape[2]
    out_1TNH, lse_1TN = attend_within(q_CTNH, k_CTKH, v_CTKH)
    own = (
        as_rows(out_1TNH[0], num_kv_heads),
        as_rows(lse_1TN[0, :, :, None], num_kv_heads)[..., 0],
    )
    out_KRH, _ = see(as_rows(q_CTNH[0], num_kv_heads), own)
    return as_heads(out_KRH, q_CTNH[0])[None]


def attend_within(q_CTNH: Tensor, k_CTKH: Tensor, v_CTKH: Tensor) -> Summed:
    """Attend inside runs, causally. shapes: -> out_CTNH, log-sum-exp_CTN"""
    q, k, v, wide = _by_group(q_CTNH, k_CTKH, v_CTKH)
    out, lse = attention(q, k, v, is_causal=True)
    lse_CTN = lse.reshape(wide[:-1]).permute(0, 3, 2, 1).flatten(2)
    return _from_groups(out, wide, q_CTNH), lse_CTN


def _by_group(
    q_CTNH: Tensor, k_CTKH: Tensor, v_CTKH: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Queries by group, each group with all key heads. shapes: -> [C * G, K, T, H] three times"""
    num_runs, length, num_heads, head_dim = q_CTNH.shape
    num_kv_heads = k_CTKH.shape[2]
    q_CTKGH = q_CTNH.unflatten(2, (num_kv_heads, -1))
    # One run expands without a copy; several copy their keys once a group, small beside T x T.
    wide = (num_runs, num_heads // num_kv_heads, num_kv_heads, length, head_dim)
    k_BKTH, v_BKTH = (
        x_CTKH.permute(0, 2, 1, 3).unsqueeze(1).expand(wide).reshape(-1, *wide[2:])
        for x_CTKH in (k_CTKH, v_CTKH)
    )
    return q_CTKGH.permute(0, 3, 2, 1, 4).reshape(-1, *wide[2:]), k_BKTH, v_BKTH, wide


def _from_groups(out_BKTH: Tensor, wide: tuple[int, ...], like_CTNH: Tensor) -> Tensor:
    return out_BKTH.reshape(wide).permute(0, 3, 2, 1, 4).reshape(like_CTNH.shape)


def attend_rows(q_KRH: Tensor, parts: Sequence[Part], before: Summed | None = None) -> Summed:
    """Attend with rows that see every key of every part, joined with what they saw `before`.

    shapes: -> out_KRH fp32, log-sum-exp_KR fp32
    """
    return attend_parts(q_KRH, parts, before)


def as_rows(q_TNH: Tensor, num_kv_heads: int) -> Tensor:
    """All queries of a key head as rows of one matrix. shapes: -> q_KRH, R = T * G"""
    q_TKGH = q_TNH.unflatten(1, (num_kv_heads, -1))
    return q_TKGH.transpose(0, 1).flatten(1, 2)


def as_heads(out_KRH: Tensor, like_TNH: Tensor) -> Tensor:
    """`as_rows` undone, in the queries' dtype."""
    out_KTGH = out_KRH.unflatten(1, (len(like_TNH), -1))
    return out_KTGH.transpose(0, 1).reshape(like_TNH.shape).to(like_TNH.dtype)
