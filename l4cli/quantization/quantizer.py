"""The seam between a checkpoint's layers and a way to quantize them.

in: the linear maps of one layer and the format chosen for each; out: their codes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from l4cli.quantization.formats import QuantizedWeight, WeightFormat
from l4cli.quantization.rounding import round_weight


class Quantizer(Protocol):
    """What `quantize_checkpoint` calls, layer by layer, first to last.

    Names are module names of the exchange format, as `model.layers.0.self_attn.q_proj` or
    `language_model.model.layers.3.feed_forward.experts.7.gate_proj`: experts are unfused and every
    weight is [O, I] as in nn.Linear.
    """

    def quantize_layer(
        self,
        layer_idx: int | None,
        weights: Mapping[str, Tensor],
        choices: Mapping[str, WeightFormat],
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield each name of `choices` once, in any order; it is written and forgotten at once.

        `weights` has every linear map of the layer, also those that stay as they are; a value is
        read from its file, as stored, at each access, so hold one at a time (`weights` is valid
        during this call only). `layer_idx` None: the maps outside the decoder (head, vision),
        after the last layer. A result has the format that `choices` gives and the scale in bf16.
        """
        ...


@dataclass(frozen=True)
class RoundingQuantizer:
    """Rounds each weight by itself, with plain or searched scales; needs no data."""

    searches: bool = False
    device: torch.device | str = "cpu"  # to compute on

    def quantize_layer(
        self,
        layer_idx: int | None,
        weights: Mapping[str, Tensor],
        choices: Mapping[str, WeightFormat],
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        """See `Quantizer`."""
        for name, format in choices.items():
            weight = weights[name].to(self.device)
            yield name, round_weight(weight, format, searches=self.searches)
