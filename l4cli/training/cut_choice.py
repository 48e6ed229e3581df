"""Which heads, neurons and experts of a teacher matter most, from its weights alone.

in: weights, fp32, and the norm weights that scale what they read; out: indices, rising
source: magnitude of what a part can write, as for width in Minitron, arXiv 2407.14679, but of
weights in place of activations; experts merged by their routers' likeness, as in M-SMoE,
arXiv 2310.01334
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


def strongest(strength: Tensor, count: int) -> Tensor:
    """The indices of the largest values, rising; of equal ones the first."""
    order = strength.argsort(descending=True, stable=True)
    return order[:count].sort().values


@dataclass(frozen=True)
class Neurons:
    """A SwiGLU map by neuron: what each reads twice, and what it writes."""

    gate_FD: Tensor
    up_FD: Tensor
    down_FD: Tensor

    def take(self, index_X: Tensor) -> Neurons:
        """Some of the neurons."""
        return Neurons(self.gate_FD[index_X], self.up_FD[index_X], self.down_FD[index_X])

    def scaled(self, read: float, write: float) -> Neurons:
        """As if what they read and what they write were multiplied."""
        return Neurons(self.gate_FD * read, self.up_FD * read, self.down_FD * write)

    def strength(self, norm_D: Tensor) -> Tensor:
        """|gate| |up| |down| of each neuron, as seen by a normed input. shapes: -> [F]"""
        gate_F = (self.gate_FD * norm_D).norm(dim=1)
        up_F = (self.up_FD * norm_D).norm(dim=1)
        return gate_F * up_F * self.down_FD.norm(dim=1)


def join(parts: list[Neurons]) -> Neurons:
    """Neurons side by side: their maps add up."""
    return Neurons(
        torch.cat([part.gate_FD for part in parts]),
        torch.cat([part.up_FD for part in parts]),
        torch.cat([part.down_FD for part in parts]),
    )


def add(a: Neurons, b: Neurons) -> Neurons:
    """Weights added, neuron by neuron as they stand."""
    return Neurons(a.gate_FD + b.gate_FD, a.up_FD + b.up_FD, a.down_FD + b.down_FD)


def choose_heads(
    v_KHD: Tensor, o_NHD: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """The key/value heads whose query heads write most, and the strongest of those in each.

    A query head writes O V of what its key/value head reads; its strength is that map's norm.
    shapes: v of key/value heads, o transposed by query head -> query heads, key/value heads
    """
    per_group = len(o_NHD) // len(v_KHD)
    # |O V|^2 = <O' O, V V'>: two products of a head's size in place of one of the width's.
    written_NHH = o_NHD @ o_NHD.transpose(1, 2)
    read_KHH = v_KHD @ v_KHD.transpose(1, 2)
    strength_NHH = written_NHH * read_KHH.repeat_interleave(per_group, dim=0)
    strength_KG = strength_NHH.sum((1, 2)).view(len(v_KHD), per_group)
    kv_heads = strongest(strength_KG.sum(1), num_kv_heads)
    wanted = num_heads // num_kv_heads
    heads = [k * per_group + strongest(strength_KG[k], wanted) for k in kv_heads.tolist()]
    return torch.cat(heads), kv_heads


def group_experts(rows_ED: Tensor, num_groups: int) -> list[list[int]]:
    """Groups of experts that the router tells apart least, as equal in size as can be.

    Equal, because experts in training are kept equally busy. Greedy: the two most alike begin a
    group, then comes who is most like all of it.
    """
    num_experts = len(rows_ED)
    unit_ED = torch.nn.functional.normalize(rows_ED, dim=1)
    likeness_EE: list[list[float]] = (unit_ED @ unit_ED.T).tolist()
    left = list(range(num_experts))
    groups = []
    for g in range(num_groups):
        size = len(left) // (num_groups - g)
        group: list[int] = []
        if size > 1:
            a, b = max(combinations(left, 2), key=lambda two: likeness_EE[two[0]][two[1]])
            group = [a, b]
        while len(group) < size:
            others = [e for e in left if e not in group]
            group.append(max(others, key=lambda e: sum(likeness_EE[e][m] for m in group)))
        left = [e for e in left if e not in group]
        groups.append(sorted(group))
    return sorted(groups)
