"""A narrow `nano` trains alike with every operation in Triton and with every one plain."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("three_steps.py")
TESTS, ROOT = Path(__file__).parents[1], Path(__file__).parents[2]
IN_TRITON = {
    *("rms_norm", "rotate_unit", "swiglu", "routed_experts"),
    *("segment_attention", "linear_cross_entropy"),
}


def three_steps(folder: Path, **variables: str) -> dict[str, Any]:
    places = [ROOT, TESTS, TESTS / "training", TESTS / "ops"]
    path = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    call = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(call, env={**env, **variables}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package `triton` is not installed"
)
def test_three_steps_of_nano(tmp_path: Path) -> None:
    """fp32, a row of two documents and padding, two sparse layers."""
    plain = three_steps(tmp_path / "plain", L4_OPS="reference")
    triton = three_steps(tmp_path / "triton", L4_OPS="triton", TRITON_INTERPRET="1")
    assert {name for name, version in triton["used"].items() if version == "triton"} >= IN_TRITON
    assert set(plain["used"].values()) == {"reference"}
    assert len(plain["losses"]) == 3
    assert plain["losses"][2] < plain["losses"][0] - 0.05  # it trains: not three times one loss
    assert triton["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert triton["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-4)
    assert triton["weight"] == pytest.approx(plain["weight"], rel=1e-5)
