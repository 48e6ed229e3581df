"""Routed experts through torch's `grouped_mm`, CUTLASS kernels on Hopper.

in, out: as `l4cli.ops.moe.routed_experts`; nothing waits for the device
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.ops.swiglu import swiglu
from src_kernels.cuda.grouping import Groups


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's products cannot be used there, or are no fast ones."""
    if not hasattr(F, "grouped_mm"):
        return "this torch has no `grouped_mm`"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"not for {device.type}"
    if dtype != torch.bfloat16:
        return "torch's kernel is for bf16"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"below compute capability 9.0 it is a loop, and this GPU has {major}.{minor}"
    if major >= 10:
        return "there it gives experts without tokens a gradient (pytorch issue 172439)"
    return None


def routed_experts(
    x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """Sort, two grouped products, put back; autograd does the rest."""
    multiple = 16 // x_MD.element_size()
    if x_MD.shape[1] % multiple or w_out_EFD.shape[1] % multiple:
        sizes = f"{x_MD.shape[1]} and {w_out_EFD.shape[1]}"
        why = f"sizes {sizes} are not both multiples of {multiple}, or 16 bytes"
        fix = "set `L4_OPS=routed_experts=triton`"
        raise L4Error("cannot run experts through torch's `grouped_mm`", why=why, fix=fix)
    groups, dtype = Groups.from_choices(expert_MA, len(w_in_EDF)), x_MD.dtype
    slots_R = groups.slots.long()
    gate_R1 = gate_MA.flatten()[slots_R].to(dtype).unsqueeze(-1)
    x_RD = x_MD[slots_R // groups.top_k] * gate_R1
    h_RF = F.grouped_mm(x_RD, w_in_EDF.to(dtype), offs=groups.ends)
    a_RF = swiglu(*h_RF.chunk(2, dim=-1))
    y_RD = F.grouped_mm(a_RF, w_out_EFD.to(dtype), offs=groups.ends)
    return groups.summed(torch.empty_like(y_RD).index_copy(0, slots_R, y_RD))
