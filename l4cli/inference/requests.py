"""What is asked of an engine and what it tells: a request, its events, the experts chosen.

in: ids, tiles, options; out: plain data. No model here
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from l4cli.inference.cache import Cache
from l4cli.inference.sampler import SamplingOptions

Finish = Literal["stop", "length", "context"]


@dataclass
class Request:
    """What to continue. A given cache is used up: fork it to keep it."""

    tokens: Any  # ids of the prompt; with a cache, what comes after it (may then be empty)
    pixel_values: Tensor | None = None  # [tiles, 3, S, S], for the placeholders in `tokens`
    max_new_tokens: int = 256
    stop_ids: Sequence[int] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    cache: Cache | None = None
    wants_experts: bool = False


@dataclass(frozen=True)
class Event:
    """One new token of one request; a stop token is reported as well."""

    request: int  # index in the list given to `generate`
    token: int
    logprob: float  # under the model itself, before penalty, temperature and filters
    finish: Finish | None = None  # why this was the request's last token
    experts: Tensor | None = None  # [positions read since the last event, MoE layers, A]


class RoutingRecord:
    """Notes which experts were chosen; steers nothing."""

    def __init__(self) -> None:
        self.chosen: dict[int, list[Tensor]] = {}

    def bias(self, layer_idx: int) -> Tensor | None:
        """No bias: what is asked here is the model as it is."""
        return None

    def record(self, layer_idx: int, logits_BTE: Tensor, expert_BTA: Tensor) -> None:
        """Note one layer's choices."""
        self.chosen.setdefault(layer_idx, []).append(expert_BTA)

    def take(self) -> Tensor:
        """Hand over what was noted since the last call. shapes: -> [B, T, MoE layers, A]"""
        layers = [torch.cat(parts, 1) for _, parts in sorted(self.chosen.items())]
        self.chosen = {}
        return torch.stack(layers, 2) if layers else torch.empty(1, 0, 0, 0, dtype=torch.int64)
