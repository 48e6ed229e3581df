"""Let transformers' picture processor import torchvision beside a CPU build of torch.

PyPI's torchvision wheels hold CUDA operators, whose import fails without their schemas. Declaring
the schemas registers nothing that computes; the processor needs none of these operators.
"""

from __future__ import annotations

import importlib.util
from typing import Any

_POOLING = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
_kept: list[Any] = []  # a collected library takes its schemas with it


def declare() -> None:
    """Declare the schemas once, where torchvision is installed at all."""
    if _kept or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    library = torch.library.Library("torchvision", "DEF")
    try:
        library.define("nms(Tensor d, Tensor s, float t) -> Tensor")
        library.define("qnms(Tensor d, Tensor s, float t) -> Tensor")
        for name in _POOLING:
            library.define(f"{name}(Tensor x) -> Tensor")
            library.define(f"_{name}_backward(Tensor x) -> Tensor")
    except RuntimeError:
        pass  # a torchvision that fits this torch has declared them itself
    _kept.append(library)
