"""Run through `test_triton_fp8.py`: fp8 experts in the interpreter against the emulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_harness import repair_interpreter

repair_interpreter()

from l4cli.ops.fp8 import (  # noqa: E402
    reference_fp8_routed_experts,
    rounded_blocks,
    rounded_rows,
)
from l4cli.ops.moe import reference_routed_experts  # noqa: E402
from l4cli.ops.triton_fp8 import routed_experts  # noqa: E402
from src_kernels.cuda import fp8  # noqa: E402
from src_kernels.cuda.grouping import Groups  # noqa: E402


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of them all zeros."""
    x = normal(*shape, seed=seed) * torch.logspace(-6, 3, shape[-2]).unsqueeze(-1)
    x[..., 0, :] = 0
    return x


def values_and_gradients(run, inputs: list[Tensor], **more: object) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = run(*leaves, **more)
    (out.double() * normal(*out.shape, seed=9)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def problem(tokens: int, experts: int, top_k: int, dim: int, width: int) -> list[Tensor]:
    scores = normal(tokens, experts, seed=5)
    scores[:, 1] = -9.0
    gate, chosen = scores.topk(top_k, dim=-1)
    w_in = dim**-0.5 * normal(experts, dim, 2 * width, seed=2)
    return [normal(tokens, dim), gate.sigmoid(), chosen, w_in, 0.1 * normal(experts, width, dim)]


@pytest.mark.parametrize("rows", [1, 21])
def test_codes_of_rows(rows: int) -> None:
    x = spread(rows, 256)
    codes, scale = fp8.quantize_rows(x)
    restored = codes.float() * scale.repeat_interleave(128, -1)
    assert torch.equal(restored, rounded_rows(x))
    largest = x.unflatten(-1, (-1, 128)).abs().amax(-1)
    torch.testing.assert_close(scale * 448, largest.clamp(min=1e-30))


def test_codes_of_blocks() -> None:
    w = spread(2, 128, 256)
    codes, turned, scale = fp8.quantize_blocks(w)
    restored = codes.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert torch.equal(restored, torch.stack([rounded_blocks(part) for part in w]))
    assert torch.equal(turned.float(), codes.float().transpose(1, 2))


def test_a_product_is_its_codes_product() -> None:
    """Against fp64 over the very same codes: only fp32 sums differ. Experts 0 and 2 are empty."""
    chosen = torch.tensor([[1], [3], [3], [1], [3]])
    groups = Groups.from_choices(chosen, 4)
    x, w = spread(5, 256, seed=1), spread(4, 256, 128, seed=2)
    _, turned, scale = fp8.quantize_blocks(w)
    got = fp8.product(
        fp8.quantize_rows(x), turned, scale, groups, torch.float32,
        gathers=True, scatters=True, turned_scale=True, block_m=16,
    )  # fmt: skip
    pairs = zip(rounded_rows(x).double(), chosen[:, 0], strict=True)
    want = torch.stack([row @ rounded_blocks(w[expert]).double() for row, expert in pairs])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 2, 128, 128), (21, 3, 1, 256, 128)], ids=str)
def test_fp32_is_the_emulation(shape: tuple[int, ...]) -> None:
    """A sum in another order flips a rounding now and then: rarely enough to see nothing of it."""
    inputs = problem(*shape)
    ours = values_and_gradients(routed_experts, inputs, block_m=16)
    wanted = values_and_gradients(reference_fp8_routed_experts, inputs)
    for got, want in zip(ours, wanted, strict=True):
        assert got.dtype == want.dtype
        assert float((got - want).norm()) <= 2e-3 * float(want.norm())


def test_bf16_loses_no_more_than_the_emulation() -> None:
    inputs = problem(21, 3, 2, 128, 128)
    low = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    low[1] = inputs[1]
    exact = [x.double() if x.is_floating_point() else x for x in low]
    wanted = values_and_gradients(reference_routed_experts, exact)
    emulated = values_and_gradients(reference_fp8_routed_experts, low)
    for got, other, want in zip(
        values_and_gradients(routed_experts, low, block_m=16), emulated, wanted, strict=True
    ):
        error, allowed = (float((x.double() - want).norm()) for x in (got, other))
        assert error <= 1.1 * allowed
        assert error <= 0.1 * float(want.norm())
