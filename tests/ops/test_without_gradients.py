"""Where no gradient is wanted the operations skip autograd, and give the very same numbers."""

from __future__ import annotations

import pytest
import torch

from l4cli.ops.moe import reference_routed_experts, routed_experts
from l4cli.ops.norm import rms_norm
from l4cli.ops.rope import inverse_frequencies, rotate_unit, rotation
from l4cli.ops.swiglu import swiglu


def experts(num_tokens: int, top_k: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 16, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in x])
    gates = torch.rand(num_tokens, top_k, generator=generator)
    w_in = torch.randn(4, 16, 24, generator=generator)
    w_out = torch.randn(4, 12, 16, generator=generator)
    return x, gates, chosen, w_in, w_out


@pytest.mark.parametrize("name", ["rms_norm", "rotate_unit", "swiglu", "routed_experts"])
def test_same_numbers(name):
    x = torch.randn(2, 5, 4, 8)
    turn = rotation(torch.arange(5)[None].expand(2, 5), inverse_frequencies(8, 1e4, None))
    run = {
        "rms_norm": lambda: rms_norm(
            x, torch.rand(8, generator=torch.Generator().manual_seed(1)), 1e-5
        ),
        "rotate_unit": lambda: rotate_unit(x, turn, 1e-5),
        "swiglu": lambda: swiglu(x, x.flip(-1)),
        "routed_experts": lambda: routed_experts(*experts(7, 2)),
    }[name]
    with_gradients = run()
    with torch.no_grad():
        assert torch.equal(run(), with_gradients)
    with torch.inference_mode():
        assert torch.equal(run(), with_gradients)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_token_needs_no_sorting(top_k):
    arguments = experts(1, top_k)
    with torch.inference_mode():
        torch.testing.assert_close(routed_experts(*arguments), reference_routed_experts(*arguments))
