"""GPTQ: against a plain loop over the inverse Hessian, against rounding, on broken Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l4cli.quantization import QuantizedWeight, WeightFormat, round_weight
from l4cli.quantization.gptq import DAMPING, calibrate_weight, relative_error
from l4cli.quantization.hessian import Factor, Hessian
from l4cli.quantization.rounding import code_range
from l4cli.quantization.settling import settle

FORMATS = [
    WeightFormat("int4", 32),
    WeightFormat("int4", 32, symmetric=False),
    WeightFormat("int4", 128),
    WeightFormat("int8"),
    WeightFormat("int8", 64),
    WeightFormat("fp8"),
]


def problem(num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[Tensor, Hessian]:
    """Inputs that go together and differ in size, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    size = torch.rand(num_inputs, generator=generator) * 3
    hessian = Hessian(num_inputs)
    hessian.add(torch.randn(3 * num_inputs, num_inputs, generator=generator) @ mixing * size)
    return torch.randn(num_outputs, num_inputs, generator=generator), hessian


def plain_codes(weight: Tensor, hessian: Hessian, made: QuantizedWeight) -> Tensor:
    """Rounds one input after the other and takes each out of the whole inverse, in fp64."""
    matrix = hessian.matrix.double()
    order = matrix.diagonal().argsort(descending=True, stable=True).tolist()
    mean = float(matrix.diagonal().mean())
    inverse = torch.linalg.inv(matrix + DAMPING * mean * torch.eye(len(matrix)))
    rest, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    least, greatest = code_range(made.format)
    for i in order:
        group = i // (made.format.group_size or len(matrix))
        scale = made.scale[:, group].double()
        zero = 0 if made.zero is None else made.zero[:, group].double()
        code = (rest[:, i] / scale + zero).clamp(least, greatest)
        code = code.float().to(torch.float8_e4m3fn).double() if _is_fp8(made) else code.round()
        codes[:, i] = code
        error = (rest[:, i] - (code - zero) * scale) / inverse[i, i]
        rest -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    return codes


def _is_fp8(made: QuantizedWeight) -> bool:
    return made.format.name == "fp8"


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_equals_the_plain_loop(format: WeightFormat) -> None:
    # 256 inputs: two blocks of lazy updates.
    weight, hessian = problem(24, 256)
    made = calibrate_weight(weight, hessian, format, settles=False).weight
    assert torch.equal(made.codes.double(), plain_codes(weight, hessian, made))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_beats_rounding_with_the_same_scales(format: WeightFormat) -> None:
    weight, hessian = problem(48, 256, seed=1)
    made = calibrate_weight(weight, hessian, format, settles=False)
    importance = hessian.importance
    rounded = round_weight(weight, format, searches=True, importance=importance)
    assert torch.equal(made.weight.scale, rounded.scale)
    assert made.error < 0.8 * relative_error(weight, rounded, hessian)
    plain = relative_error(weight, round_weight(weight, format), hessian)
    assert made.error < 0.6 * plain


@pytest.mark.parametrize("format", [f for f in FORMATS if f.name != "fp8"], ids=str)
def test_settling_errs_less(format: WeightFormat) -> None:
    weight, hessian = problem(6, 256, seed=2)
    before = calibrate_weight(weight, hessian, format, settles=False)
    made = calibrate_weight(weight, hessian, format)
    assert made.error < 0.98 * before.error
    matrix = hessian.matrix.double()
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(256)

    def errors(quantized: QuantizedWeight) -> Tensor:
        difference = quantized.dequantize().double() - weight
        return ((difference @ damped) * difference).sum(1)

    assert bool((errors(made.weight) <= errors(before.weight) * (1 + 1e-6)).all())
    # More rounds go on falling, as descent does.
    again = settle(weight, hessian, made.weight, DAMPING)
    assert bool((errors(again) <= errors(made.weight) * (1 + 1e-6)).all())
    # The last column was chosen beside all others as they are: no other code serves better.
    least, greatest = code_range(format)
    for step in (-1, 1):
        codes = made.weight.codes.clone()
        codes[:, -1] = (codes[:, -1].int() + step).clamp(least, greatest).to(torch.int8)
        other = QuantizedWeight(format, codes, made.weight.scale, made.weight.zero)
        assert bool((errors(other) >= errors(made.weight) * (1 - 1e-6)).all())


