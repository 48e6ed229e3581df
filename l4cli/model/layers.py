"""The parts both halves share: linear maps and norms that compute in their input's dtype.

in: activations; out: the same dtype, whatever the dtype of the weights (fp32 masters)
They come without values, `reset_parameters` does nothing: `init_weights` or a checkpoint gives
them. (torch's own initialisers, run on the meta device, import its whole compiler: a second.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l4cli.ops.norm import rms_norm
from l4cli.ops.swiglu import swiglu


class Linear(nn.Linear):
    """A linear map whose weight is cast to the input's dtype at use: masters stay as they are."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """A table of rows."""

    def reset_parameters(self) -> None:
        pass


class LayerNorm(nn.LayerNorm):
    """Layer norm with cast weights, for the vision tower."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm: statistics in fp32, cast back, then the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))  # [D]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): a dense layer's feed-forward and the shared expert."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)  # [F, D]
        self.up_proj = Linear(hidden_size, width, bias=False)  # [F, D]
        self.down_proj = Linear(width, hidden_size, bias=False)  # [D, F]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
