"""Run through `test_triton_int4.py`: maps and a model in codes, the kernels in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from triton_harness import ROOT, repair_interpreter

repair_interpreter()
sys.path.insert(0, str(ROOT / "tests" / "inference"))

from interpreted_int4 import DTYPES, dequantized, made  # noqa: E402
from tiny_llama4 import full_logits, random_ids, text_model  # noqa: E402

from l4cli.checkpoint import (  # noqa: E402
    load_model,
    plan_quantization,
    quantize_checkpoint,
    save_model,
)
from l4cli.inference.coded import load_coded  # noqa: E402
from l4cli.ops.int4_experts import INT4_EXPERTS, INT4_LINEAR, int4_linear  # noqa: E402
from l4cli.quantization import RoundingQuantizer, WeightFormat  # noqa: E402
from src_kernels.cuda.int4_layout import pack  # noqa: E402


# (rows, outputs, inputs, group, zero points)
@pytest.mark.parametrize("case", [(1, 64, 64, 32, False), (37, 100, 256, 128, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_map(case: tuple, dtype: str) -> None:
    rows, outputs, inputs, group, has_zero = case
    weight = made(1, outputs, inputs, group, has_zero, 1)
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(rows, inputs, generator=generator) / 4).to(DTYPES[dtype])
    exact = dequantized(*weight)[0]
    want = x.double() @ exact
    got = int4_linear(x, pack(*weight))
    assert got.dtype == x.dtype
    assert got.shape == (rows, outputs)
    error = float((got.double() - want).norm())
    if dtype == "fp32":
        assert error <= 2e-6 * float(want.norm())
        return
    plain = float(((x @ exact.to(x.dtype)).double() - want).norm())
    assert error <= 2 * plain


def test_a_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 2}
    save_model(text_model(num_experts_per_tok=2, **sizes), tmp_path / "plain", {})
    format = WeightFormat("int4", 32, symmetric=False)
    parts = dict.fromkeys(("attention", "experts", "shared", "dense"), format)
    plan = plan_quantization(tmp_path / "plain", parts)
    quantize_checkpoint(plan, tmp_path / "codes", RoundingQuantizer())
    coded = load_coded(tmp_path / "codes", "cpu", torch.float32)
    x = torch.zeros(1)
    for op in (INT4_EXPERTS, INT4_LINEAR):
        assert op.choose(x.device, x.dtype)[0].name == "triton"
    exact = load_model(tmp_path / "codes", dtype=torch.float32)
    ids = random_ids(11)
    got, want = full_logits(coded, ids), full_logits(exact, ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
