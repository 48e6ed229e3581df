"""Rounding against plain loops and against compressed-tensors' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from l4cli.quantization import QuantizedWeight, WeightFormat, divides, round_weight
from l4cli.quantization.rounding import SCALE_DTYPE, code_range, spanned_scales, to_groups

ALL = [
    WeightFormat("int4", 32),
    WeightFormat("int4", 128),
    WeightFormat("int4", 64, symmetric=False),
    WeightFormat("int8"),
    WeightFormat("int8", 32),
    WeightFormat("fp8"),
    WeightFormat("fp8", block=(128, 128)),
]


def some_weight(num_outputs: int = 24, num_inputs: int = 256, seed: int = 0) -> torch.Tensor:
    """Heavy tails, one row of zeros, one group of equal values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_outputs, num_inputs)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight *= torch.exp(0.5 * torch.randn(shape, generator=generator))
    weight[1] = 0
    weight[2, :32] = 0.5
    return weight


def theirs(format: WeightFormat) -> Any:
    """The same format in compressed-tensors' words."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    strategy = "block" if format.block else "group" if format.group_size else "channel"
    return quantization.QuantizationArgs(
        num_bits=format.bits,
        type="float" if format.name == "fp8" else "int",
        symmetric=format.symmetric,
        strategy=strategy,
        group_size=format.group_size,
        block_structure=list(format.block) if format.block else None,
    )


@pytest.mark.parametrize("format", ALL, ids=str)
def test_scales_are_those_of_compressed_tensors(format: WeightFormat) -> None:
    """Before the rounding to bf16 differs; the zero row is apart: any scale serves it."""
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    groups = to_groups(some_weight(), format)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale, zero = helpers.calculate_qparams(low, high, theirs(format))
    has_values = high > low
    ours, our_zero = spanned_scales(groups, format)
    assert torch.equal(ours[has_values], scale[has_values].to(SCALE_DTYPE).float())
    if our_zero is not None:
        # Their zero points belong to the scale before its rounding: off by one at most.
        assert (our_zero - zero)[has_values].abs().max() <= 1
        assert (our_zero == zero)[has_values].float().mean() > 0.9


@pytest.mark.parametrize("format", ALL, ids=str)
@pytest.mark.parametrize("searches", [False, True])
def test_codes_and_values_are_those_of_compressed_tensors(
    format: WeightFormat, searches: bool
) -> None:
    """With our scales, their quantize and dequantize give our codes and our values."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = some_weight(256)
    ours = round_weight(weight, format, searches=searches)
    zero = None if ours.zero is None else ours.zero.float()
    scale, args = ours.scale.float(), theirs(format)
    codes = forward.quantize(weight, scale, zero, args, dtype=ours.codes.dtype)
    assert torch.equal(codes.float(), ours.codes.float())
    values = forward.dequantize(codes, scale, zero, args, dtype=torch.float32)
    torch.testing.assert_close(values, ours.dequantize(), atol=1e-7, rtol=0)


def rounded_by_loop(weight: torch.Tensor, format: WeightFormat) -> list[list[float]]:
    """int formats, one value after the other, in Python's own numbers."""
    least, greatest = code_range(format)
    size, rows = format.group_size or weight.shape[1], []
    for row in weight.tolist():
        values: list[float] = []
        for start in range(0, len(row), size):
            group = row[start : start + size]
            low, high = min([0.0, *group]), max([0.0, *group])
            if format.symmetric:
                span = 2 * max(high, -low)
            else:
                span = high - low
            scale = torch.tensor(span / (greatest - least)).bfloat16().item() or 1.0
            zero = 0 if format.symmetric else round(least - low / scale)
            for value in group:
                code = min(greatest, max(least, round(value / scale + zero)))
                values.append((code - zero) * scale)
        rows.append(values)
    return rows


@pytest.mark.parametrize("format", [f for f in ALL if f.name != "fp8"], ids=str)
def test_plain_rounding_is_the_loop(format: WeightFormat) -> None:
    # Multiples of 1/256 divide without a rounding of their own, so both sides see the same ties.
    weight = (some_weight(6) * 256).round() / 256
    ours = round_weight(weight, format).dequantize()
    by_loop = torch.tensor(rounded_by_loop(weight, format))
    assert (ours - by_loop).abs().max() < 1e-6


def error(quantized: QuantizedWeight, weight: torch.Tensor, counts: Any = 1.0) -> float:
    return float(((quantized.dequantize() - weight).square() * counts).sum())


