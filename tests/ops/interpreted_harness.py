"""Run through `test_triton_harness.py`: bf16 products against torch."""

from __future__ import annotations

import torch
from triton_harness import repair_interpreter

repair_interpreter()

from tiny_kernels import product  # noqa: E402


def test_bf16_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 32, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](a, b.view(32, 16), out, 32, BLOCK=16)
    torch.testing.assert_close(out, a.float() @ b.view(32, 16).float(), rtol=1e-5, atol=1e-5)
