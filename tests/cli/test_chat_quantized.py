"""`l4 chat` with a quantized checkpoint: which engine answers, and that it answers alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import save_checkpoint

from l4cli.checkpoint import plan_quantization, quantize_checkpoint
from l4cli.checkpoint.manifest import KERNELS
from l4cli.inference.native import instructions, why_not
from l4cli.quantization import RoundingQuantizer, WeightFormat

SAYS = "R\u00e9d[5 23,64\t97]!"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    plain = save_checkpoint(folder / "plain", SAYS)
    parts = dict.fromkeys(("attention", "experts", "shared", "dense"), WeightFormat("int8"))
    quantize_checkpoint(plan_quantization(plain, parts), folder / "int8", RoundingQuantizer())
    return folder / "int8"


def chat(checkpoint: Path, **variables: str) -> tuple[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "l4cli", "chat", str(checkpoint), "-p", "Where?"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_it_runs_in_cpp_from_a_file_made_once(checkpoint):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    for is_first in (True, False):
        answer, said = chat(checkpoint)
        assert answer == SAYS + "\n"
        assert said.count("quantized weights run in C++") == 1
        assert ("laying out the weights" in said) == is_first
    assert (checkpoint / KERNELS).is_file()


def test_it_runs_in_torch_when_that_is_asked_for(checkpoint):
    answer, said = chat(checkpoint, L4_OPS="reference")
    assert answer == SAYS + "\n"
    assert said.count("quantized weights run in torch: forced by `L4_OPS=reference`") == 1


def test_plain_weights_run_in_cpp_too(checkpoint):
    plain = checkpoint.with_name("plain")
    is_slow = why_not() is not None or instructions() == "portable"
    for variables, is_torch in (({}, is_slow), ({"L4_CPU_ISA": "portable"}, True)):
        answer, said = chat(plain, **variables)
        assert answer == SAYS + "\n"
        assert ("plain weights run in torch" in said) == is_torch
    assert not (plain / KERNELS).exists()


def test_codes_without_a_kernel_are_unpacked(checkpoint, tmp_path):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path / "halves"
    parts = dict.fromkeys(("attention", "shared", "dense"), WeightFormat("int8", 32))
    plan = plan_quantization(checkpoint.with_name("plain"), parts)
    quantize_checkpoint(plan, folder, RoundingQuantizer())
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = torch.full(tensors[name].shape, 0.3).half()  # bf16 has no such number
    save_file(tensors, path, {"format": "pt"})
    answer, said = chat(folder)
    assert answer == SAYS + "\n"
    assert said.count("quantized weights are unpacked to bf16: the kernels keep scales") == 1
