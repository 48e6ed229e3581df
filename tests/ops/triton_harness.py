"""Try Triton kernels where there is no GPU: run them in the interpreter, compile them offline.

Triton reads `TRITON_INTERPRET` when a kernel is decorated, so each way needs a process of its own:
- `run_interpreted("interpreted_moe.py")` runs that file's tests in the interpreter. Such a file
  calls `repair_interpreter()` before anything else.
- `compile_all([Kernel(...), ...])` compiles in a fresh process and says what came out; then
  `assert_sound(compiled, dot=True)`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED_LIMIT = 232_448  # bytes a block may use: 227 KiB on sm_90 and sm_100
ARCHES = (90, 100)
TENSOR_CORES = ("HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package `triton` is not installed"
)


# In the interpreter


def run_interpreted(file: str, *pytest_args: str) -> None:
    """Run a file of tests with `TRITON_INTERPRET=1`; its report is shown when one fails."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "L4_OPS": "triton"}
    call = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run([*call, *pytest_args], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout, done.stdout


def repair_interpreter() -> None:
    """Make bf16 and fp8 right in Triton 3.9's interpreter, as GPUs compute them.

    `tl.dot` and arithmetic work on the raw 16-bit patterns there, and casts from fp32 cut bits off
    where the hardware rounds to nearest even. Casts to fp8 lose the carry into the exponent.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    assert os.environ.get("TRITON_INTERPRET") == "1", "run this file through `run_interpreted`"
    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original_dot, original_cast = builder.create_dot, builder.cast_impl
    original_binary, original_fp8 = builder.binary_op, builder.create_fp_to_fp

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original_dot(self, a, b, d, *rest)
        product = np.matmul(widen(a), widen(b), dtype=d.data.dtype)
        return handle_of(product + d.data, d.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return handle_of(widen(src), tl.float32)
        if kinds != (tl.float32, tl.bfloat16):
            return original_cast(self, src, dst_type)
        return narrow(src.data)

    def narrow(x: Any) -> Any:
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        out = np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        return handle_of(out.reshape(x.shape), tl.bfloat16)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16 or op not in (np.add, np.subtract, np.multiply):
            return original_binary(self, a, b, op)
        return narrow(op(widen(a), widen(b)))

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
            return original_fp8(self, src, dst_type, rounding_mode)
        codes = torch.from_numpy(np.array(src.data)).to(torch.float8_e4m3fn)
        return handle_of(codes.view(torch.uint8).numpy(), tl.float8e4nv)

    builder.create_dot, builder.cast_impl, builder.binary_op = create_dot, cast_impl, binary_op
    builder.create_fp_to_fp = create_fp_to_fp


# Compiled offline


@dataclass(frozen=True)
class Kernel:
    """What to compile. `signature` names every argument that is no constant, as Triton does.

    `kernel` is `module:name`; pointers and the arguments in `divisible` are multiples of 16.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    arch: int = 90


@dataclass(frozen=True)
class Compiled:
    """What came out: shared memory in bytes, and how often each instruction stands there."""

    kernel: str
    arch: int
    shared: int
    instructions: dict[str, int] = field(repr=False)

    def count(self, *mnemonics: str) -> int:
        return sum(self.instructions.get(name, 0) for name in mnemonics)


def compile_all(kernels: list[Kernel]) -> list[Compiled]:
    """Compile in one process without the interpreter, for the GPU each kernel names."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    spec = json.dumps([asdict(kernel) for kernel in kernels])
    call = [sys.executable, str(HERE / "triton_harness.py")]
    done = subprocess.run(call, input=spec, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**result) for result in json.loads(done.stdout)]


def compile_for_each_gpu(*kernels: Kernel) -> list[Compiled]:
    """Every kernel for sm_90 and for sm_100."""
    return compile_all(
        [Kernel(**{**asdict(kernel), "arch": arch}) for kernel in kernels for arch in ARCHES]
    )


def assert_sound(
    compiled: Compiled, *, dot: bool = False, cores: tuple[str, ...] = TENSOR_CORES
) -> None:
    """No spills, shared memory within limits, tensor cores where the kernel has a product."""
    assert compiled.instructions, compiled
    assert compiled.count("STL", "LDL") == 0, f"{compiled} spills registers"
    assert compiled.shared <= SHARED_LIMIT, compiled
    if dot:
        shown = ", ".join(sorted(compiled.instructions))
        assert compiled.count(*cores) > 0, f"{compiled} has no {cores}, only {shown}"


def _compile(spec: dict[str, Any]) -> dict[str, Any]:
    import importlib
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = spec["kernel"].partition(":")
    function = getattr(importlib.import_module(module), name)
    names = function.arg_names
    signature = {**spec["signature"], **{constant: "constexpr" for constant in spec["constants"]}}
    assert set(names) == set(signature), f"{name}: {set(names) ^ set(signature)}"
    aligned = [n for n in names if signature[n].startswith("*") or n in spec["divisible"]]
    source = ASTSource(
        fn=function,
        signature={n: signature[n] for n in names},
        constexprs=spec["constants"],
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": spec["num_warps"], "num_stages": spec["num_stages"]}
    result = triton.compile(source, target=GPUTarget("cuda", spec["arch"], 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        call = [str(tool), "-c", file.name]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": name,
        "arch": spec["arch"],
        "shared": result.metadata.shared,
        "instructions": _mnemonics(text),
    }


def _mnemonics(sass: str) -> dict[str, int]:
    """Count `HGMMA` of `/*0a10*/  @!P0 HGMMA.64x128x16.F32.BF16 ...;`."""
    counts: Counter[str] = Counter()
    for line in sass.splitlines():
        _, closed, code = line.partition("*/")
        if closed and line.lstrip().startswith("/*") and code.rstrip().endswith(";"):
            words = [word for word in code.split() if not word.startswith(("@", "{"))]
            counts[words[0].partition(".")[0].rstrip(";")] += 1
    return dict(counts)


if __name__ == "__main__":
    json.dump([_compile(spec) for spec in json.load(sys.stdin)], sys.stdout)
