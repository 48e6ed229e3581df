"""Read only the pages of a long past that can matter to a query: off unless asked for.

in: queries, sealed parts of the past, how many pages; out: attention over those pages, and the
share of exact attention's mass that they hold, measured on a sample of the queries
source: Quest (arXiv 2406.10774): a page's least and greatest key by channel bound its scores
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l4cli.inference.attention import attend_rows
from l4cli.inference.kept import PAGE, Part, Plain, load, num_tokens, page_tokens
from l4cli.ops.parts_attention import Summed, attention, merge

_MEASURED = 16  # of so many blocks of queries one is also attended exactly
_MOST_POSITIONS = 64  # that choose their pages together


@dataclass
class Recall:
    """How much of exact attention's mass the chosen pages held, over the queries measured."""

    total: float = 0.0
    least: float = 1.0
    num_queries: int = 0
    num_blocks: int = 0  # seen, measured or not

    @property
    def mean(self) -> float:
        """1 when nothing was left out."""
        return self.total / self.num_queries if self.num_queries else 1.0

    def add(self, share_KR: Tensor) -> None:
        self.total += float(share_KR.sum())
        self.least = min(self.least, float(share_KR.min()))
        self.num_queries += share_KR.numel()


class Pages:
    """The bounds of the pages of one layer's sealed parts, made when a part is first searched."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Part, Plain]] = {}

    def bounds(self, part: Part) -> Plain:
        """Least and greatest key of each page. shapes: -> low_KPH, high_KPH"""
        found = self.known.get(id(part))
        if found is None or found[0] is not part:
            whole = num_tokens(part) // PAGE * PAGE
            keys_KPSH = load(part, torch.float32)[0][:, :whole].unflatten(1, (-1, PAGE))
            low, high = keys_KPSH.aminmax(dim=2)
            found = self.known[id(part)] = (part, (low, high))
        return found[1]


def attend_pages(
    q_KRH: Tensor,
    sealed: Sequence[Part],
    newest: Sequence[Part],
    num_positions: int,
    topk: int,
    pages: Pages,
    recall: Recall,
    before: Summed | None = None,
) -> Summed:
    """Attend to the pages that promise most and to all that is newest; rows are position-major.

    Exact where `topk` pages are all there are. shapes: -> out_KRH fp32, log-sum-exp_KR fp32
    """
    num_pages = sum(num_tokens(part) // PAGE for part in sealed)
    if num_pages <= topk:
        return attend_rows(q_KRH, [*sealed, *newest], before)
    ends = [end for part in sealed if (end := _end(part)) is not None]
    rest = [*ends, *newest]
    positions = max(1, min(_MOST_POSITIONS, num_positions // 16))
    rows = positions * (q_KRH.shape[1] // num_positions)
    pieces = []
    for start in range(0, q_KRH.shape[1], rows):
        block = slice(start, start + rows)
        own = None if before is None else (before[0][:, block], before[1][:, block])
        base = attend_rows(q_KRH[:, block], rest, own) if rest else own
        found = _attend_chosen(q_KRH[:, block], sealed, topk, pages)
        joined = found if base is None else merge(base, found)
        if recall.num_blocks % _MEASURED == 0:
            exact = attend_rows(q_KRH[:, block], [*sealed, *newest], own)
            recall.add((joined[1] - exact[1]).exp().clamp(max=1))
        recall.num_blocks += 1
        pieces.append(joined)
    outs, sums = zip(*pieces, strict=True)
    return torch.cat(outs, 1), torch.cat(sums, 1)


def _attend_chosen(q_KRH: Tensor, sealed: Sequence[Part], topk: int, pages: Pages) -> Summed:
    """The best pages of each key head, gathered from where they lie."""
    bounds = [pages.bounds(part) for part in sealed]
    q = q_KRH.float()
    above, below = q.clamp(min=0), q.clamp(max=0)
    # The greatest score any key of a page could reach with any query of the block.
    scores_KP = torch.cat(
        [
            (above @ high.transpose(1, 2) + below @ low.transpose(1, 2)).amax(1)
            for low, high in bounds
        ],
        1,
    )
    chosen_Kk = scores_KP.topk(topk, dim=1).indices.sort(dim=1).values
    counts = torch.tensor([low.shape[1] for low, _ in bounds])
    firsts = counts.cumsum(0) - counts
    outs = []
    for head, chosen_k in enumerate(chosen_Kk.cpu()):
        owners = torch.searchsorted(firsts, chosen_k, right=True) - 1
        found = [
            page_tokens(sealed[i], head, chosen_k[owners == i] - firsts[i], q_KRH.dtype)
            for i in owners.unique().tolist()
        ]
        keys, values = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        outs.append(attention(q_KRH[None, head, None], keys[None, None], values[None, None]))
    out_KRH = torch.cat([out[0] for out, _ in outs]).float()
    return out_KRH, torch.cat([lse[0] for _, lse in outs])


def _end(part: Part) -> Plain | None:
    """What of a part fills no page."""
    rest = num_tokens(part) % PAGE
    if rest == 0:
        return None
    keys, values = load(part, torch.float32)
    return keys[:, -rest:], values[:, -rest:]
