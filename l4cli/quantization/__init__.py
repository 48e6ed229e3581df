"""Number formats of weights, and how values are rounded into them."""

from l4cli.quantization.formats import FORMATS, QuantizedWeight, WeightFormat

__all__ = ["FORMATS", "QuantizedWeight", "WeightFormat"]
