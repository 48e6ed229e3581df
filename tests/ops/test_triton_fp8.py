"""Fp8 experts in Triton: right in the interpreter, fp8 tensor cores and no spills compiled."""

from __future__ import annotations

from triton_harness import (
    Kernel,
    assert_sound,
    compile_for_each_gpu,
    needs_triton,
    run_interpreted,
)

FP8 = "src_kernels.cuda.fp8:"
GROUPS = {"slots_ptr": "*i32", "ends_ptr": "*i32", "tile_ends_ptr": "*i32"}
PRODUCT = {
    **{"a_ptr": "*fp8e4nv", "a_scale_ptr": "*fp32", "w_ptr": "*fp8e4nv", "w_scale_ptr": "*fp32"},
    **{"y_ptr": "*bf16", **GROUPS, "num_tiles": "i32", "E": "i32", "K": "i32", "N": "i32"},
    **{"w_scale_k": "i32", "w_scale_n": "i32"},
}


@needs_triton
def test_in_the_interpreter() -> None:
    run_interpreted("interpreted_fp8.py")


@needs_triton
def test_products_compiled_for_hopper_and_blackwell() -> None:
    fixed = {"E_POWER": 16, "BN": 128}
    kernels = [
        Kernel(
            FP8 + "rows_product",
            PRODUCT,
            {**fixed, "TOP_K": top_k, "SCATTERS": scatters, "BM": rows},
            divisible=("K", "N"),
            num_warps=warps,
        )
        for top_k, scatters, rows, warps in ((1, False, 128, 8), (0, True, 64, 4))
    ]
    for compiled in compile_for_each_gpu(*kernels):
        cores = ("QGMMA",) if compiled.arch == 90 else ("UTCQMMA",)
        assert_sound(compiled, dot=True, cores=cores)


@needs_triton
def test_rounding_compiled_for_hopper_and_blackwell() -> None:
    codes, scale = {"codes_ptr": "*fp8e4nv"}, {"scale_ptr": "*fp32"}
    rows = {"x_ptr": "*bf16", **codes, **scale, "M": "i32", "K": "i32"}
    blocks = {"w_ptr": "*fp32", **codes, "turned_ptr": "*fp8e4nv", **scale}
    blocks |= {"K": "i32", "N": "i32"}
    hidden = {"h_ptr": "*bf16", "gate_ptr": "*fp32", "slots_ptr": "*i32", "R": "i32", "F": "i32"}
    back = {**hidden, **codes, **scale, "da_ptr": "*bf16", "a_ptr": "*bf16", "dh_ptr": "*bf16"}
    back |= {"dgate_ptr": "*fp32"}
    few, divisible = {"BM": 16}, ("K", "N", "F")
    kernels = [
        Kernel(FP8 + "quantize_rows_kernel", rows, few, divisible),
        Kernel(FP8 + "quantize_blocks_kernel", blocks, {}, divisible),
        Kernel(FP8 + "swiglu_codes_kernel", {**hidden, **codes, **scale}, few, divisible),
        Kernel(FP8 + "swiglu_gradient_kernel", back, few, divisible),
    ]
    for compiled in compile_for_each_gpu(*kernels):
        assert_sound(compiled)
        assert compiled.count("F2FP") > 0  # the hardware's own rounding to fp8
