"""Having the CPU kernels: forced versions, none at all, compiled on demand."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import src_kernels.cpu as kernels
from l4cli.ops import weight_only
from l4cli.ops.choice import Op
from src_kernels.cpu import compiling

needs_compiler = pytest.mark.skipif(compiling.compiler() is None, reason="no C++ compiler")
needs_library = pytest.mark.skipif(isinstance(kernels.load(), str), reason=str(kernels.load()))

SHOW = "import src_kernels.cpu as k; print(k.load().l4_cpu_isa(), k.load().l4_cpu_isa_error())"


def run(script: str, **env: str) -> str:
    call = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env}
    return subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout


@needs_library
def test_a_version_can_be_forced() -> None:
    assert run(SHOW, L4_CPU_ISA="portable") == "b'portable' None\n"
    assert run(SHOW, L4_CPU_ISA="avx9000").endswith("b'avx9000'\n")
    assert "torch" not in run(SHOW + "; import sys; print('torch' in sys.modules and 'torch')")


@needs_library
def test_an_unknown_version_is_refused() -> None:
    script = "import torch; from l4cli.ops.weight_only import why_not\n"
    script += "try: why_not(torch.device('cpu'))\n"
    script += "except Exception as error: print(type(error).__name__, error.what)"
    assert run(script, L4_CPU_ISA="avx9000") == "UsageError cannot use `L4_CPU_ISA=avx9000`\n"


def test_without_library_and_compiler_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    reason = "not installed with the package, and no C++ compiler found"
    assert kernels.load.__wrapped__() == reason


def test_without_the_library_torch_answers_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weight, x = torch.randn(20, 64).bfloat16(), torch.randn(2, 3, 64)
    packed, layout = weight_only.lay_out_values(weight), weight_only.Layout("bf16", 20, 64)
    versions = weight_only.WEIGHT_ONLY.versions
    monkeypatch.setattr(weight_only, "WEIGHT_ONLY", Op("weight_only_linear", versions))
    monkeypatch.setattr(kernels, "load", lambda: "no C++ compiler found")
    weight_only.why_not.cache_clear()
    try:
        for _ in range(3):
            y = weight_only.linear(x, packed, layout)
            assert torch.equal(y, x @ weight.float().T)
        chosen, reason = weight_only.WEIGHT_ONLY.choose(x.device, x.dtype)
        assert (chosen.name, reason) == ("reference", "not `cpp`: no C++ compiler found")
    finally:
        weight_only.why_not.cache_clear()
    assert capsys.readouterr().err.count("no C++ compiler found") == 1


@needs_compiler
def test_it_is_compiled_into_the_cache_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Few sources and no optimizing: the way to the cache is what is tried here.
    flags = ("-std=c++17", "-fPIC", "-shared")
    monkeypatch.setattr(compiling, "FLAGS", flags)
    monkeypatch.setattr(compiling, "sources", lambda: [compiling.HERE / "layout.cpp"])
    made = compiling.compile_in_cache()
    assert isinstance(made, Path)
    assert made.parent == tmp_path / "l4"
    ctypes.CDLL(str(made))
    before = made.stat().st_mtime_ns
    assert compiling.compile_in_cache() == made
    assert made.stat().st_mtime_ns == before
    assert not list(made.parent.glob(".compiling-*"))
    monkeypatch.setattr(compiling, "FLAGS", (*flags, "-DOTHER"))
    assert compiling.cached_library() != made


def test_compiling_is_announced_only_where_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    assert kernels.must_compile()
    cached = compiling.cached_library()
    cached.parent.mkdir()
    cached.touch()
    assert not kernels.must_compile()
    cached.unlink()
    monkeypatch.setenv("CXX", "/nonexistent")
    assert not kernels.must_compile()


@needs_compiler
def test_a_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(compiling, "sources", lambda: [broken])
    failure = compiling.compile_library(tmp_path / "x.so")
    assert failure is not None
    assert "failed" in failure
    assert not (tmp_path / "x.so").exists()
