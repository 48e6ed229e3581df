"""Which version of an operation runs, and why not a faster one; chosen once, shown, forced.

in: `L4_OPS` (`auto`, a version's name, or `rms_norm=triton,swiglu=reference`), a device, a dtype
out: the function that runs; for people (`l4 info --ops`) every operation's choice and its reason
An operation's module holds an `Op` with its versions, fastest first and the plain one last.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from l4cli.errors import UsageError, suggest

AUTO, REFERENCE, TRITON = "auto", "reference", "triton"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Where operations are: their modules are imported when somebody asks for all of them.
_PLACES = (
    ("norm", "RMS_NORM"),
    ("rope", "ROTATE_UNIT"),
    ("swiglu", "SWIGLU"),
    ("moe", "ROUTED_EXPERTS"),
    ("fp8", "FP8_EXPERTS"),
    ("int4_experts", "INT4_EXPERTS"),
    ("int4_experts", "INT4_LINEAR"),
    ("attention", "SEGMENT_ATTENTION"),
    ("attention", "FULL_ATTENTION"),
    ("parts_attention", "ATTEND_PARTS"),
    ("packed_linear", "PACKED_LINEAR"),
    ("weight_only", "WEIGHT_ONLY"),
    ("cross_entropy", "LINEAR_CROSS_ENTROPY"),
    ("cross_entropy", "TOKEN_LOSSES"),
    ("distillation", "LINEAR_DISTILLATION"),
)
WhyNot = Callable[[torch.device, torch.dtype], str | None]


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Version:
    """One way to compute an operation.

    `load` gives the function; it may import what only this version needs.
    `why_not` says why it cannot run there, or None. A version that is `for_tests_on_cpu` is
    never chosen on a CPU, only forced.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    does: str
    why_not: WhyNot = _always
    for_tests_on_cpu: bool = False


@dataclass(frozen=True)
class Choice:
    """What runs for one operation, device and dtype."""

    op: str
    version: str
    does: str
    reason: str  # why this one and no faster one
    device: str
    dtype: str


@dataclass
class Op:
    """An operation and its versions, fastest first, the plain one last."""

    name: str
    versions: Sequence[Version]
    _chosen: dict[tuple[bool, bool, torch.dtype], Callable[..., Any]] = field(default_factory=dict)

    def pick(self, x: torch.Tensor) -> Callable[..., Any]:
        """The version for tensors like `x`. raises: UsageError when the forced one cannot run"""
        # Not `x.device.type`, which alone takes longer than all of this; decoding asks often.
        key = (x.is_cpu, x.is_cuda, x.dtype)
        run = self._chosen.get(key)
        if run is None:
            run = self._chosen[key] = self.choose(x.device, x.dtype)[0].load()
        return run

    @property
    def is_used(self) -> bool:
        """Whether any version has run in this process."""
        return bool(self._chosen)

    def choose(self, device: torch.device, dtype: torch.dtype) -> tuple[Version, str]:
        """A version, and why no faster one. raises: UsageError when the forced one cannot run"""
        name, given = forced(self)
        if name != AUTO:
            version = self.named(name)
            why = version.why_not(device, dtype)
            if why is not None:
                what = f"cannot run `{self.name}` as `L4_OPS={given}` demands"
                usable = [v.name for v in self.versions if v.why_not(device, dtype) is None]
                fix = f"here run: {', '.join(f'`{name}`' for name in usable)}; or leave it out"
                raise UsageError(what, why=f"`{name}`: {why}", fix=fix)
            return version, f"forced by `L4_OPS={given}`"
        refusals: list[str] = []
        for version in self.versions:
            why = version.why_not(device, dtype)
            if version.for_tests_on_cpu and device.type == "cpu":
                why = "for CUDA; on a CPU only when forced"
            if why is None:
                if given != AUTO and given == _wishes()[0]:
                    refusals.insert(0, f"it has no version `{given}`")
                return version, "; ".join(refusals) or "the fastest there is"
            refusals.append(f"not `{version.name}`: {why}")
        raise AssertionError(f"`{self.name}` has no version that always runs")

    def named(self, name: str) -> Version:
        """The version of this name, which exists."""
        return next(version for version in self.versions if version.name == name)

    def has(self, name: str) -> bool:
        return any(version.name == name for version in self.versions)


def all_ops() -> list[Op]:
    """Every operation that has versions."""
    modules = ((importlib.import_module(f"l4cli.ops.{place}"), name) for place, name in _PLACES)
    return [getattr(module, name) for module, name in modules]


def forced(op: Op) -> tuple[str, str]:
    """The version the user wants of an operation, or `auto`; and the words that said so.

    A bare name is meant for every operation that has such a version.
    """
    bare, by_op = _wishes()
    if op.name in by_op:
        return by_op[op.name], f"{op.name}={by_op[op.name]}"
    return (bare if op.has(bare) else AUTO), bare


def is_reference_forced() -> bool:
    """Whether the user asked for the plain versions. raises: UsageError for an unknown word"""
    return _wishes()[0] == REFERENCE


@functools.cache
def _wishes() -> tuple[str, dict[str, str]]:
    """What `L4_OPS` says: a word for all, and words for some. raises: UsageError"""
    text = os.environ.get("L4_OPS") or AUTO
    bare, by_op = AUTO, {}
    ops = {op.name: op for op in all_ops()}
    every_name = {AUTO, TRITON, *(version.name for op in ops.values() for version in op.versions)}
    for wish in text.split(","):
        name, equals, version = (part.strip() for part in wish.partition("="))
        if equals:
            _expect(name, ops, "there is no such operation", text)
            names = [AUTO, *(v.name for v in ops[name].versions)]
            _expect(version, names, f"`{name}` has no such version", text)
            by_op[name] = version
        else:
            _expect(name, every_name, "this variable chooses the versions of operations", text)
            bare = name
    return bare, by_op


def _expect(word: str, words: Any, why: str, text: str) -> None:
    if word not in words:
        shown = (
            f"unknown `{word}` in `L4_OPS={text}`" if word != text else f"unknown `L4_OPS={text}`"
        )
        raise UsageError(shown, why=why, fix=suggest(word, words))


@functools.cache
def triton_why_not(
    device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]
) -> str | None:
    """Why a Triton version that computes in `dtypes` cannot run there; None when it can."""
    if device.type not in ("cuda", "cpu"):
        return f"Triton compiles for CUDA, not for {device.type}"
    if dtype not in dtypes:
        return f"not written for {_short(dtype)}"
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "on a CPU it runs only in Triton's interpreter (`TRITON_INTERPRET=1`)"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


def triton_version(
    load: Callable[[], Callable[..., Any]],
    does: str,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
) -> Version:
    """A version in Triton: for CUDA, and for the interpreter when forced."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return triton_why_not(device, dtype, dtypes)

    return Version(TRITON, load, does, why_not, for_tests_on_cpu=True)


def describe() -> list[Choice]:
    """Each operation's choice on this machine's best device, in the dtypes models compute in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in all_ops():
        for dtype in (torch.bfloat16, torch.float32):
            version, reason = op.choose(device, dtype)
            row = Choice(op.name, version.name, version.does, reason, device.type, _short(dtype))
            rows.append(row)
    return rows


def _short(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}.get(name, name)
