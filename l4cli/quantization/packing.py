"""Pack codes of 4 or 8 bits into 32-bit words, and back.

in: int8 codes; out: int32 words of each code plus half its range, the first in the lowest bits
source: compressed-tensors' pack_to_int32 (0.20)
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack along a dimension; the last word of a row is filled with zero bits.

    shapes: [O, I] -> [O, ceil(I * bits / 32)], or for dim 0 [O, G] -> [ceil(O * bits / 32), G]
    """
    assert bits in (4, 8)
    if dim == 0:
        return pack_codes(codes.T, bits).T.contiguous()
    per_word = 32 // bits
    raised = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    raised = torch.nn.functional.pad(raised, (0, -codes.shape[1] % per_word))
    if bits == 4:
        raised = raised[:, 0::2] | raised[:, 1::2] << 4
    # Flat first: a transposed row counts as contiguous with strides that `view` refuses.
    return raised.reshape(-1).view(torch.int32).view(len(codes), -1)


def unpack_codes(words: Tensor, bits: int, size: int, dim: int = 1) -> Tensor:
    """Undo `pack_codes`; `size` is how many codes there are along the dimension."""
    assert bits in (4, 8)
    if dim == 0:
        return unpack_codes(words.T, bits, size).T.contiguous()
    raised = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    if bits == 4:
        raised = torch.stack((raised & 15, raised >> 4), dim=-1).flatten(1)
    # A code's byte less half the range, modulo 256, is its two's complement.
    return (raised[:, :size] - (1 << (bits - 1))).view(torch.int8)