def test_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 64, generator=generator)
    weight = torch.randn(8, 64, generator=generator)
    hessian = Hessian(64)
    hessian.add(x.view(5, 100, 64))
    made = calibrate_weight(weight, hessian, WeightFormat("int4", 32))
    y, wrong = x @ weight.T, x @ made.weight.dequantize().T
    expected = float((wrong - y).square().sum() / y.square().sum())
    assert made.error == pytest.approx(expected, rel=1e-4)
    assert hessian.num_tokens == 500


def test_independent_inputs_leave_nothing_to_make_good() -> None:
    weight, hessian = problem(16, 64)
    hessian.matrix = hessian.matrix.diagonal().diag()
    format = WeightFormat("int4", 32)
    made = calibrate_weight(weight, hessian, format, settles=False).weight
    rounded = round_weight(weight, format, searches=True, importance=hessian.importance)
    assert torch.equal(made.codes, rounded.codes)


def test_inputs_never_used_are_rounded_by_themselves() -> None:
    weight, hessian = problem(16, 64)
    dead = [3, 40, 41]
    hessian.matrix[dead] = 0
    hessian.matrix[:, dead] = 0
    made = calibrate_weight(weight, hessian, WeightFormat("int4", 32))
    assert made.note == "3 inputs never used"
    nearest = (weight.view(16, 2, 32) / made.weight.scale.float()[..., None]).round().clamp(-8, 7)
    assert torch.equal(made.weight.codes[:, dead].float(), nearest.flatten(1)[:, dead])


def test_fewer_tokens_than_inputs_is_damped() -> None:
    weight, _ = problem(16, 64)
    hessian = Hessian(64)
    hessian.add(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)))
    format = WeightFormat("int4", 32)
    made = calibrate_weight(weight, hessian, format)
    assert made.error < relative_error(weight, round_weight(weight, format), hessian)
    assert bool(torch.isfinite(made.weight.dequantize()).all())


def test_no_inputs_at_all_is_rounding_and_says_so() -> None:
    weight, _ = problem(16, 64)
    format = WeightFormat("int4", 32)
    made = calibrate_weight(weight, Hessian(64), format)
    rounded = round_weight(weight, format, searches=True)
    assert torch.equal(made.weight.codes, rounded.codes)
    assert made.note == "no usable inputs: rounded"
    assert made.error == 0


def test_a_singular_hessian_is_damped_more_or_rounded() -> None:
    weight, _ = problem(16, 64)
    hessian = Hessian(64)
    hessian.add(torch.ones(10, 64))
    # Not positive definite even with the usual damping: what sums of squares cannot be.
    hessian.matrix -= 0.5 * torch.eye(64)
    made = calibrate_weight(weight, hessian, WeightFormat("int4", 32))
    assert made.note == "singular, damped by 0.1"
    hessian.matrix -= 100 * (torch.ones(64, 64) - torch.eye(64))
    made = calibrate_weight(weight, hessian, WeightFormat("int4", 32))
    assert made.note == "singular: rounded"
    assert bool(torch.isfinite(made.weight.dequantize()).all())


def test_factor_is_that_of_the_inverse() -> None:
    _, hessian = problem(1, 96)
    factor = Factor(hessian, DAMPING)
    assert factor.upper is not None
    upper = factor.upper.double()
    matrix = hessian.matrix.double()[factor.order][:, factor.order]
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(96)
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(96, dtype=torch.float64), atol=1e-4)
    assert torch.equal(upper, upper.triu())
