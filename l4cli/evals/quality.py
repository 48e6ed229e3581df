"""What a model lost by being quantized: its predictions on held-out text beside the original's.

in: two checkpoints of one shape and rows of text; out: bits per byte, KL divergence, agreement
Both go through the text layer by layer, so that one layer of each is in memory at a time, and
logits exist for a few tokens at a time. The original is computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.inference.text_walk import Piece, TextWalk
from l4cli.ops.batch import Batch

_LOGITS = 1 << 24  # of one model at once


@dataclass(frozen=True)
class Quality:
    """Means are over target tokens; bits per byte are None where no target has bytes."""

    num_tokens: int
    num_bytes: int
    loss: float  # nats per token
    original_loss: float
    bits_per_byte: float | None
    original_bits_per_byte: float | None
    kl_mean: float  # nats, of the original's predictions against the quantized model's
    kl_99: float  # 99 of 100 tokens are below
    top1_agreement: float  # of the likeliest tokens
    router_agreement: float | None  # of experts chosen, over all layers; None without experts

    @property
    def relative_loss(self) -> float:
        """How much more bits the quantized model needs, over what the original needs."""
        return self.loss / self.original_loss - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "relative_loss": self.relative_loss}


class _Choices:
    """The experts a layer chose, of one pass over the text."""

    def __init__(self) -> None:
        self.expert_MA: list[Tensor] = []

    def bias(self, layer_idx: int) -> None:
        """The choice is not steered."""

    def record(self, layer_idx: int, logits_BTE: Tensor, expert_BTA: Tensor) -> None:
        """Keep the choices, piece by piece."""
        self.expert_MA.append(expert_BTA.flatten(0, 1))


@torch.no_grad()
def compare(
    original: Path,
    quantized: Path,
    batches: Sequence[Batch],
    token_bytes: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    states: tuple[str | Path, str | Path] = ("memory", "memory"),
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Read the text with both. `token_bytes` int32 [V]: bytes of each token, 0 for special ones.

    raises: L4Error without a single target, or for numbers that are not finite
    """
    with (
        TextWalk(original, batches, device=device, dtype=torch.float32, states=states[0]) as ours,
        TextWalk(quantized, batches, device=device, dtype=torch.float32, states=states[1]) as other,
    ):
        num_same = num_chosen = 0
        for i in range(ours.num_layers):
            same, chosen = _pass_both(ours, other, i)
            num_same, num_chosen = num_same + same, num_chosen + chosen
            on_layer(i + 1, ours.num_layers)
        tally = _Tally(token_bytes)
        for (piece, h_MD), (_, other_MD) in zip(ours.normed(), other.normed(), strict=True):
            for rows in _few(piece, ours.model.lm_head.weight.shape[0]):
                labels_M = piece.batch.labels.flatten()[rows]
                tally.add(_logp(ours, h_MD[rows]), _logp(other, other_MD[rows]), labels_M)
    return tally.quality(num_same / num_chosen if num_chosen else None)


def _pass_both(ours: TextWalk, other: TextWalk, layer_idx: int) -> tuple[int, int]:
    """Take both through a layer; of how many choices of experts how many were the same."""
    found = _Choices(), _Choices()
    ours.pass_layer(layer_idx, found[0])
    other.pass_layer(layer_idx, found[1])
    if not found[0].expert_MA:
        return 0, 0
    is_real_M = ours.is_real_M.to(ours.device)
    ours_MA, other_MA = (torch.cat(each.expert_MA)[is_real_M] for each in found)
    is_same_MA = (ours_MA.unsqueeze(-1) == other_MA.unsqueeze(-2)).any(dim=-1)
    return int(is_same_MA.sum()), is_same_MA.numel()


def _logp(walk: TextWalk, h_MD: Tensor) -> Tensor:
    return walk.model.lm_head(h_MD).float().log_softmax(-1)


def _few(piece: Piece, vocab_size: int) -> Sequence[Tensor]:
    """The targets of a piece, as many at a time as their logits may take memory."""
    places = (piece.batch.loss_weight.flatten() != 0).nonzero().flatten()
    return places.split(max(1, _LOGITS // vocab_size)) if len(places) else ()


class _Tally:
    """Sums over the targets seen so far; of each one its divergence."""

    def __init__(self, token_bytes: np.ndarray) -> None:
        self._bytes_V = torch.from_numpy(token_bytes.astype(np.int64))
        self._nats = [0.0, 0.0]  # the original's, the other's
        self._num_bytes = self._num_same = 0
        self._kl: list[Tensor] = []

    def add(self, ours_MV: Tensor, other_MV: Tensor, labels_M: Tensor) -> None:
        """Count log-probabilities of the original and of the other."""
        for i, logp_MV in enumerate((ours_MV, other_MV)):
            picked = logp_MV.gather(1, labels_M.to(logp_MV.device).unsqueeze(1))
            self._nats[i] -= float(picked.sum(dtype=torch.float64))
        self._num_bytes += int(self._bytes_V[labels_M].sum())
        self._num_same += int((ours_MV.argmax(-1) == other_MV.argmax(-1)).sum())
        kl_M = (ours_MV.exp() * (ours_MV - other_MV)).sum(-1, dtype=torch.float64)
        self._kl.append(kl_M.clamp(min=0).cpu())

    def quality(self, router_agreement: float | None) -> Quality:
        """raises: L4Error without targets, or for numbers that are not finite"""
        what = "cannot compare the models on the held-out text"
        if not self._kl:
            fix = "bring text of more than one token"
            raise L4Error(what, why="it has no token to predict", fix=fix)
        kl_M = torch.cat(self._kl)
        if not math.isfinite(float(kl_M.sum())) or not math.isfinite(sum(self._nats)):
            fix = "check the weights: `l4 info --verify`"
            raise L4Error(what, why="a prediction is not a finite number", fix=fix)
        count, num_bytes = len(kl_M), self._num_bytes
        bits = [nats / math.log(2) / num_bytes if num_bytes else None for nats in self._nats]
        return Quality(
            num_tokens=count,
            num_bytes=num_bytes,
            loss=self._nats[1] / count,
            original_loss=self._nats[0] / count,
            bits_per_byte=bits[1],
            original_bits_per_byte=bits[0],
            kl_mean=float(kl_M.mean()),
            kl_99=float(kl_M.sort().values[math.ceil(0.99 * count) - 1]),
            top1_agreement=self._num_same / count,
            router_agreement=router_agreement,
        )
