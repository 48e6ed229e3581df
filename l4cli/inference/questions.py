"""Many continuations of one past in a single pass: the past is read once, and not changed.

in: q, k, v of all continuations' tokens, one after the other in one row
out: attention of each over the past and over itself, up to where it stands
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l4cli.inference.attention import Summed, as_heads, as_rows, attend_rows, attend_within
from l4cli.inference.layer_cache import LayerCache

Layers = Sequence[LayerCache] | Mapping[int, LayerCache]


class Questions:
    """Stands where a cache stands; keeps nothing of what it is given."""

    def __init__(self, layers: Layers, num_read: int, lengths: Sequence[int]) -> None:
        self.layers, self.num_read, self.lengths = layers, num_read, list(lengths)

    def attend(self, layer_idx: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Attend each continuation's tokens to the past and to those before them."""
        layer = self.layers[layer_idx]
        q_MNH, k_MKH, v_MKH = q_BTNH[0], k_BTKH[0], v_BTKH[0]
        num_kv_heads = k_MKH.shape[1]
        starts, lengths, sees_past = self._runs(layer.chunk_size)
        out_KRH, lse_KR = _attend_runs(q_MNH, k_MKH, v_MKH, starts, lengths)
        parts = layer.parts()
        if parts:
            group = q_MNH.shape[1] // num_kv_heads
            if len(sees_past) == len(q_MNH):
                return as_heads(
                    attend_rows(as_rows(q_MNH, num_kv_heads), parts, (out_KRH, lse_KR))[0], q_MNH
                )[None]
            rows = (sees_past[:, None] * group + torch.arange(group)).flatten().to(q_MNH.device)
            before: Summed = (out_KRH[:, rows], lse_KR[:, rows])
            asking_KRH = as_rows(q_MNH, num_kv_heads)[:, rows]
            out_KRH[:, rows] = attend_rows(asking_KRH, parts, before)[0]
        return as_heads(out_KRH, q_MNH)[None]

    def _runs(self, chunk_size: int | None) -> tuple[list[int], list[int], Tensor]:
        """Runs of tokens that see each other, and which tokens see what is kept of the past."""
        starts, lengths, seeing = [], [], []
        start = 0
        for length in self.lengths:
            first = length
            if chunk_size is not None:
                first = min(length, chunk_size - self.num_read % chunk_size)
            seeing.append(torch.arange(start, start + first))
            at, end = start, start + length
            size = first
            while at < end:
                starts.append(at)
                lengths.append(size)
                at += size
                size = min(chunk_size or length, end - at)
            start = end
        return starts, lengths, torch.cat(seeing)


def _attend_runs(
    q_MNH: Tensor, k_MKH: Tensor, v_MKH: Tensor, starts: list[int], lengths: list[int]
) -> Summed:
    """Causal attention inside each run, runs of one length together: nothing is padded."""
    num_rows, num_kv_heads = q_MNH.shape[0], k_MKH.shape[1]
    group = q_MNH.shape[1] // num_kv_heads
    out = q_MNH.new_empty(num_kv_heads, num_rows, group, q_MNH.shape[-1], dtype=torch.float32)
    lse = out.new_empty(out.shape[:-1])
    for length in sorted(set(lengths)):
        chosen = [start for start, size in zip(starts, lengths, strict=True) if size == length]
        index = (torch.tensor(chosen)[:, None] + torch.arange(length)).flatten().to(q_MNH.device)
        runs = (x[index].unflatten(0, (-1, length)) for x in (q_MNH, k_MKH, v_MKH))
        out_CTNH, lse_CTN = attend_within(*runs)
        shape = (len(index), num_kv_heads, group)
        out[:, index] = out_CTNH.reshape(*shape, -1).transpose(0, 1).float()
        lse[:, index] = lse_CTN.reshape(shape).transpose(0, 1)
    return out.flatten(1, 2), lse.flatten(1, 2)
