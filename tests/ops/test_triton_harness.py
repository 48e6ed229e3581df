"""What Triton kernels are judged with is itself right: bf16 products, instructions, refusals."""

from __future__ import annotations

import pytest
from triton_harness import (
    Compiled,
    Kernel,
    assert_sound,
    compile_for_each_gpu,
    needs_triton,
    run_interpreted,
)

POINTERS = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}


@needs_triton
def test_bf16_products_are_right_in_the_interpreter() -> None:
    run_interpreted("interpreted_harness.py")


@needs_triton
def test_tensor_cores_are_found_in_compiled_kernels() -> None:
    kernel = Kernel("tiny_kernels:product", POINTERS, {"BLOCK": 64}, divisible=("K",))
    hopper, blackwell = compile_for_each_gpu(kernel)
    assert_sound(hopper, dot=True, cores=("HGMMA",))
    assert_sound(blackwell, dot=True, cores=("UTCHMMA",))
    assert hopper.shared >= 2 * 64 * 64 * 2  # at least one stage of both operands
    with pytest.raises(AssertionError, match="has no"):
        assert_sound(hopper, dot=True, cores=("QGMMA",))


def test_spills_and_too_much_shared_memory_are_refused() -> None:
    with pytest.raises(AssertionError, match="spills"):
        assert_sound(Compiled("k", 90, 0, {"STL": 1}))
    with pytest.raises(AssertionError):
        assert_sound(Compiled("k", 90, 300_000, {"FADD": 1}))
