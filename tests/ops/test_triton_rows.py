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
GRADS = ("grad", "dgate", "dup")


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


def norms(width: int) -> list[Kernel]:
    from src_kernels.cuda.norm import num_warps

    both = {"x": "*bf16", "weight": "*fp32", "eps": "fp32"}
    back = {**both, "grad": "*bf16", "dx": "*bf16", "dweight": "*fp32"}
    constants, warps = {"BLOCK": width}, num_warps(width)
    forward = {**both, "out": "*bf16"}
    strides = "row_stride grad_stride num_rows num_cols stripe"
    return [
        kernel("norm:norm_forward", forward, "row_stride num_cols", constants, warps),
        kernel("norm:norm_backward", back, strides, constants, warps),
    ]


def rotations() -> list[Kernel]:
    numbers = "length batch_stride row_stride head_stride turn_batch turn_row num_heads head_dim"
    both = {"x": "*bf16", "turn": "*fp32", "eps": "fp32"}
    heads = {"BLOCK_N": 64, "BLOCK_H": 128}
    back = {**both, "grad": "*bf16", "dx": "*bf16"}
    return [
        kernel("rotate:rotate_forward", {**both, "out": "*bf16"}, numbers, heads, 8),
        kernel("rotate:rotate_backward", back, numbers, heads, 8),
    ]


def gates() -> list[Kernel]:
    halves = {"gate": "*bf16", "up": "*bf16"}
    forward, back = {**halves, "out": "*bf16"}, {**halves, **dict.fromkeys(GRADS, "*bf16")}
    strides, block = "gate_stride up_stride num_cols", {"BLOCK": 1024}
    return [
        kernel("swiglu:swiglu_forward", forward, strides, block, 4),
        kernel("swiglu:swiglu_backward", back, f"{strides} grad_stride", block, 4),
    ]


def losses() -> list[Kernel]:
    from src_kernels.cuda.cross_entropy import options

    constants = options(torch.bfloat16)
    warps = constants.pop("num_warps")
    del constants["num_stages"]
    both = {"h": "*bf16", "weight": "*bf16", "labels": "*i64", "lse": "*fp32"}
    sizes = "num_rows num_cols num_dims h_row weight_row"
    forward = {**both, "target": "*fp32"}
    back = {**both, "scales": "*fp32", "out": "*bf16"}
    numbers = f"{sizes} first_col out_row"
    return [
        kernel("cross_entropy:sums_forward", forward, f"{sizes} span", constants, warps),
        kernel("cross_entropy:grad_block", back, numbers, constants, warps),
    ]


@needs_triton
def test_rows_compile_without_spills() -> None:
    """The widest row of a norm is the hardest."""
    for compiled in compile_for_each_gpu(*norms(8192), *rotations(), *gates()):
        assert_sound(compiled)


@needs_triton
def test_the_loss_compiles_to_tensor_cores_without_spills() -> None:
    for compiled in compile_for_each_gpu(*losses()):
        assert_sound(compiled, dot=True)
