"""Run through `test_triton_harness.py`: bf16 products against torch."""

from __future__ import annotations

import torch
from triton_harness import repair_interpreter

repair_interpreter()

from tiny_kernels import product, round_to, subtract  # noqa: E402


def test_bf16_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 32, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](a, b.view(32, 16), out, 32, BLOCK=16)
    torch.testing.assert_close(out, a.float() @ b.view(32, 16).float(), rtol=1e-5, atol=1e-5)


def test_casts_round_to_nearest_even() -> None:
    """Ties, a carry into the exponent, infinities and every magnitude, as torch rounds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, generator=generator) * torch.logspace(-38, 38, 256)
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 - 2**-10, float("inf"), float("-inf"), 3.4e38, 0.0]
    x[: len(ties)] = torch.tensor(ties)
    low, back = torch.empty(256, dtype=torch.bfloat16), torch.empty(256)
    round_to[(1,)](x, low, BLOCK=256)
    round_to[(1,)](low, back, BLOCK=256)
    assert torch.equal(low, x.bfloat16())
    assert torch.equal(back, low.float())
    x[0] = float("nan")
    round_to[(1,)](x, low, BLOCK=256)
    assert low[0].isnan()


def test_bf16_arithmetic() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    z = torch.empty_like(x)
    subtract[(1,)](x, y, z, BLOCK=256)
    assert torch.equal(z, x - y)


def test_casts_to_fp8_round_to_nearest_even() -> None:
    """Every magnitude from the subnormal ones to the largest, ties and carries among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, generator=generator) * torch.logspace(-4, 2, 256)
    x[:6] = torch.tensor([1.0625, 1.1875, 0.97, 448.0, 460.0, 2.0**-10])
    x = x.clamp(-448, 460)
    codes = torch.empty(256, dtype=torch.float8_e4m3fn)
    round_to[(1,)](x, codes, BLOCK=256)
    assert torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())
