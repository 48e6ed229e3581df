"""Held-out bits per byte: how many bits the model needs for a byte of text it never saw.

in: a model and batches in order; out: sum of -log2 p over all targets / bytes of those targets

Unlike a loss per token it compares models of different tokenizers, and with gzip. Ends of
documents cost bits and have no bytes; media placeholders are no targets. A balancing bias is not
used, so the figure is that of the exported model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from l4cli.errors import L4Error
from l4cli.ops.batch import Batch
from l4cli.ops.cross_entropy import token_losses


@dataclass(frozen=True)
class HeldOut:
    """What was measured over one folder of shards."""

    num_nats: float
    num_bytes: int
    num_targets: int

    @property
    def bits_per_byte(self) -> float:
        return self.num_nats / math.log(2) / self.num_bytes

    @property
    def loss(self) -> float:
        """Nats per target token, comparable with the training loss."""
        return self.num_nats / self.num_targets


@torch.no_grad()
def held_out(
    model: Any,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    between_batches: Callable[[], None] = lambda: None,
) -> HeldOut:
    """Read every batch once. `token_bytes` int32 [V]: bytes of each token, 0 for special ones.

    `between_batches` may raise to stop. raises: L4Error without a single byte of text
    """
    device = model.lm_head.weight.device
    bytes_of_V = torch.from_numpy(token_bytes.astype(np.int64)).to(device)
    num_nats, num_bytes, num_targets = 0.0, 0, 0
    for batch in batches:
        between_batches()
        batch = batch.to(device)
        is_target_M = batch.loss_weight.flatten() != 0
        labels_M = batch.labels.flatten()[is_target_M]
        h_MD = model.hidden(batch).flatten(0, 1)[is_target_M]
        losses_M = token_losses(h_MD, model.lm_head.weight, labels_M)
        num_nats += losses_M.double().sum().item()
        num_bytes += int(bytes_of_V[labels_M].sum())
        num_targets += len(labels_M)
    if num_bytes == 0:
        raise L4Error(
            "cannot measure bits per byte",
            why=f"the held-out shards have {num_targets} target tokens and no byte of text",
            fix="pass shards of ordinary text with `--eval-data`",
        )
    return HeldOut(num_nats, num_bytes, num_targets)
