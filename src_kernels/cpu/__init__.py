"""C++ kernels for CPUs behind a plain C interface; nothing of torch, nothing done when imported.

out: `load()`, the library with its functions declared, or the reason why there is none
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from src_kernels.cpu.compiling import LIBRARY, cached_library, compile_in_cache, compiler

LAYOUT_VERSION = 1
FP32, BF16, INT8, INT4 = range(4)  # kinds of weights: L4_FP32 ... in linear.h
AS_FP32, AS_BF16, AS_INT8 = range(3)  # forms of rows: L4_AS_FP32 ...


class Weight(ctypes.Structure):
    """L4Weight of linear.h; `data` must be kept alive by the caller."""

    _fields_ = (
        ("data", c_void_p),
        ("kind", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("group", c_int32),
        ("has_zero", c_int32),
    )


_GIVEN = (POINTER(Weight), c_void_p, c_int64, c_int32)  # weight, rows, their stride and number
_TO = (c_void_p, c_int64, c_void_p, c_int32)  # y, its stride, scratch, threads
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "l4_layout_version": (c_int32, []),
    "l4_cpu_isa": (c_char_p, []),
    "l4_cpu_isa_error": (c_char_p, []),
    "l4_cpu_use_isa": (c_int32, [c_char_p]),
    "l4_weight_bytes": (c_int64, [c_int32] * 5),
    "l4_rows_bytes": (c_int64, [c_int32] * 3),
    "l4_linear": (c_int32, [*_GIVEN, *_TO]),
    "l4_linear_at": (c_int32, [*_GIVEN, c_void_p, c_int32, *_TO]),
    "l4_read": (c_uint64, [c_void_p, c_int64, c_int32]),
}


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library; a reason when it cannot be had. Compiles into the user's cache if it must."""
    installed = _open(LIBRARY) if LIBRARY.exists() else "not installed with the package"
    if not isinstance(installed, str):
        return installed
    made = compile_in_cache()
    if isinstance(made, str):
        return f"{installed}, and {made}"
    return _open(made)


def must_compile() -> bool:
    """Whether `load` will compile first, which takes a while."""
    return not LIBRARY.exists() and not cached_library().exists() and compiler() is not None


def _open(path: Path) -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"cannot load `{path}`: {error}"
    version = library.l4_layout_version()
    if version != LAYOUT_VERSION:
        return f"`{path}` is of another version ({version}, not {LAYOUT_VERSION})"
    return library
