"""The whole decoder in C++: engine.h's structures and functions as ctypes sees them.

out: `load()`, the library with the engine's functions declared, or the reason why there is none
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p

import src_kernels.cpu as kernels
from src_kernels.cpu import Weight

ENGINE_VERSION = 1
KEPT_FP32, KEPT_BF16, KEPT_INT8, KEPT_INT4 = range(4)  # L4_KEPT_FP32 ... in vector.h


class Part(Structure):
    """L4Part: keys and values of a run of tokens; tensors are kept alive by the caller."""

    _fields_ = (
        ("kind", c_int32),
        ("value_groups", c_int32),
        ("length", c_int64),
        ("head_stride", c_int64),
        ("key_scale_stride", c_int64),
        ("value_scale_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scale", c_void_p),
        ("key_low", c_void_p),
        ("value_scale", c_void_p),
        ("value_low", c_void_p),
    )


class Past(Structure):
    """L4Past: one layer's parts of one sequence."""

    _fields_ = (
        ("parts", POINTER(Part)),
        ("num_parts", c_int32),
        ("num_sealed", c_int32),
        ("sealed_id", c_int64),
    )


class Layer(Structure):
    """L4Layer."""

    _fields_ = (
        ("q", Weight),
        ("k", Weight),
        ("v", Weight),
        ("o", Weight),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("softmax_scale", c_void_p),
        ("uses_rope", c_int32),
        ("unit_norm", c_int32),
        ("turn", c_int32),
        ("is_moe", c_int32),
        ("gate", Weight),
        ("up", Weight),
        ("down", Weight),
        ("router", c_void_p),
        ("experts", POINTER(Weight)),
    )


class Model(Structure):
    """L4Model."""

    _fields_ = (
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("num_layers", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("width", c_int32),
        ("dense_width", c_int32),
        ("eps", c_float),
        ("is_prefetched", c_int32),
        ("layers", POINTER(Layer)),
        ("norm", c_void_p),
    )


class Step(Structure):
    """L4Step: one new token of each of several sequences."""

    _fields_ = (
        ("num_rows", c_int32),
        ("threads", c_int32),
        ("h", c_void_p),
        ("turns", c_void_p),
        ("temperature", c_void_p),
        ("log_length", c_void_p),
        ("pasts", c_void_p),
        ("hidden", c_void_p),
        ("router_logits", c_void_p),
        ("experts", c_void_p),
        ("scratch", c_void_p),
    )


class Run(Structure):
    """L4Run: a run of tokens in one layer."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("threads", c_int32),
        ("first_query", c_int32),
        ("h", c_void_p),
        ("turns", c_void_p * 2),
        ("temperature", c_void_p),
        ("log_length", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("kept_k", c_void_p),
        ("kept_v", c_void_p),
        ("kept_kind", c_int32),
        ("out", c_void_p),
        ("router_logits", c_void_p),
        ("experts", c_void_p),
        ("scratch", c_void_p),
    )


class Attend(Structure):
    """L4Attend: attention of a run of new tokens of one sequence."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("threads", c_int32),
        ("num_parts", c_int32),
        ("parts", POINTER(Part)),
        ("fresh", Part),
        ("q", c_void_p),
        ("out", c_void_p),
        ("scratch", c_void_p),
    )


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "l4_engine_version": (c_int32, []),
    "l4_vector_isa": (c_char_p, []),
    "l4_step_bytes": (c_int64, [POINTER(Model), c_int32, c_int32]),
    "l4_layer_bytes": (c_int64, [POINTER(Model), c_int32, c_int32]),
    "l4_step": (None, [POINTER(Model), POINTER(Step)]),
    "l4_before_attention": (None, [POINTER(Model), c_int32, POINTER(Run)]),
    "l4_after_attention": (None, [POINTER(Model), c_int32, POINTER(Run)]),
    "l4_attend_bytes": (c_int64, [POINTER(Model), c_int32]),
    "l4_attend": (None, [POINTER(Model), POINTER(Attend)]),
    "l4_final_norm": (None, [POINTER(Model), c_void_p, c_int64, c_void_p]),
}


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library; a reason when it cannot be had."""
    library = kernels.load()
    if isinstance(library, str):
        return library
    try:
        if library.l4_engine_version() != ENGINE_VERSION:
            return f"the library is of another version ({library.l4_engine_version()})"
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        return f"the library lacks the engine: {error}"
    return library
