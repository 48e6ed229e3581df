"""Attention in Triton: results in the interpreter, instructions in what is compiled for GPUs."""

from __future__ import annotations

import pytest
from triton_harness import (
    ARCHES,
    TENSOR_CORES,
    Compiled,
    Kernel,
    assert_sound,
    compile_all,
    needs_triton,
    run_interpreted,
)

torch = pytest.importorskip("torch")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@needs_triton
def test_results_in_the_interpreter() -> None:
    run_interpreted("interpreted_attention.py")


def segment_kernels(dtype: torch.dtype, head_dim: int, arch: int) -> list[Kernel]:
    """As `_SegmentAttention` launches them."""
    from src_kernels.cuda.segments import choose_sizes

    pointer = "*" + SHORT[str(dtype).removeprefix("torch.")]
    strides = ["q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "out_row"]
    tensors = {
        "segments_forward": ["q", "k", "v", "out"],
        "segments_dq": ["q", "k", "v", "out", "grad", "dq"],
        "segments_dkv": ["q", "k", "v", "grad", "dk", "dv"],
    }
    kernels = []
    for (name, names), size in zip(
        tensors.items(), choose_sizes(dtype, head_dim, arch), strict=True
    ):
        own_strides = [*strides, "kv_row"] if name == "segments_dkv" else strides
        signature = dict.fromkeys(names, pointer) | {"lse": "*fp32", "tiles": "*i32"}
        if name != "segments_forward":
            signature["delta"] = "*fp32"
        signature |= dict.fromkeys([*own_strides, "num_positions", "num_heads", "group"], "i32")
        signature["scale"] = "fp32"
        constants = {
            "HEAD_DIM": head_dim,
            "BLOCK_H": 1 << (head_dim - 1).bit_length(),
            "OWN": size.own,
            "OTHER": size.other,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }
        kernels.append(
            Kernel(
                f"src_kernels.cuda.segments:{name}", signature, constants, tuple(own_strides),
                size.num_warps, size.num_stages, arch,
            )
        )  # fmt: skip
    return kernels


@needs_triton
def test_segments_compile_to_tensor_cores_without_spills() -> None:
    kernels = [
        kernel
        for arch in ARCHES
        for head_dim in (64, 128)
        for kernel in segment_kernels(torch.bfloat16, head_dim, arch)
    ]
    for compiled in compile_all(kernels):
        assert_sound(compiled, dot=True)


@needs_triton
def test_segments_in_fp32_compile_without_spills() -> None:
    """Without tensor cores: products stay exact."""
    for compiled in compile_all(segment_kernels(torch.float32, 128, 90)):
        assert_sound(compiled)
        assert compiled.count(*TENSOR_CORES, "HMMA") == 0


def split_kernel(bits: int, rows: int, head_dim: int, arch: int) -> Kernel:
    """As `attend_parts` launches it, in bf16."""
    kept, numbers = "*bf16", ["num_tokens", "span", "num_rows"]
    strides = ["key_head", "key_token", "value_head", "value_token"]
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_R": rows, "BLOCK_S": 64, "HAS_FACTOR": True,
        "PRECISION": "tf32",
    }  # fmt: skip
    levels: list[str] = []
    if bits:
        kept, levels = "*u8", ["key_scale", "key_low", "value_scale", "value_low"]
        strides = ["key_head", "value_head", "level_head", "value_level_head"]
        constants |= {"BITS": bits, "BLOCK_HALF": head_dim // 2}
    else:
        constants["BLOCK_H"] = head_dim
    signature = {"q": "*bf16", "keys": kept, "values": kept, "scale": "fp32"}
    signature |= dict.fromkeys(["factor", "out", "lse"], "*fp32")
    signature |= dict.fromkeys(levels, "*fp16") | dict.fromkeys([*numbers, *strides], "i32")
    name = "src_kernels.cuda.decode:" + ("split_codes" if bits else "split_plain")
    return Kernel(name, signature, constants, (*strides, "span"), 4, 3, arch)


@needs_triton
def test_splits_compile_to_tensor_cores_without_spills() -> None:
    """Of 16 rows a warp's product is enough; 64 are a whole warp group's."""
    kinds = [(bits, rows, arch) for arch in ARCHES for bits in (0, 8, 4) for rows in (16, 64)]
    found = compile_all([split_kernel(bits, rows, 128, arch) for bits, rows, arch in kinds])
    for (_, rows, _), compiled in zip(kinds, found, strict=True):
        assert_sound(compiled, dot=True, cores=("HMMA",) if rows == 16 else TENSOR_CORES)


@needs_triton
def test_merging_compiles_without_spills() -> None:
    signature = dict.fromkeys(["out", "lse", "merged", "merged_lse"], "*fp32")
    signature |= dict.fromkeys(["num_splits", "num_rows"], "i32")
    constants = {"HEAD_DIM": 128, "BLOCK_H": 128, "GROUP": 128, "AT_ONCE": 32}
    name = "src_kernels.cuda.decode:merge_splits"
    found: list[Compiled] = compile_all(
        [Kernel(name, signature, constants, arch=arch) for arch in ARCHES]
    )
    for compiled in found:
        assert_sound(compiled)
