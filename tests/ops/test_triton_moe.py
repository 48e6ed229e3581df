"""Routed experts in Triton: right in the interpreter, tensor cores and no spills compiled."""

from __future__ import annotations

import pytest
from triton_harness import (
    Kernel,
    assert_sound,
    compile_for_each_gpu,
    needs_triton,
    run_interpreted,
)

MOE = "src_kernels.cuda.moe:"
GROUPS = {"slots_ptr": "*i32", "ends_ptr": "*i32", "tile_ends_ptr": "*i32"}
COUNTS = {"num_tiles": "i32", "E": "i32"}
PRODUCT = {"PRECISION": "tf32", "EVEN": True, "E_POWER": 16}
# As `tiles_for` chooses them: (rows, columns, depth, warps, stages)
LARGE, MIDDLE = (128, 128, 64, 8, 3), (64, 128, 64, 4, 4)


def kernel(
    name: str, arguments: dict[str, str], constants: dict[str, object], tiles: tuple[int, ...]
) -> Kernel:
    m, n, k, warps, stages = tiles
    sizes = {"BM": m, "BN": n, "BK": k}
    return Kernel(
        MOE + name, arguments, {**constants, **sizes}, ("D", "F", "K", "N", "M"), warps, stages
    )


def all_kernels(tiles: tuple[int, ...]) -> list[Kernel]:
    m, n, k, warps, stages = tiles
    halved = (m, n // 2, k, warps, stages)
    shape = {"D": "i32", "F": "i32"}
    up = {"x_ptr": "*bf16", "w_ptr": "*bf16", "gate_ptr": "*fp32", "a_ptr": "*bf16"}
    up |= {"h_ptr": "*bf16", **GROUPS, **COUNTS, **shape}
    down = {"a_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", **GROUPS, **COUNTS}
    down |= {"K": "i32", "N": "i32"}
    back = {"dy_ptr": "*bf16", "w_ptr": "*bf16", "gate_ptr": "*fp32", "h_ptr": "*bf16"}
    back |= {"a_ptr": "*bf16", "dh_ptr": "*bf16", "dgate_ptr": "*fp32"}
    back |= {**GROUPS, **COUNTS, **shape, "R": "i32"}
    return [
        kernel("swiglu_forward", up, {**PRODUCT, "TOP_K": 1, "KEEP": True}, halved),
        kernel("rows_product", down, {**PRODUCT, "TRANSPOSED": False}, tiles),
        kernel("rows_product", down, {**PRODUCT, "TRANSPOSED": True}, tiles),
        kernel("swiglu_backward", back, {**PRODUCT, "TOP_K": 1}, halved),
    ]


def gradients() -> list[Kernel]:
    """Of both weights, with fp32 masters."""
    outer = {"a_ptr": "*bf16", "b_ptr": "*bf16", "dw_ptr": "*fp32", "slots_ptr": "*i32"}
    outer |= {"ends_ptr": "*i32", "E": "i32", "M": "i32", "N": "i32"}
    fixed = {"PRECISION": "tf32", "EVEN": True}
    return [
        kernel("weight_gradient", outer, {**fixed, "A_TOP_K": a, "B_TOP_K": b}, LARGE)
        for a, b in ((1, 0), (0, 1))
    ]


@needs_triton
def test_in_the_interpreter() -> None:
    run_interpreted("interpreted_moe.py")


@needs_triton
@pytest.mark.parametrize("tiles", [LARGE, pytest.param(MIDDLE, marks=pytest.mark.slow)], ids=str)
def test_compiled_for_hopper_and_blackwell(tiles: tuple[int, ...]) -> None:
    kernels = all_kernels(tiles) + (gradients() if tiles == LARGE else [])
    for compiled in compile_for_each_gpu(*kernels):
        cores = ("HGMMA",) if compiled.arch == 90 else ("UTCHMMA",)
        assert_sound(compiled, dot=True, cores=cores)


@needs_triton
def test_few_rows_an_expert() -> None:
    """Sixteen rows are too few for a warpgroup's product: mma.sync (HMMA) is right there."""
    for compiled in compile_for_each_gpu(all_kernels((16, 128, 64, 4, 4))[0]):
        assert_sound(compiled, dot=True, cores=("HMMA", "HGMMA", "UTCHMMA"))
