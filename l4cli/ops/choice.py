"""Which version of an operation runs, and why; made once, shown by `l4 info --ops`.

in: the environment (`L4_OPS=reference` forces the plain PyTorch versions); out: yes or no
"""

from __future__ import annotations

import functools
import os

from l4cli.errors import UsageError, suggest

CHOICES = ("auto", "reference")


@functools.cache
def is_reference_forced() -> bool:
    """Whether the user asked for the plain versions. raises: UsageError for an unknown word"""
    word = os.environ.get("L4_OPS", "auto")
    if word not in CHOICES:
        why = "this variable chooses the versions of operations"
        raise UsageError(f"unknown `L4_OPS={word}`", why=why, fix=suggest(word, CHOICES))
    return word == "reference"


def describe() -> list[tuple[str, str, str]]:
    """Each operation, the version in use, and the reason. shapes of rows: (op, version, why)"""
    if is_reference_forced():
        return [(op, "reference", "forced by `L4_OPS=reference`") for op, _, _ in _VERSIONS]
    return list(_VERSIONS)


_VERSIONS = (
    ("rms_norm", "two-pass", "reference on CUDA in bf16, where torch fuses it"),
    ("rotate_unit", "in place", "rotation and QK norm in one"),
    ("swiglu", "recomputed", "keeps two tensors for the backward"),
    ("routed_experts", "sorted", "tokens sorted by expert; an expert's rows in one product"),
    ("segment_attention", "blocked or fused", "blocked in bf16 on a CPU up to 4096, else torch's"),
    ("packed_linear", "packed", "oneDNN's layout, made once for a model that only answers"),
    ("linear_cross_entropy", "chunked", "gradients made in the forward, 8 MiB of logits at once"),
)
