"""Int4 experts: the layout, and the plain version against plain experts."""

from __future__ import annotations

import pytest
import torch

from l4cli.ops.int4_experts import dequantized, int4_experts, pack
from l4cli.ops.moe import reference_routed_experts
from src_kernels.cuda.int4_layout import unpack


def test_the_layout_by_hand() -> None:
    """Output 65's inputs 1 and 17 share the second byte of its group's second half."""
    codes = torch.zeros(1, 70, 64, dtype=torch.int8)
    codes[0, 65, 32 + 1], codes[0, 65, 32 + 17] = -8, 7
    scale = torch.arange(140.0).view(1, 70, 2)
    packed = pack(codes, scale)
    assert packed.codes.shape == (1, 2, 2, 64, 16)
    assert packed.codes[0, 1, 1, 1, 1] == 0 | 15 << 4
    assert packed.codes[0, 1, 1, 1, 0] == 8 | 8 << 4
    assert packed.scale[0, 1, 1, 1] == scale[0, 65, 1]
    assert (packed.num_inputs, packed.num_outputs, packed.group_size) == (64, 70, 32)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("has_zero", [False, True])
def test_unpacking_gives_back_what_was_packed(group: int, has_zero: bool) -> None:
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(-8, 8, (3, 100, 256), generator=generator).to(torch.int8)
    scale = torch.rand(3, 100, 256 // group, generator=generator)
    zero = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8)
    got = unpack(pack(codes, scale, zero if has_zero else None))
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], scale)
    assert torch.equal(got[2], zero) if has_zero else got[2] is None


def test_the_weights_by_hand() -> None:
    """(code - zero) * scale, turned: (3 - -2) * 0.5 from input 33 to output 1."""
    codes = torch.zeros(1, 2, 64, dtype=torch.int8)
    codes[0, 1, 33] = 3
    zero = torch.tensor([[[0, 0], [0, -2]]], dtype=torch.int8)
    weight = dequantized(pack(codes, torch.full((1, 2, 2), 0.5), zero), torch.float32)
    assert weight.shape == (1, 64, 2)
    assert weight[0, 33, 1] == 2.5
    assert weight[0, 34, 1] == 1.0
    assert weight[0, 33, 0] == 0


def test_the_door_on_this_machine() -> None:
    generator = torch.Generator().manual_seed(0)

    def made(outputs: int, inputs: int):
        codes = torch.randint(-8, 8, (3, outputs, inputs), generator=generator).to(torch.int8)
        return pack(codes, 0.05 * torch.rand(3, outputs, inputs // 32, generator=generator))

    w_in, w_out, x = made(64, 64), made(64, 32), torch.randn(4, 64, generator=generator)
    chosen, gate = torch.tensor([[0], [2], [2], [0]]), torch.rand(4, 1, generator=generator)
    plain = [dequantized(w, torch.float32) for w in (w_in, w_out)]
    want = reference_routed_experts(x, gate, chosen, *plain)
    torch.testing.assert_close(int4_experts(x, gate, chosen, w_in, w_out), want)
