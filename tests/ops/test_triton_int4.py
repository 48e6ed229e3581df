"""Int4 experts in Triton: right in the interpreter, tensor cores and no spills compiled."""

from __future__ import annotations

from triton_harness import (
    Kernel,
    assert_sound,
    compile_for_each_gpu,
    needs_triton,
    run_interpreted,
)

ARGUMENTS = {
    **{"x_ptr": "*bf16", "gate_ptr": "*fp32", "expert_ptr": "*i32", "codes_ptr": "*u8"},
    **{"scale_ptr": "*bf16", "zero_ptr": "*u8", "y_ptr": "*fp32", "R": "i32", "WIDTH": "i32"},
    **{"num_outputs": "i32", "num_tiles": "i32", "num_groups": "i32", "groups_per_split": "i32"},
}


@needs_triton
def test_in_the_interpreter() -> None:
    run_interpreted("interpreted_int4.py")


@needs_triton
def test_maps_and_a_model_in_codes() -> None:
    run_interpreted("interpreted_coded.py")


@needs_triton
def test_compiled_for_hopper_and_blackwell() -> None:
    """Both products of an expert, in the smallest and the largest group."""
    sizes = {"SPREAD": 1, "BO": 64, "BR": 16}
    kernels = [
        Kernel(
            "src_kernels.cuda.int4:grouped_rows",
            ARGUMENTS,
            {**sizes, "SWIGLU": swiglu, "HAS_ZERO": has_zero, "G": group},
            divisible=("WIDTH", "num_outputs"),
            num_stages=4,
        )
        for swiglu, has_zero, group in ((False, False, 32), (True, True, 128))
    ]
    for compiled in compile_for_each_gpu(*kernels):
        cores = ("HGMMA", "HMMA") if compiled.arch == 90 else ("UTCHMMA", "HMMA")
        assert_sound(compiled, dot=True, cores=cores)
        # Codes are not converted from integers: that is too slow to keep up with the memory.
        # Zero points are, one for each output of a group.
        assert compiled.count("I2F", "I2FP") <= 4, compiled.instructions
