"""Quantize a linear map so that its outputs on real inputs change least.

in: a weight [O, I], the `Hessian` of its inputs, a `WeightFormat`; out: `QuantizedWeight`
source: Frantar et al. 2023, GPTQ (arXiv 2210.17323); static groups as in its authors' code

Input by input a column is rounded, and its error is made good by the columns still to come.
Scales are searched before, in the order of the file, so that the order of rounding leaves no
trace in it. What is left is settled afterwards (`settling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l4cli.quantization.formats import QuantizedWeight, WeightFormat
from l4cli.quantization.hessian import Factor, Hessian
from l4cli.quantization.rounding import (
    SCALE_DTYPE,
    code_range,
    round_weight,
    scale_shape,
    searched_scales,
    spanned_scales,
    stored_scale,
    to_groups,
)
from l4cli.quantization.settling import settle

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
_BLOCK = 128  # inputs whose effect on the ones after them is applied at once


@dataclass(frozen=True)
class Calibrated:
    """A weight in codes, and what its outputs lose by it."""

    weight: QuantizedWeight
    error: float  # squared error of the outputs, over their square
    note: str = ""  # what was unusual, in words


@torch.no_grad()
def calibrate_weight(
    weight_OI: Tensor,
    hessian: Hessian,
    format: WeightFormat,
    factor: Factor | None = None,
    *,
    damping: float = DAMPING,
    searches: bool = True,
    settles: bool = True,
) -> Calibrated:
    """Quantize one weight; `factor` is H's, for maps that share their inputs."""
    weight_OI = weight_OI.to(hessian.matrix.device, torch.float32)
    factor = factor or Factor(hessian, damping)
    if factor.upper is None or format.block is not None:
        importance = hessian.importance
        quantized = round_weight(weight_OI, format, searches=searches, importance=importance)
    else:
        scale, zero = _scales(weight_OI, format, hessian.importance, searches)
        codes = _codes(weight_OI, format, scale, zero, factor)
        quantized = _stored(format, codes, scale, zero)
        if settles and format.name != "fp8":
            quantized = settle(weight_OI, hessian, quantized, factor.damping)
    return Calibrated(quantized, relative_error(weight_OI, quantized, hessian), factor.note)


def relative_error(weight_OI: Tensor, quantized: QuantizedWeight, hessian: Hessian) -> float:
    """The squared error of the outputs over their square."""
    weight_OI = weight_OI.float()
    signal = hessian.error(weight_OI)
    difference = hessian.error(weight_OI - quantized.dequantize().to(weight_OI.device))
    return difference / signal if signal > 0 else 0.0


def _stored(
    format: WeightFormat, codes: Tensor, scale: Tensor, zero: Tensor | None
) -> QuantizedWeight:
    zero = None if zero is None else zero.to(torch.int8)
    return QuantizedWeight(format, codes, scale.to(SCALE_DTYPE), zero)


def _scales(
    weight_OI: Tensor, format: WeightFormat, importance_I: Tensor, searches: bool
) -> tuple[Tensor, Tensor | None]:
    """Scales of the groups as they lie in the file, as stored. shapes: -> [O, I / G]"""
    groups = to_groups(weight_OI, format)
    if searches:
        counts = to_groups(importance_I.expand_as(weight_OI), format)
        scale, zero = searched_scales(groups, format, counts)
    else:
        scale, zero = spanned_scales(groups, format)
    shape = scale_shape(weight_OI.shape[0], weight_OI.shape[1], format)
    return stored_scale(scale).view(shape), None if zero is None else zero.view(shape)


def _codes(
    weight_OI: Tensor,
    format: WeightFormat,
    scale: Tensor,
    zero: Tensor | None,
    factor: Factor,
) -> Tensor:
    """Round input by input, each error made good by the inputs after it. shapes: -> [O, I]"""
    assert factor.upper is not None
    num_outputs, num_inputs = weight_OI.shape
    least, greatest = code_range(format)
    upper, order = factor.upper, factor.order
    group_of = order // (format.group_size or num_inputs)
    # Inputs first: a column of the weight is then one run of memory.
    rest_IO = weight_OI.T[order].contiguous()
    scale_IO = scale.T[group_of]
    zero_IO = torch.zeros_like(scale_IO) if zero is None else zero.T[group_of]
    codes_IO = torch.empty_like(rest_IO)
    for start in range(0, num_inputs, _BLOCK):
        end = min(start + _BLOCK, num_inputs)
        errors = rest_IO.new_empty(end - start, num_outputs)
        for i in range(start, end):
            row, step = rest_IO[i], scale_IO[i]
            code = (row / step).add_(zero_IO[i]).clamp_(least, greatest)
            code = code.to(torch.float8_e4m3fn).float() if format.name == "fp8" else code.round_()
            codes_IO[i] = code
            error = row.sub(code.sub(zero_IO[i]).mul_(step)).div_(upper[i, i])
            rest_IO[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        rest_IO[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    codes_OI = torch.empty_like(codes_IO)
    codes_OI[order] = codes_IO
    kind = torch.float8_e4m3fn if format.name == "fp8" else torch.int8
    return codes_OI.T.contiguous().to(kind)
