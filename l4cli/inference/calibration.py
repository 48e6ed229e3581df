"""Quantize a checkpoint's layers against real text: the calibrated `Quantizer`.

in: a `CalibrationWalk` at the first layer; out: codes, map by map; what was lost, token counts
Each layer is shown what the quantized layers below it give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from l4cli.inference.calibration_walk import CalibrationWalk, place_in_layer
from l4cli.quantization import QuantizedWeight, WeightFormat, round_weight
from l4cli.quantization.gptq import DAMPING, calibrate_weight
from l4cli.quantization.hessian import Factor


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
                yield name, made.weight
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
            yield name, made.weight

    def report(self) -> dict[str, Any]:
        """What a person wants to know of the calibration, for JSON."""
        return {
            "method": "gptq",
            "calibration_tokens": int(self.walk.walk.is_real_M.sum()),
            "output_errors": self.errors,
            "notes": self.notes,
            "coverage": [asdict(each) for each in self.walk.coverage],
        }
