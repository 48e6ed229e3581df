"""Causal attention inside segments: documents for NoPE layers, chunks of documents for the rest.

in: q [B, T, N, H], k and v [B, T, K, H] and where segments lie; out: [B, T, N, H]
There is never a T x T mask: segments of like length are gathered into one padded batch, in which
causality alone keeps real queries from the padding behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.ops.batch import Segments
from l4cli.ops.blocked_attention import BlockedAttention
from l4cli.ops.choice import FLOATS, REFERENCE, Op, Version, triton_version

# Up to here our blocked bf16 products beat torch's fused CPU kernel; in fp32 they do not.
BLOCKED_MAX_LENGTH = 4096
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Bucket:
    """Segments of like length: flat positions to gather, the end padded with the first one."""

    length: int  # padded
    index: Tensor | None  # int64 [segments * length]; None: the flat order, reshaped
    real: Tensor | None  # int64: which gathered rows are no padding; None: all of them


@dataclass(frozen=True)
class AttentionPlan:
    """Where the segments of one kind of layer lie; made once per batch, used by every such layer.

    How a version wants them arranged is found when it first asks.
    """

    starts: Tensor  # int64 [segments], on the CPU
    lengths: Tensor
    num_positions: int
    device: Any

    @cached_property
    def covers_all(self) -> bool:
        """No padding position is left out."""
        return int(self.lengths.sum()) == self.num_positions

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Segments by padded length; equal lengths in order need no gather."""
        lengths = self.lengths
        if len(lengths) and self.covers_all and bool((lengths == lengths[0]).all()):
            return (Bucket(int(lengths[0]), None, None),)
        padded = _padded_lengths(lengths)
        return tuple(self._bucket(length, padded == length) for length in padded.unique().tolist())

    def _bucket(self, length: int, chosen: Tensor) -> Bucket:
        offset = torch.arange(length)
        is_real = offset < self.lengths[chosen].unsqueeze(-1)
        index = self.starts[chosen].unsqueeze(-1) + torch.where(is_real, offset, 0)
        real = None
        if not bool(is_real.all()):
            real = is_real.flatten().nonzero().flatten().to(self.device)
        return Bucket(length, index.flatten().to(self.device), real)

    @cached_property
    def tiles(self) -> dict[Any, Any]:
        """Pieces of segments for the Triton kernels, by their sizes."""
        return {}


def plan_attention(
    starts: Tensor, lengths: Tensor, num_positions: int, device: Any
) -> AttentionPlan:
    """Note where the segments lie, for all layers that attend inside them."""
    return AttentionPlan(starts, lengths, num_positions, device)


