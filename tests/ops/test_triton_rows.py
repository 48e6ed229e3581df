"""Norms, rotation, SwiGLU and the loss in Triton: interpreted for results, compiled for GPUs."""

from __future__ import annotations

import pytest
from triton_harness import (
    Kernel,
    assert_sound,
    compile_for_each_gpu,
    needs_triton,
    run_interpreted,
)

torch = pytest.importorskip("torch")


@needs_triton
def test_results_in_the_interpreter() -> None:
    run_interpreted("interpreted_rows.py")


def kernel(
    name: str, tensors: dict[str, str], numbers: str, constants: dict[str, object], warps: int
) -> Kernel:
    """`numbers` are int32 and multiples of 16, as the strides and widths of real models are."""
    names = numbers.split()
    signature = {**tensors, **dict.fromkeys(names, "i32")}
    return Kernel(
        f"src_kernels.cuda.{name}", signature, constants, tuple(names), warps, num_stages=3
    )


@needs_triton
@pytest.mark.parametrize("width", [256, 8192])
def test_norms_compile_without_spills(width: int) -> None:
    from src_kernels.cuda.norm import num_warps

    both = {"x": "*bf16", "weight": "*fp32", "eps": "fp32"}
    back = {**both, "grad": "*bf16", "dx": "*bf16", "dweight": "*fp32"}
    constants, warps = {"BLOCK": width}, num_warps(width)
    for compiled in compile_for_each_gpu(
        kernel(
            "norm:norm_forward", {**both, "out": "*bf16"}, "row_stride num_cols", constants, warps
        ),
        kernel(
            "norm:norm_backward", back, "row_stride grad_stride num_rows num_cols stripe",
            constants, warps,
        ),
    ):  # fmt: skip
        assert_sound(compiled)


@needs_triton
def test_rotation_and_swiglu_compile_without_spills() -> None:
    numbers = "length batch_stride row_stride head_stride turn_batch turn_row num_heads head_dim"
    both = {"x": "*bf16", "turn": "*fp32", "eps": "fp32"}
    heads = {"BLOCK_N": 64, "BLOCK_H": 128}
    back = {**both, "grad": "*bf16", "dx": "*bf16"}
    halves = {"gate": "*bf16", "up": "*bf16"}
    grads = dict.fromkeys(["grad", "dgate", "dup"], "*bf16")
    for compiled in compile_for_each_gpu(
        kernel("rotate:rotate_forward", {**both, "out": "*bf16"}, numbers, heads, 8),
        kernel("rotate:rotate_backward", back, numbers, heads, 8),
        kernel(
            "swiglu:swiglu_forward", {**halves, "out": "*bf16"},
            "gate_stride up_stride num_cols", {"BLOCK": 1024}, 4,
        ),
        kernel(
            "swiglu:swiglu_backward", {**halves, **grads},
            "gate_stride up_stride grad_stride num_cols", {"BLOCK": 1024}, 4,
        ),
    ):  # fmt: skip
        assert_sound(compiled)


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_loss_compiles_to_tensor_cores_without_spills(dtype: str) -> None:
    from src_kernels.cuda.cross_entropy import options

    constants = options(torch.bfloat16 if dtype == "bf16" else torch.float32)
    warps = constants.pop("num_warps")
    del constants["num_stages"]
    both = {"h": f"*{dtype}", "weight": f"*{dtype}", "labels": "*i64", "lse": "*fp32"}
    sizes = "num_rows num_cols num_dims h_row weight_row"
    for compiled in compile_for_each_gpu(
        kernel(
            "cross_entropy:sums_forward", {**both, "target": "*fp32"}, f"{sizes} span",
            constants, warps,
        ),
        kernel(
            "cross_entropy:grad_block", {**both, "scales": "*fp32", "out": f"*{dtype}"},
            f"{sizes} first_col out_row", constants, warps,
        ),
    ):  # fmt: skip
        assert_sound(compiled, dot=dtype == "bf16")
