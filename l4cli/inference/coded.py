"""Compute from the codes of an int4 checkpoint: they go to the device and stay what they are.

in: a quantized folder and a device; out: a model whose int4 maps are packed codes, all else as
`load_model` gives it. Scout's codes fit one H100, its bf16 values do not.
On a CPU the plain versions of the ops run, and give the logits of widened weights. On a GPU none
of this has run yet: the kernels were compiled for sm_90 and sm_100 and run in an interpreter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l4cli.checkpoint import StoredWeights, load_config, load_weights, open_weights, read_quantized
from l4cli.checkpoint.compressed_tensors import code_bits, weights_of
from l4cli.checkpoint.hf_keys import Piece
from l4cli.checkpoint.quantized import is_quantized, module_of
from l4cli.checkpoint.reader import matched_pieces
from l4cli.errors import L4Error
from l4cli.model import Llama4Config, build_model
from l4cli.model.layers import Linear
from l4cli.ops.int4_experts import PackedInt4, dequantized_map, int4_experts, int4_linear, pack
from l4cli.ops.moe import in_turn
from l4cli.ops.swiglu import swiglu
from src_kernels.cuda.int4_layout import GROUP_SIZES, OUTPUTS

FEW_ROWS = 64  # so many are multiplied with codes; for more one map at a time is widened
_SCALES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_WORKING = 6  # bytes beside the model for each weight of the largest map: codes apart, values


class CodedLinear(nn.Module):
    """A linear map in codes."""

    def __init__(self, packed: PackedInt4, bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FEW_ROWS:
            y = int4_linear(rows, self.packed)
        else:
            y = F.linear(rows, dequantized_map(self.packed, 0, x.dtype))
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias.to(x.dtype)


class CodedExperts(nn.Module):
    """Routed experts in codes: gate rows before up rows, all experts in one block of memory."""

    def __init__(self, gate_up: PackedInt4, down: PackedInt4) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor) -> Tensor:
        if expert_MA.numel() <= FEW_ROWS:
            return int4_experts(x_MD, gate_MA, expert_MA, self.gate_up, self.down)
        return in_turn(x_MD, gate_MA, expert_MA, len(self.down.codes), self._run_all)

    def _run_all(self, rows: list[Tensor]) -> list[Tensor]:
        return [self._run(expert, run) for expert, run in enumerate(rows) if len(run)]

    def _run(self, expert: int, x_RD: Tensor) -> Tensor:
        h_RF = F.linear(x_RD, dequantized_map(self.gate_up, expert, x_RD.dtype))
        gate_RF, up_RF = h_RF.chunk(2, dim=-1)
        return F.linear(swiglu(gate_RF, up_RF), dequantized_map(self.down, expert, x_RD.dtype))


@dataclass
class CodedPlan:
    """Which maps stay in codes, by headers alone. Groups: inputs that share a packed scale."""

    folder: Path
    config: Llama4Config
    stored: StoredWeights
    linears: dict[str, Piece] = field(default_factory=dict)  # by module
    experts: dict[str, list[Piece]] = field(default_factory=dict)  # by `...experts`
    groups: dict[str, int] = field(default_factory=dict)  # by parameter
    num_quantized: int = 0  # maps that are stored in codes of any kind
    num_coded: int = 0  # of them, those that stay in codes
    size_bytes: int = 0  # of the model as stored, and of what is needed beside it for a moment

    def is_coded(self, parameter: str) -> bool:
        """Whether a parameter of the model never exists."""
        return parameter in self.groups


def plan_coded(folder: Path, config: Llama4Config | None = None) -> CodedPlan | str:
    """What can be computed from codes, or why nothing can. raises: L4Error for what does not fit"""
    config = config or load_config(folder)
    plan = CodedPlan(folder, config, open_weights(folder))
    by_parameter: dict[str, list[Piece]] = {}
    for piece in matched_pieces(config, folder):
        by_parameter.setdefault(piece.name, []).append(piece)
        plan.num_quantized += is_quantized(plan.stored, module_of(piece.key))
    groups = {name: _group(plan.stored, of) for name, of in by_parameter.items()}
    model = build_model(config, device="meta")
    for name, module in model.named_modules():
        # The router computes in fp32 whatever the rest does.
        group = groups.get(f"{name}.weight")
        if isinstance(module, Linear) and group and not name.endswith(".router"):
            plan.linears[name] = by_parameter[f"{name}.weight"][0]
            plan.groups[f"{name}.weight"] = group
        names = [f"{name}.{_GATE_UP}", f"{name}.{_DOWN}"]
        found = [groups.get(each) for each in names]
        if all(found):
            plan.experts[name] = [piece for each in names for piece in by_parameter[each]]
            plan.groups |= {each: group for each, group in zip(names, found, strict=True) if group}
    plan.num_coded = sum(len(by_parameter[name]) for name in plan.groups)
    if not plan.num_coded:
        sizes = ", ".join(map(str, GROUP_SIZES))
        return f"none of its maps is int4 in groups of {sizes}"
    plan.size_bytes = _size_bytes(plan, by_parameter)
    return plan


def load_coded(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    config: Llama4Config | None = None,
) -> Any:
    """A checkpoint's model with its int4 maps in codes, or in a few words why there is none.

    `dtype`: what is computed in and everything else is held in; None: bf16, and as stored.
    One map at a time is in host memory. Such a model can be neither trained nor saved.
    """
    plan = plan_coded(folder, config)
    return plan if isinstance(plan, str) else load_planned(plan, torch.device(device), dtype)


@torch.no_grad()
def load_planned(plan: CodedPlan, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The model of a plan."""
    model = build_model(plan.config, device="meta")
    load_weights(
        model,
        plan.folder,
        device=device,
        dtype=dtype,
        only=lambda name: not plan.is_coded(name),
    )
    for name, piece in plan.linears.items():
        linear: Any = model.get_submodule(name)
        (packed,) = _packed(plan, f"{name}.weight", [[piece]], device)
        bias = None if linear.bias is None else linear.bias.detach()
        _replace(model, name, CodedLinear(packed, bias))
    for name, pieces in plan.experts.items():
        stacks = []
        for leaf in (_GATE_UP, _DOWN):
            maps = _by_expert([piece for piece in pieces if piece.name.endswith(leaf)])
            stacks.append(_stacked(_packed(plan, f"{name}.{leaf}", maps, device), len(maps)))
        _replace(model, name, CodedExperts(*stacks))
    model.compute_dtype = dtype or torch.bfloat16
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _by_expert(pieces: list[Piece]) -> list[list[Piece]]:
    """Each expert's maps in the order of their columns: gate before up."""
    maps: dict[int, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda p: p.columns):
        assert piece.expert is not None
        maps.setdefault(piece.expert, []).append(piece)
    return [maps[expert] for expert in sorted(maps)]


