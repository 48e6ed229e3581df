"""Experts in fp8: the emulation against plain products, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.ops.fp8 import fp8_routed_experts, rounded_blocks, rounded_rows
from l4cli.ops.moe import reference_routed_experts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_by_hand() -> None:
    """The largest of 128 becomes 448; 1/448 of it is one; a third of a step goes to the nearest."""
    x = torch.zeros(1, 128)
    x[0, :4] = torch.tensor([896.0, 2.0, 2.1, -33.0])  # scale 2: codes 448, 1, 1.05, -16.5
    assert rounded_rows(x)[0, :4].tolist() == [896.0, 2.0, 2.0, -32.0]
    assert not rounded_rows(torch.zeros(2, 256)).any()


def test_every_block_has_its_own_scale() -> None:
    """Values a million times apart lose the same three bits each."""
    x = normal(256, 256)
    x[:128, :128] *= 1e6
    x[128:, 128:] *= 1e-6
    for rounded in (rounded_rows(x), rounded_blocks(x)):
        for i in (slice(0, 128), slice(128, 256)):
            for j in (slice(0, 128), slice(128, 256)):
                error = (rounded[i, j] - x[i, j]).norm() / x[i, j].norm()
                assert 0.01 < error < 0.04  # uniform in half a step of 1/8 to 1/16


@pytest.mark.parametrize("top_k", [1, 2])
def test_values_and_gradients_are_near_the_exact_ones(top_k: int) -> None:
    """Some percent, as three bits of mantissa leave; the weights' gradients have a factor less."""
    scores = normal(40, 3, seed=5)
    scores[:, 1] = -9
    gate, chosen = scores.topk(top_k)
    w_in, w_out = normal(3, 128, 256, seed=2) / 11, normal(3, 128, 128, seed=3) / 11
    leaves = [normal(40, 128), gate.sigmoid(), w_in, w_out]

    def grads(run) -> list[Tensor]:
        x, g, a, b = (leaf.clone().requires_grad_() for leaf in leaves)
        y = run(x, g, chosen, a, b)
        y.backward(normal(*y.shape, seed=9))
        return [y.detach(), x.grad, g.grad, a.grad, b.grad]

    pairs = zip(grads(fp8_routed_experts), grads(reference_routed_experts), strict=True)
    for got, want in pairs:
        assert got.isfinite().all()
        assert 1e-3 < (got - want).norm() / want.norm() < 0.08


def test_widths_that_128_does_not_divide_are_refused() -> None:
    chosen = torch.zeros(2, 1, dtype=torch.long)
    arguments = normal(2, 96), torch.ones(2, 1), chosen, normal(1, 96, 128), normal(1, 64, 96)
    with pytest.raises(L4Error, match="96 and 64 are not both multiples of 128"):
        fp8_routed_experts(*arguments)