@pytest.mark.parametrize("format", ALL, ids=str)
def test_search_errs_no_more_anywhere(format: WeightFormat) -> None:
    """In every group, and in the whole by a margin for int4."""
    weight = some_weight(64)
    plain, searched = (round_weight(weight, format, searches=s) for s in (False, True))
    errors = [
        to_groups((q.dequantize() - weight).square(), format).double().sum(dim=1)
        for q in (plain, searched)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5) + 1e-12).all())
    if format.name == "int4":
        assert errors[1].sum() < errors[0].sum() * 0.97


def test_search_finds_what_a_fine_grid_finds() -> None:
    """One group, every scale of both signs in fine steps: the search comes within 3%."""
    format = WeightFormat("int4", 32)
    weight = some_weight(32, 32, seed=3)[3:]
    searched = round_weight(weight, format, searches=True)
    for row, ours in zip(weight, searched.dequantize(), strict=True):
        scales = row.abs().max() / 8 * torch.linspace(0.5, 1.3, 400)
        scales = torch.cat([scales, -scales]).bfloat16().float().unsqueeze(1)
        values = (row / scales).round().clamp(-8, 7) * scales
        best = (values - row).square().sum(1).min()
        assert (ours - row).square().sum() <= best * 1.03


@pytest.mark.parametrize("format", ALL, ids=str)
def test_importance_moves_the_error_elsewhere(format: WeightFormat) -> None:
    weight = some_weight(128)
    counts = torch.ones(256)
    counts[::4] = 100.0
    plain = round_weight(weight, format, searches=True)
    weighted = round_weight(weight, format, searches=True, importance=counts)
    assert error(weighted, weight, counts) <= error(plain, weight, counts) * (1 + 1e-5)
    if format.name == "int4":
        assert error(weighted, weight, counts) < 0.95 * error(plain, weight, counts)


def test_search_finds_zero_points_a_fine_grid_finds() -> None:
    """Every scale in fine steps with every zero point: within 5% on average, 20% at worst."""
    format = WeightFormat("int4", 32, symmetric=False)
    weight = some_weight(48, 32, seed=4)[3:]
    weight[:20] += 0.03
    searched = round_weight(weight, format, searches=True)
    ratios = []
    for row, ours in zip(weight, searched.dequantize(), strict=True):
        span = max(row.max(), 0) - min(row.min(), 0)
        scales = (span / 15 * torch.linspace(0.5, 1.1, 200)).bfloat16().float().view(-1, 1, 1)
        zeros = torch.arange(-8, 8).view(1, -1, 1)
        values = ((row / scales + zeros).round().clamp(-8, 7) - zeros) * scales
        best = (values - row).square().sum(2).min()
        ratios.append(float((ours - row).square().sum() / best))
    assert sum(ratios) / len(ratios) < 1.05
    assert max(ratios) < 1.2


@pytest.mark.parametrize("format", ALL, ids=str)
def test_chunks_do_not_show(format: WeightFormat) -> None:
    """A weight larger than a chunk is its rows one by one (blocks: 128 by 128)."""
    weight = some_weight(300, 2048)
    whole = round_weight(weight, format, searches=True)
    assert whole.shape == (300, 2048)
    step = 128
    parts = [round_weight(weight[i : i + step], format, searches=True) for i in range(0, 300, step)]
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize("format", [each for each in ALL if each.name == "fp8"], ids=str)
def test_scales_of_fp8_are_positive(format: WeightFormat) -> None:
    """As everybody else writes them, whichever side of zero reaches further."""
    for sign in (1, -1):
        weight = sign * some_weight(64).abs()
        assert bool((round_weight(weight, format, searches=True).scale > 0).all())


def test_shapes_types_and_edges() -> None:
    ragged = round_weight(some_weight(130, 256), WeightFormat("fp8", block=(128, 128)))
    assert ragged.scale.shape == (2, 2)
    assert ragged.codes.dtype == torch.float8_e4m3fn
    for format in ALL:
        zeros = round_weight(torch.zeros(4, 128), format, searches=True)
        assert zeros.scale.dtype == torch.bfloat16
        assert zeros.dequantize().count_nonzero() == 0
        huge = torch.full((2, 128), 3e38)
        assert torch.isfinite(round_weight(huge, format, searches=True).dequantize()).all()
    bf16 = some_weight().bfloat16()
    assert torch.equal(
        round_weight(bf16, ALL[0]).dequantize(), round_weight(bf16.float(), ALL[0]).dequantize()
    )


def test_what_divides() -> None:
    assert divides(WeightFormat("int4", 32), 96)
    assert not divides(WeightFormat("int4", 64), 96)
    assert not divides(WeightFormat("int8"), 20)
    assert divides(WeightFormat("fp8"), 24)
    assert not divides(WeightFormat("fp8", block=(128, 128)), 192)