def _packed(
    plan: CodedPlan, parameter: str, maps: list[list[Piece]], device: torch.device
) -> Iterator[PackedInt4]:
    """One weight after the other, of maps whose outputs follow each other."""
    everything = [piece for pieces in maps for piece in pieces]
    is_symmetric = not any(_has_zero(plan.stored, piece) for piece in everything)
    dtype = _scale_dtype(plan.stored, everything)
    for pieces in maps:
        parts = [_on_device(plan, parameter, piece, device) for piece in pieces]
        codes, scale, zero = (torch.cat(each).unsqueeze(0) for each in zip(*parts, strict=True))
        yield pack(codes, scale.to(dtype), None if is_symmetric else zero)


def _on_device(
    plan: CodedPlan, parameter: str, piece: Piece, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points; scales that more inputs share than a group has, repeated."""
    weight = read_quantized(plan.stored, module_of(piece.key))
    if weight.shape != piece.shape or weight.format.name != "int4":
        why = f"`{piece.key}` is {weight.format} {list(weight.shape)}, "
        raise _damaged(plan, f"{why}the model needs {list(piece.shape)}")
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
    for codes in (weight.codes, zero):  # those stored one by one can be anything
        if int(codes.min()) < -8 or int(codes.max()) > 7:
            why = (
                f"`{piece.key}` has codes or zero points that are not -8 to 7, and says it is int4"
            )
            raise _damaged(plan, why)
    num_groups = piece.shape[1] // plan.groups[parameter]
    repeats = num_groups // weight.scale.shape[1]
    scale, zero = (x.to(device).repeat_interleave(repeats, 1) for x in (weight.scale, zero))
    return weight.codes.to(device), scale, zero


def _damaged(plan: CodedPlan, why: str) -> L4Error:
    what = f"cannot load quantized checkpoint `{plan.folder}`"
    return L4Error(what, why=why, fix="fetch or write it again")


def _stacked(parts: Iterator[PackedInt4], num_experts: int) -> PackedInt4:
    """All experts in memory taken once, each put in its place as it comes."""
    stack: list[Tensor | None] = []
    for expert, part in enumerate(parts):
        tensors = (part.codes, part.scale, part.zero)
        if not stack:
            stack = [None if t is None else t.new_empty(num_experts, *t.shape[1:]) for t in tensors]
        for whole, tensor in zip(stack, tensors, strict=True):
            if whole is not None and tensor is not None:
                whole[expert] = tensor[0]
    codes, scale, zero = stack
    assert codes is not None
    assert scale is not None
    return PackedInt4(codes, scale, zero, part.num_outputs)


def _group(stored: StoredWeights, pieces: list[Piece]) -> int | None:
    """The largest group whose scales can be those of all these maps; None: not all are int4."""
    lengths = [_length(stored, piece) for piece in pieces]
    for group in sorted(GROUP_SIZES, reverse=True):
        if all(length and length % group == 0 for length in lengths):
            return group
    return None


def _length(stored: StoredWeights, piece: Piece) -> int | None:
    """How many inputs share a scale of an int4 map; None for what is stored otherwise."""
    name = module_of(piece.key)
    if not is_quantized(stored, name) or code_bits(stored.quantization, name) != 4:
        return None
    scale = stored.tensors.get(f"{name}.weight_scale")
    if scale is None or scale.dtype not in _SCALES:
        return None
    if weights_of(stored.quantization, name).get("type", "int") != "int":
        return None
    columns = scale.shape[-1] if len(scale.shape) == 2 else 1
    return piece.shape[1] // columns if columns and piece.shape[1] % columns == 0 else None


def _has_zero(stored: StoredWeights, piece: Piece) -> bool:
    return f"{module_of(piece.key)}.weight_zero_point" in stored.tensors


def _scale_dtype(stored: StoredWeights, pieces: list[Piece]) -> torch.dtype:
    """One for all maps of a weight, which holds each of theirs."""
    keys = {f"{module_of(piece.key)}.weight_scale" for piece in pieces}
    found = {_SCALES[stored.tensors[key].dtype] for key in keys}
    return found.pop() if len(found) == 1 else torch.float32


def _size_bytes(plan: CodedPlan, by_parameter: dict[str, list[Piece]]) -> int:
    total = largest = 0
    for name, pieces in by_parameter.items():
        group = plan.groups.get(name)
        if group is None:
            total += sum(_plain_bytes(plan.stored, piece) for piece in pieces)
            continue
        for_scales = _scale_dtype(plan.stored, pieces).itemsize
        for_scales += any(_has_zero(plan.stored, piece) for piece in pieces)
        sizes: Counter[int] = Counter()
        for piece in pieces:
            num_outputs, num_inputs = piece.shape
            padded = -(-num_outputs // OUTPUTS) * OUTPUTS
            sizes[piece.expert or 0] += padded * num_inputs
            total += padded * num_inputs // 2 + padded * num_inputs // group * for_scales
        largest = max(largest, *sizes.values())
    return total + _WORKING * largest


def _plain_bytes(stored: StoredWeights, piece: Piece) -> int:
    """As stored; codes that are widened become bf16."""
    if is_quantized(stored, module_of(piece.key)):
        return 2 * math.prod(piece.shape)
    return stored.tensors[piece.key].size_bytes
