"""Round a weight into a format, with the scales its values span or with searched ones.

in: a weight [O, I], a `WeightFormat`, perhaps how much each input counts; out: `QuantizedWeight`
source: compressed-tensors' calculate_qparams and quantize (0.20)

Everything works on groups [R, G]: R sets of G values that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l4cli.quantization.formats import QuantizedWeight, WeightFormat

SCALE_DTYPE = torch.bfloat16  # as published checkpoints store scales
FP8_MAX = 448.0
_EPS = torch.finfo(torch.float32).eps  # a group of zeros has a scale too
# Rounded at once: what a core's cache holds, as a search passes over the same values many times.
_CHUNK_VALUES = 1 << 18
# Of the scale at which the largest value is just in range: clipping it may serve the others.
_SHRINK = (1.15, 1.07, 1.0, 0.97, 0.93, 0.89, 0.85, 0.8, 0.75, 0.7)
_FP8_SHRINK = tuple(2 ** (i / 8) for i in range(8))  # a binade: beyond it the grid repeats
_REFITS = 2


def code_range(format: WeightFormat) -> tuple[float, float]:
    """The least and the greatest code."""
    if format.name == "fp8":
        return -FP8_MAX, FP8_MAX
    half = 1 << (format.bits - 1)
    return -half, half - 1


def divides(format: WeightFormat, num_inputs: int) -> bool:
    """Whether a row of inputs is whole groups or blocks, and whole words of packed codes."""
    group = format.block[1] if format.block else format.group_size or 1
    return num_inputs % group == 0 and num_inputs % 8 == 0


@torch.no_grad()
def round_weight(
    weight: Tensor,
    format: WeightFormat,
    *,
    searches: bool = False,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight by itself.

    `searches`: try scales and keep those of least squared error, each input's error counted by
    `importance` (a calibration's mean square of what the input carries, say).
    shapes: weight [O, I], importance [I]
    """
    assert divides(format, weight.shape[1]), (format, tuple(weight.shape))
    counts = None if importance is None else importance.to(weight.device, torch.float32)
    parts = [
        _round_rows(weight[start:end].float(), format, searches, counts)
        for start, end in _chunks(weight.shape[0], weight.shape[1], format)
    ]
    zeros = [zero for _, _, zero in parts if zero is not None]
    return QuantizedWeight(
        format,
        torch.cat([codes for codes, _, _ in parts]),
        torch.cat([scale for _, scale, _ in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _chunks(num_outputs: int, num_inputs: int, format: WeightFormat) -> list[tuple[int, int]]:
    step = format.block[0] if format.block else 1
    rows = max(1, _CHUNK_VALUES // num_inputs // step) * step
    return [(i, min(num_outputs, i + rows)) for i in range(0, num_outputs, rows)]


def _round_rows(
    weight: Tensor, format: WeightFormat, searches: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    groups = to_groups(weight, format)
    if searches:
        counts = None
        if importance is not None:
            counts = to_groups(importance.expand_as(weight), format)
        scale, zero = searched_scales(groups, format, counts)
    else:
        scale, zero = spanned_scales(groups, format)
    codes = encode_groups(groups, format, scale, zero)
    shape = scale_shape(weight.shape[0], weight.shape[1], format)
    return (
        _from_groups(codes, weight.shape[0], weight.shape[1], format),
        scale.to(SCALE_DTYPE).view(shape),
        None if zero is None else zero.to(torch.int8).view(shape),
    )


# Groups


def scale_shape(num_outputs: int, num_inputs: int, format: WeightFormat) -> tuple[int, int]:
    """The shape of the scales of a weight [O, I]."""
    if format.block is not None:
        rows, columns = format.block
        return -(-num_outputs // rows), -(-num_inputs // columns)
    return num_outputs, num_inputs // (format.group_size or num_inputs)


def to_groups(weight: Tensor, format: WeightFormat) -> Tensor:
    """Line up what shares a scale; blocks at the edge are filled with zeros. shapes: -> [R, G]"""
    if format.block is None:
        return weight.reshape(-1, format.group_size or weight.shape[1])
    rows, columns = format.block
    down, across = scale_shape(weight.shape[0], weight.shape[1], format)
    padding = (0, across * columns - weight.shape[1], 0, down * rows - weight.shape[0])
    padded = torch.nn.functional.pad(weight, padding)
    return padded.view(down, rows, across, columns).transpose(1, 2).reshape(-1, rows * columns)


def _from_groups(groups: Tensor, num_outputs: int, num_inputs: int, format: WeightFormat) -> Tensor:
    if format.block is None:
        return groups.view(num_outputs, num_inputs)
    rows, columns = format.block
    down, across = scale_shape(num_outputs, num_inputs, format)
    # The same bytes in another order; fp8 has no cat or copy of its own on every device.
    whole = groups.view(torch.uint8).view(down, across, rows, columns).transpose(1, 2)
    whole = whole.reshape(down * rows, across * columns)[:num_outputs, :num_inputs]
    return whole.contiguous().view(groups.dtype)


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as it will be read back, in fp32; codes are chosen after this rounding."""
    scale = scale.to(SCALE_DTYPE).float()
    return torch.where(scale == 0, _EPS, scale)


def encode_groups(
    groups: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    """The nearest codes, half to even. shapes: groups [R, G], scale and zero [R, 1] -> [R, G]"""
    codes = _unrounded(groups, format, scale, zero)
    if format.name == "fp8":
        return codes.to(torch.float8_e4m3fn)
    return codes.round_().to(torch.int8)


def _unrounded(groups: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor | None) -> Tensor:
    codes = groups / scale
    if zero is not None:
        codes += zero
    return codes.clamp_(*code_range(format))


def _decoded(groups: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Values after a round trip, in fp32."""
    codes = _unrounded(groups, format, scale, zero)
    codes = codes.to(torch.float8_e4m3fn).float() if format.name == "fp8" else codes.round_()
    if zero is not None:
        codes -= zero
    return codes.mul_(scale)


# Scales


def spanned_scales(groups: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points, at which each group's values just fit. shapes: -> [R, 1]"""
    low, high = groups.aminmax(dim=1, keepdim=True)
    return _scales_of_range(low, high, format)


def _scales_of_range(
    low: Tensor, high: Tensor, format: WeightFormat
) -> tuple[Tensor, Tensor | None]:
    least, greatest = code_range(format)
    if format.symmetric:
        return stored_scale(2 * torch.maximum(low.abs(), high.abs()) / (greatest - least)), None
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero has a code of its own
    scale = stored_scale((high - low) / (greatest - least))
    return scale, (least - low / scale).round_().clamp_(least, greatest)


def searched_scales(
    groups: Tensor, format: WeightFormat, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points, of least (weighted) squared error among many. shapes: -> [R, 1]"""
    best = _Best(groups, format, importance)
    best.offer(*spanned_scales(groups, format))
    if format.symmetric:
        _search_scale(best)
    else:
        _search_range(best)
    for _ in range(_REFITS):
        _refit(best)
    return best.scale, best.zero


class _Best:
    """Of each group the scale and zero point of least error so far."""

    def __init__(self, groups: Tensor, format: WeightFormat, importance: Tensor | None) -> None:
        self.groups, self.format, self.importance = groups, format, importance
        self.error = groups.new_full((groups.shape[0], 1), float("inf"))
        self.scale = torch.ones_like(self.error)
        self.zero = None if format.symmetric else torch.zeros_like(self.error)

    def offer(self, scale: Tensor, zero: Tensor | None) -> None:
        """Keep it where it errs less."""
        errors = _decoded(self.groups, self.format, scale, zero).sub_(self.groups).square_()
        if self.importance is not None:
            errors *= self.importance
        error = errors.sum(dim=1, keepdim=True)
        is_better = error < self.error
        self.error = torch.where(is_better, error, self.error)
        self.scale = torch.where(is_better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(is_better, zero, self.zero)


def _search_scale(best: _Best) -> None:
    """Shrink and grow; for integers also mirrored, as there is one more code below zero."""
    low, high = best.groups.aminmax(dim=1, keepdim=True)
    least, greatest = code_range(best.format)
    extreme = torch.where(high > -low, high, low)
    if best.format.name == "fp8":  # alike on both sides of zero: scales are positive
        for factor in _FP8_SHRINK:
            best.offer(stored_scale(extreme.abs() * (factor / greatest)), None)
        return
    for factor in _SHRINK:
        scale = stored_scale(extreme * (factor / least))
        best.offer(scale, None)
        best.offer(-scale, None)


def _search_range(best: _Best) -> None:
    """Shrink the range. With whole zero points this comes within 3% of the least squared error of a
    grid of all scales and zero points; half-quadratic steps moved none (measured, groups of 32).
    """
    low, high = best.groups.aminmax(dim=1, keepdim=True)
    for factor in _SHRINK[2:]:
        best.offer(*_scales_of_range(low * factor, high * factor, best.format))


def _refit(best: _Best) -> None:
    """The scale of least squares for the codes as they are; then codes may move again."""
    codes = _decoded(best.groups, best.format, best.scale, best.zero).div_(best.scale)
    counted = codes if best.importance is None else codes * best.importance
    square = (counted * codes).sum(dim=1, keepdim=True)
    scale = (counted * best.groups).sum(dim=1, keepdim=True) / square.clamp(min=1e-30)
    scale = torch.where(square > 0, scale, best.scale)
    best.offer(stored_scale(scale), best.zero)
