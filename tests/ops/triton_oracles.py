"""What the interpreted tests share: seeded numbers, gradients, and errors against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# fp32: sums in another order. Lower dtypes: twice what plain PyTorch in that dtype loses, or this.
TIGHT = 1e-6
FLOOR = {torch.float32: TIGHT, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_and_gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    out.backward(normal(*out.shape, seed=99).bfloat16().to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_close_to_fp64(
    op: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Values and gradients of `op` in a dtype against `plain` in fp64."""
    inputs = [x.to(dtype) for x in inputs]
    exact = values_and_gradients(plain, inputs, torch.float64)
    peer = values_and_gradients(plain, inputs, dtype)
    for got, other, want in zip(values_and_gradients(op, inputs, dtype), peer, exact, strict=True):
        assert got.isfinite().all()
        error, allowed = ((x.double() - want).norm() for x in (got, other))
        # A sum that cancels to nothing keeps the roundings of its terms, which are of size one.
        least = FLOOR[dtype] * want.norm() + 2**-24 * want.numel() ** 0.5
        assert error <= 2 * allowed + least, (error, allowed)


def assert_near(got: Tensor, want: Tensor, relative: float) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= relative, float(error)
