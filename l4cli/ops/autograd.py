"""Run a custom autograd function, without autograd's bookkeeping where no gradient is wanted.

in: a `torch.autograd.Function` and its arguments; out: what its forward gives
Decoding is thousands of small calls a second; `apply` costs more than some of them compute.
"""

from __future__ import annotations

from typing import Any

import torch


class _Forgetful:
    """A context that nobody will ask."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


def apply(function: Any, *args: Any) -> Any:
    """`function.apply(*args)`, or its bare forward when gradients are off."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_Forgetful(), *args)
