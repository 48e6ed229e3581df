"""How int4 weights of experts lie in memory for the kernel that decodes with them.

in: codes, scales and zero points as checkpoints have them; out: `PackedInt4`, and back
Layout of a packed weight (linear map [O, I], groups of G inputs, tiles of 64 outputs):
  codes  uint8 [E, ceil(O / 64), I / G, 64, G / 2]  what a block reads is one contiguous stream
  scale  fp16/bf16/fp32 [E, ceil(O / 64), I / G, 64]
  zero   uint8, as scale, or None                   0..15; symmetric codes have their zero at 8
Byte j of a group holds input j in its low four bits and input j + G / 2 in its high four: both
halves meet a contiguous half of the activations and share the scale. Stored codes are 0..15.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUTPUTS = 64  # of a tile: what one warpgroup multiplies at least
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class PackedInt4:
    """Every expert's weight [O, I] as the module says."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    num_outputs: int

    @property
    def group_size(self) -> int:
        return 2 * self.codes.shape[-1]

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[2] * self.group_size


def pack(codes_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor | None = None) -> PackedInt4:
    """Lay codes out for the kernel.

    shapes: codes int8 -8..7 [E, O, I], scale [E, O, I / G], zero int8 -8..7 as scale
    """
    num_experts, num_outputs, num_inputs = codes_EOI.shape
    num_groups = scale_EOG.shape[-1]
    group = num_inputs // num_groups
    assert group in GROUP_SIZES, group
    assert group * num_groups == num_inputs, (codes_EOI.shape, scale_EOG.shape)
    padding = -num_outputs % OUTPUTS
    shifted = torch.nn.functional.pad((codes_EOI + 8).to(torch.uint8), (0, 0, 0, padding))
    tiled = shifted.view(num_experts, -1, OUTPUTS, num_groups, group).transpose(2, 3)
    low, high = tiled.chunk(2, dim=-1)

    def by_tile(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, padding))
        return padded.view(num_experts, -1, OUTPUTS, num_groups).transpose(2, 3).contiguous()

    zero = None if zero_EOG is None else by_tile((zero_EOG + 8).to(torch.uint8))
    return PackedInt4((low | high << 4).contiguous(), by_tile(scale_EOG), zero, num_outputs)


def unpack(packed: PackedInt4) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `pack` was given."""
    codes = torch.cat([packed.codes & 15, packed.codes >> 4], dim=-1).to(torch.int8) - 8
    num_outputs = packed.num_outputs

    def by_output(x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(1, 2)[:, :num_outputs]

    zero = None if packed.zero is None else by_output(packed.zero).to(torch.int8) - 8
    codes_EOI = codes.transpose(2, 3).flatten(3).flatten(1, 2)[:, :num_outputs]
    return codes_EOI, by_output(packed.scale), zero
