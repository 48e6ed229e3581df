"""The choice of versions can be forced and shown."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from l4cli.ops.choice import REFERENCE, Op, Version, all_ops, triton_version, triton_why_not
from l4cli.ops.moe import ROUTED_EXPERTS

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
assert "triton" not in sys.modules
print({choice.version for choice in describe()} == {"reference"}, loss.item(), grad.item())
"""
CPU = torch.device("cpu")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "L4_OPS": "auto", "TRITON_INTERPRET": "0", **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def run(choice: str) -> list[str]:
    done = python(SCRIPT, L4_OPS=choice)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_reference_versions_can_be_forced_and_agree() -> None:
    (was_forced, *plain), (was_auto, *fast) = run("reference"), run("auto")
    assert (was_forced, was_auto) == ("True", "False")
    for a, b in zip(plain, fast, strict=True):
        assert abs(float(a) - float(b)) <= 1e-4 * abs(float(a))


@pytest.mark.parametrize(
    ("wish", "error", "fix"),
    [
        ("fastest", "unknown `L4_OPS=fastest`", "`reference`"),
        ("swiglu=slow", "unknown `slow` in `L4_OPS=swiglu=slow`", "choose from `auto`"),
        ("swiglo=auto", "unknown `swiglo` in `L4_OPS=swiglo=auto`", "did you mean `swiglu`?"),
    ],
)
def test_an_unknown_choice_is_refused(wish: str, error: str, fix: str) -> None:
    env = {**os.environ, "L4_OPS": wish}
    call = [sys.executable, "-m", "l4cli", "info", "--ops"]
    done = subprocess.run(call, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {error}\n" in done.stderr
    assert fix in done.stderr


def test_one_operation_can_be_forced_alone() -> None:
    shown = python(
        "from l4cli.ops import describe\n"
        "print(*sorted({c.op + ':' + c.version for c in describe()}))",
        L4_OPS="reference,swiglu=recomputed,rms_norm=auto",
    ).stdout.split()
    assert {"swiglu:recomputed", "rms_norm:two-pass", "rotate_unit:reference"} <= set(shown)


def test_an_operation_without_the_wanted_version_says_so() -> None:
    shown = python(
        "from l4cli.ops import describe\n"
        "print(*(c.op + ':' + c.version + ':' + c.reason for c in describe()), sep='\\n')",
        L4_OPS="two-pass",
    ).stdout
    assert "rms_norm:two-pass:forced by `L4_OPS=two-pass`\n" in shown
    assert "full_attention:blocked:it has no version `two-pass`\n" in shown


def test_every_operation_ends_in_a_reference_that_always_runs() -> None:
    for op in all_ops():
        last = op.versions[-1]
        assert last.name == REFERENCE
        assert last.why_not(torch.device("cuda"), torch.float64) is None
        assert len({version.name for version in op.versions}) == len(op.versions)


def test_the_first_version_that_can_run_is_taken_and_the_others_say_why() -> None:
    loads = []

    def version(name: str, why: str | None) -> Version:
        return Version(name, lambda: loads.append(name) or name, "", lambda device, dtype: why)

    op = Op("sum", [version("a", "too hot"), version("b", None), version(REFERENCE, None)])
    assert op.pick(torch.ones(1)) == "b"
    assert op.pick(torch.ones(2)) == "b"
    assert loads == ["b"]  # once, and nothing for the others
    assert op.choose(CPU, torch.float32)[1] == "not `a`: too hot"


def test_triton_is_never_chosen_on_a_cpu() -> None:
    fast, plain = triton_version(lambda: 1 / 0, ""), Version(REFERENCE, lambda: len, "")
    op = Op("sum", [fast, plain])
    assert op.pick(torch.ones(1)) is len
    assert "for CUDA" in op.choose(CPU, torch.float32)[1]


def test_triton_says_why_it_cannot_run() -> None:
    dtypes = (torch.float32,)
    assert "not written for fp16" in (triton_why_not(CPU, torch.float16, dtypes) or "")
    meta = torch.device("meta")
    assert "not for meta" in (triton_why_not(meta, torch.float32, dtypes) or "")


@pytest.mark.parametrize(
    ("capability", "why"),
    [((8, 9), "it is a loop"), ((9, 0), None), ((10, 0), "gives experts without tokens")],
)
def test_torch_s_grouped_products_are_for_hopper(
    capability: tuple[int, int], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    given = ROUTED_EXPERTS.named("grouped-mm").why_not(torch.device("cuda"), torch.bfloat16)
    assert given is None if why is None else why in (given or "")


def test_a_forced_version_that_cannot_run_is_an_error() -> None:
    code = (
        "import torch\n"
        "from l4cli.errors import UsageError\n"
        "from l4cli.ops import choice\n"
        "op = choice.Op('swiglu', [choice.triton_version(lambda: print, ''),"
        " choice.Version('reference', lambda: len, '')])\n"
        "choice.all_ops = lambda: [op]\n"
        "try: print(op.pick(torch.ones(1)) is print)\n"
        "except UsageError as error: print(error.what, '|', error.why, '|', error.fix)"
    )
    said = python(code, L4_OPS="triton").stdout
    assert "cannot run `swiglu` as `L4_OPS=triton` demands" in said
    assert "TRITON_INTERPRET=1" in said or "not installed" in said
    assert "`reference`" in said
    pytest.importorskip("triton")
    assert python(code, L4_OPS="triton", TRITON_INTERPRET="1").stdout == "True\n"