def _padded_lengths(lengths: Tensor) -> Tensor:
    """Round up to an eighth of the next power of two: at most an eighth is wasted."""
    power = torch.exp2(torch.ceil(torch.log2(lengths.clamp(min=8).double()))).long()
    step = (power // 8).clamp(min=8)
    return (lengths + step - 1) // step * step


@dataclass(frozen=True)
class AttentionPlans:
    """What a forward pass over packed documents needs: one plan a kind of layer."""

    document: AttentionPlan
    local: AttentionPlan

    @classmethod
    def from_segments(
        cls, segments: Segments, num_positions: int, device: torch.device
    ) -> AttentionPlans:
        document = plan_attention(
            segments.document_starts, segments.document_lengths, num_positions, device
        )
        if segments.local_starts is segments.document_starts:
            return cls(document, document)
        local = plan_attention(segments.local_starts, segments.local_lengths, num_positions, device)
        return cls(document, local)


def segment_attention(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, plan: AttentionPlan
) -> Tensor:
    """Attend causally inside every segment; positions in no segment give zeros."""
    return SEGMENT_ATTENTION.pick(q_BTNH)(q_BTNH, k_BTKH, v_BTKH, plan)


def _in_buckets(
    attend: Attend, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, plan: AttentionPlan
) -> Tensor:
    """Gather segments of like length, attend in each bucket, put back."""
    shape = q_BTNH.shape
    q_MNH, k_MKH, v_MKH = (x.reshape(-1, *x.shape[2:]) for x in (q_BTNH, k_BTKH, v_BTKH))
    if len(plan.buckets) == 1 and plan.buckets[0].index is None:
        return _attend_bucket(attend, q_MNH, k_MKH, v_MKH, plan.buckets[0].length).view(shape)
    outputs, places = [], []
    for bucket in plan.buckets:
        assert bucket.index is not None
        q, k, v = (x.index_select(0, bucket.index) for x in (q_MNH, k_MKH, v_MKH))
        out_MNH = _attend_bucket(attend, q, k, v, bucket.length)
        if bucket.real is None:
            outputs.append(out_MNH)
            places.append(bucket.index)
        else:
            outputs.append(out_MNH.index_select(0, bucket.real))
            places.append(bucket.index.index_select(0, bucket.real))
    if not outputs:
        return torch.zeros_like(q_BTNH)
    # Every real position lies in exactly one segment, so a copy is enough.
    base_MNH = torch.empty_like(q_MNH) if plan.covers_all else torch.zeros_like(q_MNH)
    return base_MNH.index_copy(0, torch.cat(places), torch.cat(outputs)).view(shape)


def _load_triton() -> Callable[..., Tensor]:
    from src_kernels.cuda import segments as kernels

    def in_tiles(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, plan: AttentionPlan) -> Tensor:
        """Segments as they lie: no gather, no padding, as many programs as there is work."""
        if q_BTNH.shape[-1] > kernels.MAX_HEAD_DIM:
            return _in_buckets(_fast_causal, q_BTNH, k_BTKH, v_BTKH, plan)
        sizes = kernels.choose_sizes(q_BTNH.dtype, q_BTNH.shape[-1], _capability(q_BTNH.device))
        if sizes not in plan.tiles:
            where = (plan.starts, plan.lengths, plan.num_positions)
            plan.tiles[sizes] = kernels.make_tiles(*where, sizes, q_BTNH.device)
        q_MNH, k_MKH, v_MKH = (x.reshape(-1, *x.shape[2:]) for x in (q_BTNH, k_BTKH, v_BTKH))
        out_MNH = kernels.segment_attention(q_MNH, k_MKH, v_MKH, plan.tiles[sizes], sizes)
        return out_MNH.view(q_BTNH.shape)

    return in_tiles


@cache
def _capability(device: torch.device) -> int:
    """90 for Hopper, 100 for Blackwell; in the interpreter any will do."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _attend_bucket(
    attend: Attend, q_MNH: Tensor, k_MKH: Tensor, v_MKH: Tensor, length: int
) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)) for x in (q_MNH, k_MKH, v_MKH))  # [S, L, heads, H]
    return attend(q, k, v).flatten(0, 1)


def _fast_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = _blocked_causal if _is_blocked(q, q.shape[1]) else _fused_causal
    return attend(q, k, v)


def _plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, with all scores at once. shapes: as `_fused_causal`"""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = torch.einsum("slnh,smnh->snlm", q, k) * q.shape[-1] ** -0.5
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("snlm,smnh->slnh", probs, v)


def _fused_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused kernel. shapes: q [S, L, N, H], k and v [S, L, K, H] -> [S, L, N, H]"""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


def _blocked_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _blocked(q, k, v, is_causal=True)


def _blocked(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Our blocked products, each key head's queries as rows of one matrix. shapes as above"""
    segments, length, num_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    rows = (segments * kv_heads, -1, head_dim)
    q_SLKGH = (q * head_dim**-0.5).unflatten(2, (kv_heads, num_heads // kv_heads))
    q_ZRH = q_SLKGH.transpose(1, 2).reshape(rows)
    k_ZLH, v_ZLH = (x.transpose(1, 2).reshape(rows) for x in (k, v))
    out = BlockedAttention.apply(q_ZRH, k_ZLH, v_ZLH, is_causal)
    out = out.view(segments, kv_heads, length, -1, head_dim).transpose(1, 2)
    return out.reshape(q.shape)


def _is_blocked(q: Tensor, length: int) -> bool:
    return q.dtype == torch.bfloat16 and not q.is_cuda and length <= BLOCKED_MAX_LENGTH


def reference_segment_attention(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, starts: Tensor, lengths: Tensor
) -> Tensor:
    """The plain loop: a softmax a segment and head, in the inputs' dtype."""
    q, k, v = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        rows = slice(start, start + length)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // groups].T * q.shape[-1] ** -0.5
            probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[rows, head] = probs @ v[rows, head // groups]
    return out.view(q_BTNH.shape)


def full_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """Every position sees every other: patches of a tile. shapes: [B, T, N, H] -> same"""
    return FULL_ATTENTION.pick(q_BTNH)(q_BTNH, k_BTNH, v_BTNH)


def _fast_full(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    if _is_blocked(q_BTNH, q_BTNH.shape[1]):
        return _blocked(q_BTNH, k_BTNH, v_BTNH, is_causal=False)
    return reference_full_attention(q_BTNH, k_BTNH, v_BTNH)


def reference_full_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """As torch computes it."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


_HOW = "blocked in bf16 on a CPU up to 4096, else torch's fused one"
_TILES = "segments as they lie; heads of over 128 channels in buckets"
SEGMENT_ATTENTION = Op(
    "segment_attention",
    [
        triton_version(_load_triton, _TILES, FLOATS),
        Version("bucketed", lambda: partial(_in_buckets, _fast_causal), _HOW),
        Version(REFERENCE, lambda: partial(_in_buckets, _plain_causal), "all scores at once"),
    ],
)
FULL_ATTENTION = Op(
    "full_attention",
    [
        Version("blocked", lambda: _fast_full, _HOW),
        Version(REFERENCE, lambda: reference_full_attention, "torch's own"),
    ],
)
