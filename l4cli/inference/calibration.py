"""Quantize a checkpoint's layers against real text: the calibrated `Quantizer`.

in: a `CalibrationWalk` at the first layer; out: codes, map by map; what was lost, token counts
Each layer is shown what the quantized layers below it give.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from l4cli.inference.calibration_walk import CalibrationWalk, place_in_layer
from l4cli.quantization import QuantizedWeight, WeightFormat, divides, round_weight
from l4cli.quantization.budget import Sensitivity
from l4cli.quantization.gptq import DAMPING, calibrate_weight
from l4cli.quantization.hessian import Factor, Hessian
from l4cli.quantization.parts import layer_of


class CalibratedQuantizer:
    """GPTQ on the inputs that each map gets while the text goes through the quantized model."""

    def __init__(self, walk: CalibrationWalk, damping: float = DAMPING) -> None:
        self.walk, self.damping = walk, damping
        self.errors: dict[str, float] = {}  # squared error of a map's outputs over their square
        self.notes: dict[str, str] = {}  # what was unusual

    def quantize_layer(
        self,
        layer_idx: int | None,
        weights: Mapping[str, Tensor],
        choices: Mapping[str, WeightFormat],
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        """See `Quantizer`."""
        if layer_idx is None:
            yield from self._outside(weights, choices)
            return
        names = {place_in_layer(name): name for name in choices}
        for places, hessian in self.walk.layer(layer_idx, names.keys()):
            factor = Factor(hessian, self.damping)
            for place in places:
                name = names.pop(place)
                made = calibrate_weight(weights[name], hessian, choices[name], factor)
                self.errors[name] = made.error
                if made.note:
                    self.notes[name] = made.note
                self.walk.replace(layer_idx, place, made.weight.dequantize())
                yield name, _on_cpu(made.weight)
        assert not names, f"no inputs for {list(names)[:3]}"

    def _outside(
        self, weights: Mapping[str, Tensor], choices: Mapping[str, WeightFormat]
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        """The head sees the last states; vision sees no text and is rounded."""
        for name, format in choices.items():
            if not name.endswith("lm_head"):
                yield name, round_weight(weights[name], format, searches=True)
                continue
            made = calibrate_weight(weights[name], self.walk.head(), format, damping=self.damping)
            self.errors[name] = made.error
            yield name, _on_cpu(made.weight)

    def report(self) -> dict[str, Any]:
        """What a person wants to know of the calibration, for JSON."""
        return {
            "method": "gptq",
            "calibration_tokens": int(self.walk.walk.is_real_M.sum()),
            "output_errors": self.errors,
            "notes": self.notes,
            "coverage": [asdict(each) for each in self.walk.coverage],
        }


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    """As it will be written."""
    zero = None if weight.zero is None else weight.zero.cpu()
    return QuantizedWeight(weight.format, weight.codes.cpu(), weight.scale.cpu(), zero)


def measure_sensitivity(
    walk: CalibrationWalk, names: Collection[str], formats: Sequence[WeightFormat]
) -> dict[str, Sensitivity]:
    """What the outputs of decoder maps lose in each format, on the inputs of the plain model."""
    layers: dict[int, dict[str, str]] = {}
    for name in names:
        layer_idx = layer_of(name)
        assert layer_idx is not None, name
        layers.setdefault(layer_idx, {})[place_in_layer(name)] = name
    found = {}
    for layer_idx in sorted(layers):
        for places, hessian in walk.layer(layer_idx, layers[layer_idx].keys()):
            for place in places:
                weight_OI = walk.weight(layer_idx, place).float()
                found[layers[layer_idx][place]] = _sensitivity(weight_OI, hessian, formats)
    return found


def _sensitivity(
    weight_OI: Tensor, hessian: Hessian, formats: Sequence[WeightFormat]
) -> Sensitivity:
    errors = {}
    for format in formats:
        if divides(format, weight_OI.shape[1]):
            made = round_weight(weight_OI, format, searches=True, importance=hessian.importance)
            errors[format] = hessian.error(weight_OI - made.dequantize().to(weight_OI.device))
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    return Sensitivity(shape, hessian.error(weight_OI), errors)
