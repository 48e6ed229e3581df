"""What a quantized weight is: codes, scales, zero points, and the values they stand for.

in: a format's name and sizes; out: `WeightFormat`, `QuantizedWeight`
source: compressed-tensors' `pack-quantized` (int4, int8) and `float-quantized` (fp8) schemes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("int4", "int8", "fp8")
_BITS = {"int4": 4, "int8": 8, "fp8": 8}


@dataclass(frozen=True)
class WeightFormat:
    """How the weight of a linear map [O, I] is stored.

    int4: groups of `group_size` inputs share a scale, and a zero point unless `symmetric`.
    int8: one scale an output, or groups as int4.  fp8 (e4m3): one scale an output, or a `block`.
    """

    name: str
    group_size: int | None = None  # inputs that share a scale; None: all of an output's
    symmetric: bool = True
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale

    def __post_init__(self) -> None:
        assert self.name in FORMATS
        assert self.block is None or (self.name == "fp8" and self.group_size is None)
        assert self.symmetric or self.name == "int4"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _BITS[self.name]

    def bits_per_weight(self, num_inputs: int, scale_bits: int = 16) -> float:
        """Everything stored for one weight of a row of `num_inputs`."""
        if self.block is not None:
            return self.bits + scale_bits / (self.block[0] * self.block[1])
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (scale_bits + zero_bits) / (self.group_size or num_inputs)

    def __str__(self) -> str:
        if self.block is not None:
            return f"{self.name} {self.block[0]}x{self.block[1]}"
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.name}{group}{'' if self.symmetric else ' zp'}"


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, I] in codes.

    shapes: codes [O, I] int8 (int4: -8..7; int8: -128..127) or float8_e4m3fn;
    scale [O, I / G], [O, 1] or [O / block, I / block] (rounded up), floating;
    zero as scale, int8 in -8..7, or None
    """

    format: WeightFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(code - zero) * scale, in fp32, then as `dtype`. shapes: -> [O, I]"""
        num_outputs, num_inputs = self.shape
        codes, scale = self.codes.float(), self.scale.float()
        if self.format.block is not None:
            rows, columns = self.format.block
            scale = scale.repeat_interleave(rows, 0)[:num_outputs]
            scale = scale.repeat_interleave(columns, 1)[:, :num_inputs]
            return (codes * scale).to(dtype)
        groups = codes.unflatten(1, (scale.shape[1], -1))
        if self.zero is not None:
            groups = groups - self.zero.float().unsqueeze(-1)
        return (groups * scale.unsqueeze(-1)).flatten(1).to(dtype)
