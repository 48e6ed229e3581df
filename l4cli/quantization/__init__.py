"""Number formats of weights, and how values are rounded into them."""

from l4cli.quantization.formats import FORMATS, QuantizedWeight, WeightFormat
from l4cli.quantization.quantizer import Quantizer, RoundingQuantizer
from l4cli.quantization.rounding import divides, round_weight

__all__ = [
    "FORMATS",
    "QuantizedWeight",
    "Quantizer",
    "RoundingQuantizer",
    "WeightFormat",
    "divides",
    "round_weight",
]
