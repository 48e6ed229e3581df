"""Let a student's layers follow a teacher's: a learned map between widths, a distance per token.

in: states of chosen layers of both; out: the sum over tokens of their distance
source: hidden-state matching as in FitNets (arXiv 1412.6550) and TinyBERT (arXiv 1909.10351); both
sides are brought to unit mean square, so that layers of any size of states weigh alike
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6


def spread_pairs(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Each of the student's layers with the teacher's at the same share of the depth."""
    return [(i, (i + 1) * num_teacher // num_student - 1) for i in range(num_student)]


class HiddenMatch(nn.Module):
    """The maps of one student; trained with it, and no part of it."""

    def __init__(
        self, pairs: Sequence[tuple[int, int]], student_width: int, teacher_width: int, seed: int
    ) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        generator = torch.Generator().manual_seed(seed)
        shape = (teacher_width, student_width)
        self.maps = nn.ParameterList(
            torch.randn(shape, generator=generator) * student_width**-0.5 for _ in self.pairs
        )

    @property
    def student_layers(self) -> set[int]:
        return {student for student, _ in self.pairs}

    @property
    def teacher_layers(self) -> set[int]:
        return {teacher for _, teacher in self.pairs}

    def forward(
        self, students: Mapping[int, Tensor], teachers: Mapping[int, Tensor], index_M: Tensor
    ) -> Tensor:
        """Sum over the tokens at `index_M` of the mean over layers of the squared distance.

        shapes: states by layer [B, T, D], index [M] into B * T -> fp32 scalar
        """
        total = torch.zeros((), device=index_M.device)
        for (student, teacher), map_OI in zip(self.pairs, self.maps, strict=True):
            mine_MI = students[student].flatten(0, 1)[index_M]
            theirs_MO = teachers[teacher].flatten(0, 1)[index_M].detach()
            mine_MO = F.linear(mine_MI, map_OI.to(mine_MI.dtype))
            apart_MO = _unit(mine_MO) - _unit(theirs_MO)
            total = total + apart_MO.square().mean(-1).sum()
        return total / len(self.pairs)


def _unit(x_MD: Tensor) -> Tensor:
    x_MD = x_MD.float()
    return x_MD * (x_MD.square().mean(-1, keepdim=True) + _EPS).rsqrt()
