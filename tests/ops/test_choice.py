"""The choice of versions can be forced and shown."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys
sys.path[:0] = ["tests", "tests/model"]
import torchvision_schemas; torchvision_schemas.declare()
import torch
from l4cli.model import build_model, load_preset
from l4cli.ops import describe
model = build_model(load_preset("nano"), seed=0)
loss = model(torch.arange(40).view(2, 20)).square().mean()
loss.backward()
grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
grad = sum(grad.double().abs().sum() for grad in grads)
print({version for _, version, _ in describe()} == {"reference"}, loss.item(), grad.item())
"""


def run(choice: str) -> list[str]:
    env = {**os.environ, "L4_OPS": choice}
    call = [sys.executable, "-c", SCRIPT]
    return subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout.split()


def test_reference_versions_can_be_forced_and_agree() -> None:
    (was_forced, *plain), (was_auto, *fast) = run("reference"), run("auto")
    assert (was_forced, was_auto) == ("True", "False")
    for a, b in zip(plain, fast, strict=True):
        assert abs(float(a) - float(b)) <= 1e-4 * abs(float(a))


def test_an_unknown_choice_is_refused() -> None:
    env = {**os.environ, "L4_OPS": "fastest"}
    call = [sys.executable, "-m", "l4cli", "info", "--ops"]
    done = subprocess.run(call, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: unknown `L4_OPS=fastest`" in done.stderr
