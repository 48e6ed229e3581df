"""Run through `test_triton_moe.py`: routed experts in the interpreter against the fp64 loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_harness import repair_interpreter

repair_interpreter()

from l4cli.ops.moe import reference_routed_experts, routed_experts  # noqa: E402
from l4cli.ops.triton_moe import routed_experts as triton_experts  # noqa: E402
from src_kernels.cuda.grouping import Groups  # noqa: E402
from src_kernels.cuda.moe import SMALL  # noqa: E402

# (tokens, experts, choices a token, hidden, width): one token, empty experts, nothing a multiple
SHAPES = [
    (1, 4, 1, 16, 16),
    (1, 3, 2, 24, 20),
    (37, 5, 1, 40, 24),
    (23, 3, 2, 33, 17),
    (40, 2, 1, 32, 16),
]
PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    tokens: int, experts: int, top_k: int, dim: int, width: int, seed: int = 0
) -> list[Tensor]:
    scores = normal(tokens, experts, seed=seed + 5)
    if experts > 2:
        scores[:, 1] = -9.0  # nobody chooses the second expert while there are others
    chosen = scores.topk(top_k, dim=-1).indices
    inputs = [
        normal(tokens, dim, seed=seed),
        normal(tokens, top_k, seed=seed + 1).sigmoid(),
        chosen,
    ]
    scale = dim**-0.5
    return [
        *inputs,
        scale * normal(experts, dim, 2 * width, seed=seed + 2),
        scale * normal(experts, width, dim, seed=seed + 3),
    ]


def values_and_gradients(run, inputs: list[Tensor], **more: object) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = run(*leaves, **more)
    (out.double() * normal(*out.shape, seed=9)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def cast(inputs: list[Tensor], compute: torch.dtype, stored: torch.dtype) -> list[Tensor]:
    x, gate, chosen, w_in, w_out = inputs
    return [x.to(compute), gate.float(), chosen, w_in.to(stored), w_out.to(stored)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: str) -> None:
    """fp32 to its precision; bf16 loses at most twice what the plain loop in bf16 loses.

    A single token's gate has one number as its gradient: errors of several seeds are taken
    together, or chance would decide.
    """
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    squares: list[list[float]] = [[0.0] * 3 for _ in range(5)]
    for seed in range(0, 60 if shape[0] == 1 else 10, 10):
        inputs = cast(problem(*shape, seed=seed), compute, compute)
        doubled = [x.double() if x.is_floating_point() else x for x in inputs]
        exact = values_and_gradients(reference_routed_experts, doubled)
        ours = values_and_gradients(triton_experts, inputs, tiles=SMALL)
        plain = values_and_gradients(reference_routed_experts, inputs)
        for sums, got, other, want in zip(squares, ours, plain, exact, strict=True):
            assert got.shape == want.shape
            assert got.dtype == other.dtype
            for i, x in enumerate((got - want, other - want, want)):
                sums[i] += float(x.double().square().sum())
    for error, allowed, size in squares:
        assert error**0.5 <= 2 * allowed**0.5 + 1e-6 * size**0.5


def test_fp32_masters_get_fp32_gradients() -> None:
    """Weights kept in fp32 under bf16 compute: their gradients are not rounded to bf16."""
    inputs = cast(problem(19, 3, 1, 32, 16), torch.bfloat16, torch.float32)
    *_, dw_in, dw_out = values_and_gradients(triton_experts, inputs, tiles=SMALL)
    for grad in (dw_in, dw_out):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())
        assert not grad[1].any()  # the empty expert


def test_a_closed_gate_has_a_gradient() -> None:
    """Gates of exactly zero: the output is zero, and the gate's gradient is the loop's."""
    x, gate, *rest = cast(problem(9, 3, 1, 16, 16), torch.float32, torch.float32)
    inputs = [x, torch.zeros_like(gate), *rest]
    for got, want in zip(
        values_and_gradients(triton_experts, inputs, tiles=SMALL),
        values_and_gradients(reference_routed_experts, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_expert_touches_a_token_it_was_not_given() -> None:
    x, gate, _, w_in, w_out = cast(problem(21, 3, 1, 16, 16), torch.float32, torch.float32)
    w_in[1] = float("nan")
    chosen = (torch.arange(21) % 2 * 2).unsqueeze(-1)
    assert triton_experts(x, gate, chosen, w_in, w_out, tiles=SMALL).isfinite().all()


def test_the_door_and_its_usual_tiles() -> None:
    """Forced through `L4_OPS`, with the tiles a GPU would get."""
    inputs = cast(problem(5, 3, 2, 48, 40), torch.float32, torch.float32)
    with torch.no_grad():
        got = routed_experts(*inputs)
        torch.testing.assert_close(got, reference_routed_experts(*inputs))
    assert len(triton_experts(inputs[0][:0], inputs[1][:0], inputs[2][:0], *inputs[3:])) == 0


def test_groups() -> None:
    """By hand: slots 0..5 of three tokens; expert 1 has none; tiles of two rows."""
    groups = Groups.from_choices(torch.tensor([[2, 0], [3, 2], [2, 3]]), 4)
    assert groups.slots.tolist() == [1, 0, 3, 4, 2, 5]
    assert groups.ends.tolist() == [1, 1, 4, 6]
    assert groups.tile_ends(2).tolist() == [1, 1, 3, 4]
    assert groups.max_tiles(2) >= 4
