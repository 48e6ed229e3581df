"""Packed words, bit for bit those of compressed-tensors."""

from __future__ import annotations

import pytest
import torch

from l4cli.quantization.packing import pack_codes, unpack_codes


def random_codes(shape: tuple[int, int], bits: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-half, half, shape, generator=generator).to(torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 64), (2, 40), (7, 9), (1, 1), (33, 4), (64, 1), (1, 64)])
@pytest.mark.parametrize("dim", [0, 1])
def test_words_are_those_of_compressed_tensors(bits: int, shape: tuple[int, int], dim: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(shape, bits)
    words = pack_codes(codes, bits, dim)
    assert torch.equal(words, helpers.pack_to_int32(codes, bits, packed_dim=dim))
    assert words.is_contiguous()
    back = unpack_codes(words, bits, shape[dim], dim)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


def test_words_by_hand() -> None:
    """Codes -8..7 are nibbles 0..15, the first code in the lowest bits."""
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 7, 0]], dtype=torch.int8)
    words = [w & 0xFFFFFFFF for w in pack_codes(codes, 4)[0].tolist()]
    assert words == [0x76543210, 0x8F]
    assert [w & 0xFFFFFFFF for w in pack_codes(codes[:, :3], 8)[0].tolist()] == [0x7A7978]
