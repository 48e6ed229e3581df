"""Read quantized linear maps: their codes as they are, for whoever computes with them.

in: a folder's headers and a module's name; out: `QuantizedWeight`
source: compressed-tensors 0.20 (pack-quantized, float-quantized, int-quantized)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from l4cli.checkpoint.compressed_tensors import BESIDE_CODES, CACHE_SCALES, code_bits, weights_of
from l4cli.checkpoint.stored import StoredWeights
from l4cli.errors import L4Error
from l4cli.quantization import QuantizedWeight, WeightFormat
from l4cli.quantization.packing import unpack_codes
from l4cli.quantization.rounding import scale_shape

_PACKED, _SCALE = "weight_packed", "weight_scale"
_SHAPE, _ZERO = "weight_shape", "weight_zero_point"
_CODES = {"F8_E4M3": "fp8", "I8": "int8"}  # codes that are stored one by one


def module_of(key: str) -> str:
    """The module whose weight a key names."""
    return key.removesuffix(".weight")


def quantized_names(stored: StoredWeights) -> list[str]:
    """The modules whose weight is stored in codes, in the order of the files."""
    names = []
    for key, entry in stored.tensors.items():
        name, _, leaf = key.rpartition(".")
        if leaf == _PACKED or (leaf == "weight" and entry.dtype in _CODES):
            names.append(name)
    return names


def is_quantized(stored: StoredWeights, name: str) -> bool:
    """Whether a module's weight is stored in codes."""
    if f"{name}.{_PACKED}" in stored.tensors:
        return True
    entry = stored.tensors.get(f"{name}.weight")
    return entry is not None and entry.dtype in _CODES


def plain_keys(stored: StoredWeights) -> Iterable[str]:
    """The keys the same checkpoint would have without quantization."""
    quantized = set(quantized_names(stored))
    for key in stored.tensors:
        name, _, leaf = key.rpartition(".")
        if leaf == _PACKED and name in quantized:
            yield f"{name}.weight"
        elif not (name in quantized and leaf in BESIDE_CODES) and leaf not in CACHE_SCALES:
            yield key


def codes_shape(stored: StoredWeights, name: str) -> tuple[int, int]:
    """Outputs and inputs of a quantized map; reads `weight_shape` for packed ones."""
    if f"{name}.{_PACKED}" not in stored.tensors:
        shape = stored.tensors[f"{name}.weight"].shape
        return _pair(stored, name, shape)
    rows, words = _pair(stored, name, stored.tensors[f"{name}.{_PACKED}"].shape)
    bits = code_bits(stored.quantization, name)
    if f"{name}.{_SHAPE}" not in stored.tensors:
        return rows, words * 32 // bits
    shape = tuple(stored.read(f"{name}.{_SHAPE}").tolist())
    if len(shape) != 2 or shape[0] != rows or math.ceil(shape[1] * bits / 32) != words:
        why = f"`{name}` says it is {list(shape)}, and has {rows} rows of {words} words"
        raise _damaged(stored, why)
    return rows, shape[1]


