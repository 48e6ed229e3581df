"""A linear map whose weight was laid out for the processor once: for answering, not for training.

in: x [..., I] and what `pack` made of a weight [O, I]; out: y [..., O], as `F.linear` gives
source: oneDNN's blocked layouts, through the operators that torch's own compiler freezes to.
Measured on a Zen 5 core, bf16, one row: 1.5 to 1.9 times `F.linear`, which lays out on every call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.ops.choice import REFERENCE, Op, Version

DTYPES = (torch.float32, torch.bfloat16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of this kind are not packed; None when they are."""
    version, reason = PACKED_LINEAR.choose(device, dtype)
    return None if version.name == "packed" else reason


def _packed_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"{device.type} has layouts of its own"
    if dtype not in DTYPES:
        return f"no packed layout for {str(dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    names = ("_linear_pointwise", "_reorder_linear_weight")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return "this torch lacks oneDNN's operators for packed weights"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 instructions"
    return None


@torch.no_grad()
def pack(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay a weight out; what comes back can only be given to `packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().to(dtype).contiguous())


def packed_linear(x: Tensor, packed_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, in the dtype the weight was packed in. No gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, packed_OI, bias_O, "none", [], "")


def reference_packed_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The same from the weight as it is."""
    return F.linear(x, weight_OI, bias_O)


PACKED_LINEAR = Op(
    "packed_linear",
    [
        Version(
            "packed",
            lambda: packed_linear,
            "oneDNN's layout, made once for a model that only answers",
            _packed_why_not,
        ),
        Version(REFERENCE, lambda: reference_packed_linear, "the weight as it is"),
    ],
)
