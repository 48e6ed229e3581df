"""A few tokens of a teacher's distribution that stand for all of it.

in: the teacher's states at the targets; out: the label, the likeliest others, draws of the rest
source: random sampling of a teacher's tokens (arXiv 2503.16870), here of the tail alone, and by
systematic sampling (Madow 1949): m points at equal distances on the cumulative sum, one random
shift for all. A token of probability p is hit m p / r times on average, exactly, r the tail's mass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.ops.cross_entropy import CHUNK_ELEMENTS


@dataclass(frozen=True)
class Entries:
    """What is kept of each token; a column that is not used has id 0 and probability or count 0.

    The first `num_exact` columns have probabilities, the others counts of draws from the rest.
    """

    ids_MK: Tensor  # int64: the label, the likeliest others, then the drawn ones in id order
    probabilities_MX: Tensor  # float32, of the first X = num_exact columns
    counts_MN: Tensor  # int64, of the other N = K - X columns; a row adds up to the draws
    entropy_M: Tensor  # float32, nats, of the whole distribution

    def to(self, device: torch.device | str) -> Entries:
        """Move the tensors."""
        parts = (self.ids_MK, self.probabilities_MX, self.counts_MN, self.entropy_M)
        return Entries(*(part.to(device) for part in parts))


@torch.no_grad()
def sparse_targets(
    h_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    *,
    num_exact: int,
    num_drawn: int,
    temperature: float,
    uniforms_M: Tensor,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Entries:
    """Keep `num_exact` tokens as they are and draw `num_drawn` of the rest, for each target.

    `uniforms_M` float64 in [0, 1) shift the draws. Of the head only the first `vocab_size` rows
    count. shapes: h [M, D], weight [V, D], labels [M]. raises: L4Error for logits not finite
    """
    assert num_exact >= 1
    assert num_drawn >= 0
    assert temperature > 0
    cast_VD = weight_VD[:vocab_size].to(h_MD.dtype)
    # The cumulative sums are as wide as two buffers of logits.
    chunk = chunk or max(1, CHUNK_ELEMENTS // (2 * len(cast_VD)))
    parts = []
    for start in range(0, len(h_MD), chunk):
        rows = slice(start, start + chunk)
        logits_MV = (h_MD[rows] @ cast_VD.T).float()
        if temperature != 1:
            logits_MV /= temperature
        entropy_M = _softmax_in_place(logits_MV)
        ids_MX, probabilities_MX = _take_exact(logits_MV, labels_M[rows], num_exact)
        ids_MN, counts_MN = _draw(logits_MV, num_drawn, uniforms_M[rows].double())
        ids_MK = torch.cat([ids_MX, ids_MN], dim=1)
        parts.append((ids_MK, probabilities_MX, counts_MN, entropy_M))
    if not parts:
        ids_MK = labels_M.new_zeros(0, num_exact + num_drawn)
        none_MX = h_MD.new_zeros(0, num_exact, dtype=torch.float32)
        return Entries(ids_MK, none_MX, ids_MK[:, num_exact:], none_MX.sum(-1))
    return Entries(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _softmax_in_place(logits_MV: Tensor) -> Tensor:
    """Make logits probabilities; the entropy of each row in nats."""
    low_M, high_M = logits_MV.aminmax(dim=-1)
    if not bool((low_M.isfinite() & high_M.isfinite()).all()):
        raise L4Error(
            "the teacher's logits are not finite",
            why="there are NaN or infinite values among them",
            fix="compute with `--dtype fp32`, or name another checkpoint as the teacher",
        )
    logits_MV -= high_M.unsqueeze(-1)
    weights_MV = logits_MV.exp()
    sum_M = weights_MV.sum(-1)
    # log Z minus the mean of the logits, both counted from the largest one.
    entropy_M = sum_M.log() - torch.linalg.vecdot(weights_MV, logits_MV) / sum_M
    torch.div(weights_MV, sum_M.unsqueeze(-1), out=logits_MV)
    return entropy_M.clamp_(min=0)


def _take_exact(p_MV: Tensor, labels_M: Tensor, num_exact: int) -> tuple[Tensor, Tensor]:
    """The label and the likeliest others with their probabilities; the tail is left in `p_MV`."""
    label_M1 = labels_M.unsqueeze(-1)
    ids_MX = labels_M.new_zeros(len(p_MV), num_exact)
    probabilities_MX = p_MV.new_zeros(len(p_MV), num_exact)
    ids_MX[:, :1], probabilities_MX[:, :1] = label_M1, p_MV.gather(-1, label_M1)
    p_MV.scatter_(-1, label_M1, -1.0)  # less than any other
    num_others = min(num_exact - 1, p_MV.shape[1] - 1)
    top = p_MV.topk(num_others, dim=-1)
    ids_MX[:, 1 : num_others + 1] = top.indices
    probabilities_MX[:, 1 : num_others + 1] = top.values
    p_MV.scatter_(-1, label_M1, 0.0)
    p_MV.scatter_(-1, top.indices, 0.0)
    return ids_MX, probabilities_MX


def _draw(tail_MV: Tensor, num_drawn: int, uniforms_M: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic draws from what is not zero: different ids in order, how often each was hit."""
    shape = (len(tail_MV), num_drawn)
    ids_MN = torch.zeros(shape, dtype=torch.int64, device=tail_MV.device)
    counts_MN = torch.zeros_like(ids_MN)
    if num_drawn == 0:
        return ids_MN, counts_MN
    # In fp32 the sum over a large vocabulary would lose the small ones.
    sums_MV = tail_MV.cumsum(-1, dtype=torch.float64)
    mass_M1 = sums_MV[:, -1:].contiguous()
    steps_N = torch.arange(num_drawn, dtype=torch.float64, device=tail_MV.device)
    points_MN = (uniforms_M.unsqueeze(-1) + steps_N) * (mass_M1 / num_drawn)
    # The first sum above the point is that of a token which added something to it; a point that
    # rounding put at the end belongs to the last such token, whose sum is the first to be whole.
    hit_MN = torch.searchsorted(sums_MV, points_MN, right=True)
    hit_MN = hit_MN.minimum(torch.searchsorted(sums_MV, mass_M1))
    is_new_MN = torch.ones_like(hit_MN)
    is_new_MN[:, 1:] = hit_MN[:, 1:] != hit_MN[:, :-1]
    column_MN = is_new_MN.cumsum(-1) - 1
    has_tail_M1 = mass_M1 > 0
    ids_MN.scatter_(-1, column_MN, hit_MN * has_tail_M1)
    counts_MN.scatter_add_(-1, column_MN, has_tail_M1.expand(shape).to(torch.int64))
    return ids_MN, counts_MN