def has_shape(stored: StoredWeights, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a map's codes can be those of a weight [O, I], by the header alone."""
    packed = stored.tensors.get(f"{name}.{_PACKED}")
    if packed is None:
        return stored.tensors[f"{name}.weight"].shape == shape
    words = math.ceil(shape[1] * code_bits(stored.quantization, name) / 32)
    return packed.shape == (shape[0], words)


def read_quantized(stored: StoredWeights, name: str) -> QuantizedWeight:
    """Read the codes of a linear map, as `model.layers.0.self_attn.q_proj`.

    raises: L4Error for shapes that contradict each other and for what has no format of ours
    """
    shape = codes_shape(stored, name)
    format = _format_of(stored, name, shape)
    if f"{name}.{_PACKED}" in stored.tensors:
        codes = unpack_codes(stored.read(f"{name}.{_PACKED}"), format.bits, shape[1])
    else:
        codes = stored.read(f"{name}.weight")
    scale = _scale(stored, name)
    if scale.numel() == 1 and format.block is None:  # one scale for all
        scale = scale.reshape(1, 1).expand(shape[0], 1)
    scale = scale.reshape(len(scale), -1)
    return QuantizedWeight(format, codes, scale, _zero(stored, name, format, scale))


def read_format(stored: StoredWeights, name: str) -> WeightFormat:
    """What `read_quantized` will say a map's format is, without its codes. raises: the same"""
    return _format_of(stored, name, codes_shape(stored, name))


def _format_of(stored: StoredWeights, name: str, shape: tuple[int, int]) -> WeightFormat:
    weights = weights_of(stored.quantization, name)
    if f"{name}.{_PACKED}" in stored.tensors:
        kind = f"int{_bits(stored, name, weights)}"
    else:
        kind = _CODES[stored.tensors[f"{name}.weight"].dtype]
        if kind == "int8" and weights.get("num_bits") == 4:
            kind = "int4"
    if f"{name}.{_SCALE}" not in stored.tensors:
        raise _damaged(stored, f"`{name}` has codes and no `{_SCALE}`")
    scales = stored.tensors[f"{name}.{_SCALE}"].shape
    if math.prod(scales) == 1 and weights.get("strategy") != "block":  # one scale for all
        scales = (shape[0], 1)
    rows = scales[0] if scales else 1
    return _format(stored, name, kind, shape, (rows, math.prod(scales) // max(1, rows)), weights)


def _format(
    stored: StoredWeights,
    name: str,
    kind: str,
    shape: tuple[int, int],
    scales: tuple[int, int],
    weights: Mapping[str, Any],
) -> WeightFormat:
    rows, columns = scales
    block = weights.get("block_structure")
    if weights.get("strategy") == "block" and block:
        format = WeightFormat("fp8", block=(block[0], block[1]))
        if kind != "fp8" or (rows, columns) != scale_shape(*shape, format):
            why = f"`{name}` {list(shape)} has {rows}x{columns} scales for its blocks of {block}"
            raise _damaged(stored, why)
        return format
    is_symmetric = f"{name}.{_ZERO}" not in stored.tensors
    if not (is_symmetric or kind == "int4"):
        raise _damaged(stored, f"`{name}` is {kind} with zero points")
    size = weights.get("group_size") or -1
    group_size = size if size > 0 else None
    if rows != shape[0] or columns * (group_size or shape[1]) != shape[1]:
        groups = f"groups of {group_size}" if group_size else "rows"
        why = f"`{name}` {list(shape)} has {rows}x{columns} scales for its {groups}"
        raise _damaged(stored, why)
    return WeightFormat(kind, group_size, is_symmetric)


def _bits(stored: StoredWeights, name: str, weights: Mapping[str, Any]) -> int:
    bits = weights.get("num_bits") or 4
    if bits not in (4, 8):
        raise _damaged(stored, f"`{name}` has codes of {bits} bits; 4 and 8 can be read")
    return int(bits)


def _scale(stored: StoredWeights, name: str) -> Tensor:
    scale = stored.read(f"{name}.{_SCALE}")
    if not (scale.is_floating_point() and bool(torch.isfinite(scale.float()).all())):
        raise _damaged(stored, f"`{name}` has scales that are NaN or infinite")
    return scale


def _zero(stored: StoredWeights, name: str, format: WeightFormat, scale: Tensor) -> Tensor | None:
    if format.symmetric:
        return None
    zero = stored.read(f"{name}.{_ZERO}")
    if zero.dtype == torch.int32:
        zero = unpack_codes(zero, format.bits, scale.shape[0], dim=0)
    if zero.shape != scale.shape:
        why = f"`{name}` has {list(zero.shape)} zero points for {list(scale.shape)} scales"
        raise _damaged(stored, why)
    return zero.to(torch.int8)


def _pair(stored: StoredWeights, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        why = f"`{name}` has codes of shape {list(shape)}; linear maps [out, in] can be read"
        raise _damaged(stored, why)
    return shape[0], shape[1]


def _damaged(stored: StoredWeights, why: str) -> L4Error:
    what = f"cannot load quantized checkpoint `{stored.folder}`"
    return L4Error(what, why=why, fix="fetch or write it again, or pass the bf16 version")
