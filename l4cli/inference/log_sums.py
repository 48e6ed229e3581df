"""The log of a softmax's denominator, over a whole vocabulary at every step of decoding.

in: logits fp32 [..., V]; out: ln of the sum of e^logit [...]; in C++ where there is a library
"""

from __future__ import annotations

import functools
from ctypes import CDLL

import torch
from torch import Tensor

from l4cli.ops.choice import is_reference_forced
from l4cli.ops.weight_only import why_not
from src_kernels.cpu import engine as native


@functools.cache
def _library() -> CDLL | None:
    if why_not(torch.device("cpu")) is not None:
        return None
    library = native.load()
    return None if isinstance(library, str) else library


def log_sums(logits: Tensor) -> Tensor:
    """shapes: [..., V] -> [...]"""
    library = _library()
    is_ours = logits.device.type == "cpu" and logits.dtype == torch.float32
    is_ours = is_ours and logits.is_contiguous() and not is_reference_forced()
    if library is None or not is_ours:
        return logits.logsumexp(-1)
    width = logits.shape[-1]
    start, step = logits.data_ptr(), 4 * width
    sums = [library.l4_log_sum_exp(start + i * step, width) for i in range(logits.numel() // width)]
    return torch.tensor(sums).view(logits.shape[:-1])
