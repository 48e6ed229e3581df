"""Run through `test_triton_int4.py`: int4 experts in the interpreter against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_harness import repair_interpreter

repair_interpreter()

from l4cli.ops.moe import reference_routed_experts  # noqa: E402
from src_kernels.cuda.int4 import routed_experts  # noqa: E402
from src_kernels.cuda.int4_layout import pack  # noqa: E402


def made(
    experts: int, outputs: int, inputs: int, group: int, has_zero: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (experts, outputs, inputs), generator=generator)
    shape = (experts, outputs, inputs // group)
    scale = (0.02 + 0.1 * torch.rand(shape, generator=generator)).bfloat16()
    zero = torch.randint(-8, 8, shape, generator=generator).to(torch.int8) if has_zero else None
    return codes.to(torch.int8), scale, zero


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """fp64 [E, I, O]: as the reference multiplies."""
    groups = codes.double().unflatten(-1, (scale.shape[-1], -1))
    if zero is not None:
        groups = groups - zero.double().unsqueeze(-1)
    return (groups * scale.double().unsqueeze(-1)).flatten(2).transpose(1, 2)


# (tokens, experts, choices, hidden, width, group, zero points)
CASES = [
    (1, 4, 1, 64, 32, 32, False),
    (1, 4, 2, 128, 128, 128, True),
    (5, 3, 2, 64, 64, 64, True),
    (19, 3, 1, 96, 32, 32, False),  # more rows than one block holds; outputs no multiple of 64
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_dequantized_weights(case: tuple, dtype: str) -> None:
    tokens, experts, top_k, dim, width, group, has_zero = case
    w_in = made(experts, 2 * width, dim, group, has_zero, 1)
    w_out = made(experts, dim, width, group, has_zero, 2)
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(tokens, dim, generator=generator) / 4).to(DTYPES[dtype])
    scores = torch.randn(tokens, experts, generator=generator)
    scores[:, 1] = -9.0  # nobody's second expert, unless both are taken
    gate, chosen = scores.topk(top_k)
    gate = gate.sigmoid()
    exact_in, exact_out = dequantized(*w_in), dequantized(*w_out)
    want = reference_routed_experts(x.double(), gate.double(), chosen, exact_in, exact_out)
    got = routed_experts(x, gate, chosen, pack(*w_in), pack(*w_out), num_programs=12)
    assert got.dtype == x.dtype
    error = float((got.double() - want).norm())
    if dtype == "fp32":
        assert error <= 2e-6 * float(want.norm())
        return
    low = (x, gate, chosen, exact_in.to(x.dtype), exact_out.to(x.dtype))
    plain = float((reference_routed_experts(*low).double() - want).norm())
    assert error <= 2 * plain + 1e-6 * float(want.norm())


def test_no_tokens() -> None:
    w_in, w_out = pack(*made(2, 64, 64, 32, False, 1)), pack(*made(2, 64, 32, 32, False, 2))
    chosen = torch.zeros(0, 1, dtype=torch.long)
    y = routed_experts(torch.zeros(0, 64), torch.zeros(0, 1), chosen, w_in, w_out)
    assert y.shape == (0, 64)
