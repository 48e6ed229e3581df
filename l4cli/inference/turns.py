"""Rotations by position, made for many positions at once: decoding needs one a step.

in: a config; out: turns complex64 [B, T, H / 2], or addresses of one position's
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l4cli.model.config import RopeOptions, TextConfig
from l4cli.ops.rope import attention_factor, inverse_frequencies, rotation

_BLOCK = 1024  # positions of a table
_MOST_TABLES = 64


@dataclass(frozen=True)
class _Rope:
    inverse: Tensor
    length: float


class Turns:
    """Rotations by position: of local layers, and of full ones where they differ."""

    def __init__(self, config: TextConfig) -> None:
        layers = [i for i in range(config.num_hidden_layers) if config.uses_rope(i)]
        kinds = [RopeOptions(config.rope_theta, config.rope_scaling, config.use_qk_norm)]
        kinds += [r for r in map(config.rope_of, layers) if r != kinds[0]][:1]
        self.ropes = []
        for rope in kinds:
            inverse = inverse_frequencies(config.head_dim, rope.theta, rope.scaling)
            length = 1.0 if rope.use_qk_norm else attention_factor(rope.scaling)
            self.ropes.append(_Rope(inverse, length))
        self.tables: dict[int, list[Tensor]] = {}

    def of(self, positions_BT: Tensor) -> list[Tensor]:
        """shapes: -> complex64 [B, T, H / 2], one or two of them"""
        return [rotation(positions_BT, rope.inverse, rope.length) for rope in self.ropes]

    def at(self, position: int) -> tuple[list[Tensor], tuple[int, int]]:
        """One position's, and their addresses. Tables are made for many positions at once."""
        block, offset = divmod(position, _BLOCK)
        tables = self.tables.get(block)
        if tables is None:
            if len(self.tables) >= _MOST_TABLES:
                self.tables.clear()
            first = block * _BLOCK
            tables = [t[0] for t in self.of(torch.arange(first, first + _BLOCK)[None])]
            self.tables[block] = tables
        row_bytes = tables[0].shape[1] * 8
        addresses = [table.data_ptr() + offset * row_bytes for table in tables]
        return tables, (addresses[0], addresses[-1])
