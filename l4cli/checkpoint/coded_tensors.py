"""The tensors in which a quantized linear map is stored.

in: a module's name and its `QuantizedWeight`; out: names, dtypes, shapes; the tensors
source: compressed-tensors 0.20 (pack-quantized, float-quantized)
"""

from __future__ import annotations

import torch
from torch import Tensor

from l4cli.checkpoint.tensor_file import Spec
from l4cli.quantization import QuantizedWeight, WeightFormat
from l4cli.quantization.packing import pack_codes
from l4cli.quantization.rounding import SCALE_DTYPE, scale_shape


def coded_specs(name: str, format: WeightFormat, shape: tuple[int, int]) -> dict[str, Spec]:
    """What `coded_tensors` will give for a weight of this shape."""
    num_outputs, num_inputs = shape
    scales = scale_shape(num_outputs, num_inputs, format)
    specs: dict[str, Spec] = {f"{name}.weight_scale": (SCALE_DTYPE, scales)}
    if format.name == "fp8":
        return {f"{name}.weight": (torch.float8_e4m3fn, shape), **specs}
    words = num_inputs * format.bits // 32
    specs[f"{name}.weight_packed"] = (torch.int32, (num_outputs, words))
    specs[f"{name}.weight_shape"] = (torch.int64, (2,))
    if not format.symmetric:
        rows = -(-num_outputs * format.bits // 32)
        specs[f"{name}.weight_zero_point"] = (torch.int32, (rows, scales[1]))
    return specs


def coded_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store."""
    assert weight.scale.dtype == SCALE_DTYPE, weight.scale.dtype
    tensors = {f"{name}.weight_scale": weight.scale}
    bits = weight.format.bits
    if weight.format.name == "fp8":
        return {f"{name}.weight": weight.codes, **tensors}
    tensors[f"{name}.weight_packed"] = pack_codes(weight.codes, bits)
    tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    if weight.zero is not None:
        tensors[f"{name}.weight_zero_point"] = pack_codes(weight.zero, bits, dim=0)
    return tensors
