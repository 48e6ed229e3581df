"""Make a model that only answers from now on: its weights move into the processor's layout.

in: a loaded model; out: the same model with its linear maps and experts replaced from outside
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l4cli.model import Llama4ForCausalLM, Llama4ForConditionalGeneration
from l4cli.model.layers import Linear
from l4cli.model.text import Experts
from l4cli.ops.moe import in_turn
from l4cli.ops.packed_linear import pack, packed_linear, why_not
from l4cli.ops.swiglu import swiglu


class PackedLinear(nn.Module):
    """A linear map in its compute dtype."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = pack(linear.weight, dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed, self.bias)


class PackedExperts(nn.Module):
    """Routed experts: each expert's two maps packed on their own."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = [pack(weight_DF.T, dtype) for weight_DF in experts.gate_up_proj]
        self.down = [pack(weight_FD.T, dtype) for weight_FD in experts.down_proj]

    def forward(self, x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor) -> Tensor:
        if len(x_MD) == 1:
            gates = gate_MA.to(x_MD.dtype)[0]
            parts = [
                self._run(expert, x_MD * gates[a]) for a, expert in enumerate(expert_MA[0].tolist())
            ]
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return in_turn(x_MD, gate_MA, expert_MA, len(self.down), self._run_all)

    def _run_all(self, rows: list[Tensor]) -> list[Tensor]:
        return [self._run(expert, run) for expert, run in enumerate(rows) if len(run)]

    def _run(self, expert: int, x_RD: Tensor) -> Tensor:
        gate_RF, up_RF = packed_linear(x_RD, self.gate_up[expert]).chunk(2, dim=-1)
        return packed_linear(swiglu(gate_RF, up_RF), self.down[expert])


def pack_weights(model: Llama4ForCausalLM | Llama4ForConditionalGeneration) -> str | None:
    """Pack what can be packed; the plain weights are given up. Returns why not, if it cannot be.

    Such a model can be neither trained nor saved.
    """
    dtype = model.compute_dtype
    reason = why_not(model.lm_head.weight.device, dtype)
    if reason is not None:
        return reason
    owners = [module for module in model.modules() if not isinstance(module, PackedExperts)]
    for owner in owners:
        for name, child in list(owner.named_children()):
            if isinstance(child, Experts):
                setattr(owner, name, PackedExperts(child, dtype))
            # The router computes in fp32 whatever the rest does.
            elif isinstance(child, Linear) and name != "router":
                setattr(owner, name, PackedLinear(child, dtype))
    return None
