"""Linear maps on packed weights: the layout, each version of the kernels against plain loops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import src_kernels.cpu as kernels
from l4cli.errors import L4Error
from l4cli.ops import weight_only
from l4cli.ops.weight_only import Layout, dequantize, lay_out, lay_out_values, layout_of, linear

LIBRARY = kernels.load()
needs_library = pytest.mark.skipif(isinstance(LIBRARY, str), reason=str(LIBRARY))
ISAS = ("portable", "avx2", "avx512")
#       kind, group, zeros
KINDS = [
    ("fp32", 0, False),
    ("bf16", 0, False),
    ("int8", 0, False),
    ("int8", 32, False),
    ("int8", 128, False),
    ("int4", 32, False),
    ("int4", 32, True),
    ("int4", 64, False),
    ("int4", 128, True),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert not isinstance(LIBRARY, str)
    best = LIBRARY.l4_cpu_isa()
    if LIBRARY.l4_cpu_use_isa(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert LIBRARY.l4_cpu_use_isa(best) == 0


def made(kind: str, group: int, has_zero: bool, rows: int, cols: int) -> tuple[Tensor, Layout]:
    """A weight with every code in it, scales of all sizes."""
    if kind in ("fp32", "bf16"):
        weight = torch.randn(rows, cols).to(
            getattr(torch, {"fp32": "float32"}.get(kind, "bfloat16"))
        )
        return lay_out_values(weight), Layout(kind, rows, cols)
    low, high = (-8, 8) if kind == "int4" else (-128, 128)
    codes = torch.randint(low, high, (rows, cols), dtype=torch.int8)
    groups = cols // group if group else 1
    scale = torch.rand(rows, groups).mul(3).exp()
    scale = scale.bfloat16() if group else scale
    zero = torch.randint(-8, 8, (rows, groups), dtype=torch.int8) if has_zero else None
    return lay_out(kind, codes, scale, zero), layout_of(kind, codes, scale, zero)


def rounded_inputs(x: np.ndarray, kind: str) -> np.ndarray:
    """What the kernels make of the inputs, group by group in plain numpy, as fp64."""
    if kind == "fp32":
        return x.astype(np.float64)
    if kind == "bf16":
        bits = x.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    out = np.zeros(x.shape)
    for i, row in enumerate(x):
        for start in range(0, len(row), 32):
            part = row[start : start + 32]
            largest = np.abs(part).max()
            if largest >= np.float32(1e-30):
                codes = np.rint(part * (np.float32(127) / largest))
                out[i, start : start + 32] = codes.astype(np.float64) * (largest / np.float32(127))
    return out


def assert_product(x: Tensor, packed: Tensor, layout: Layout) -> None:
    weight = dequantize(packed, layout).double().numpy()
    inputs = rounded_inputs(x.numpy(), layout.kind)
    got = linear(x, packed, layout).numpy()
    assert got.shape == (len(x), layout.num_outputs)
    # Only the fp32 sums may differ: by a few roundings of what was added up.
    bound = 3e-6 * (np.abs(inputs) @ np.abs(weight).T) + 1e-30
    assert (np.abs(got - inputs @ weight.T) <= bound).all()


@needs_library
@pytest.mark.parametrize(("kind", "group", "has_zero"), KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(16, 128), (48, 640), (1, 256), (37, 1024)])
def test_products_of_every_version(
    isa: str, kind: str, group: int, has_zero: bool, rows: int, cols: int
) -> None:
    packed, layout = made(kind, group, has_zero, rows, cols)
    for m in (1, 2, 3, 5, 7, 8, 15, 16, 17, 33):
        assert_product(torch.randn(m, cols) * torch.rand(m, cols).mul(6).exp(), packed, layout)


@needs_library
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("cols", [1, 2, 31, 33, 100])
def test_any_number_of_inputs(isa: str, kind: str, cols: int) -> None:
    packed, layout = made(kind, 0, False, 21, cols)
    for m in (1, 4):
        assert_product(torch.randn(m, cols), packed, layout)


@needs_library
@pytest.mark.parametrize(("kind", "group", "has_zero"), KINDS)
def test_a_row_does_not_depend_on_its_company(
    isa: str, kind: str, group: int, has_zero: bool
) -> None:
    packed, layout = made(kind, group, has_zero, 80, 512)
    x = torch.randn(19, 512)
    whole = linear(x, packed, layout)
    for first, last in ((0, 1), (3, 5), (4, 16), (18, 19)):
        assert torch.equal(linear(x[first:last], packed, layout), whole[first:last])


@needs_library
@pytest.mark.parametrize(("kind", "group", "has_zero"), KINDS)
def test_rows_of_an_expert(isa: str, kind: str, group: int, has_zero: bool) -> None:
    packed, layout = made(kind, group, has_zero, 40, 256)
    x = torch.randn(30, 256)
    whole = linear(x, packed, layout)
    for count in (0, 1, 3, 9, 18, 30):  # some rows twice, in any order
        index = torch.randint(30, (count,), dtype=torch.int32)
        assert torch.equal(linear(x, packed, layout, index), whole[index])


@needs_library
@pytest.mark.parametrize(("kind", "group", "has_zero"), KINDS)
def test_zeros_tiny_and_broken_inputs(isa: str, kind: str, group: int, has_zero: bool) -> None:
    packed, layout = made(kind, group, has_zero, 16, 256)
    x = torch.randn(4, 256)
    x[0] = 0
    x[1, 32:64] = 1e-38
    x[2, 40] = float("nan")
    x[3, 41] = float("inf")
    y = linear(x, packed, layout)
    assert (y[0] == 0).all()
    assert y[1].isfinite().all()
    assert y[2].isnan().all()
    assert not y[3].isfinite().any()


@pytest.mark.parametrize(("kind", "group", "has_zero"), KINDS)
def test_the_layout_gives_back_what_it_was_given(kind: str, group: int, has_zero: bool) -> None:
    rows, cols = 21, 896
    if kind in ("fp32", "bf16"):
        weight = torch.randn(rows, cols).to(torch.float32 if kind == "fp32" else torch.bfloat16)
        packed = lay_out_values(weight)
        assert torch.equal(dequantize(packed, Layout(kind, rows, cols)), weight.float())
        return
    codes = torch.randint(-8, 8, (rows, cols), dtype=torch.int8)
    scale = torch.rand(rows, cols // group if group else 1).bfloat16().float()
    zero = torch.randint(-8, 8, scale.shape, dtype=torch.int8) if has_zero else None
    packed, layout = lay_out(kind, codes, scale, zero), layout_of(kind, codes, scale, zero)
    assert packed.numel() == layout.num_bytes
    assert layout.block_bytes % 64 == 0
    got = weight_only.take_apart(packed, layout)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1].float(), scale)
    assert (got[2] is None) if zero is None else torch.equal(got[2], zero)


@needs_library
@pytest.mark.parametrize(("kind", "group", "has_zero"), KINDS)
def test_both_sides_agree_on_sizes(kind: str, group: int, has_zero: bool) -> None:
    assert not isinstance(LIBRARY, str)
    for rows, cols in ((1, 128), (21, 384), (160, 1024), (16, 896)):
        layout = Layout(kind, rows, cols, group, has_zero)
        arguments = (weight_only.KINDS[kind], rows, cols, group, has_zero)
        assert LIBRARY.l4_weight_bytes(*arguments) == layout.num_bytes


@needs_library
def test_impossible_weights_have_no_size() -> None:
    assert not isinstance(LIBRARY, str)
    for layout in (
        Layout("int4", 16, 128),
        Layout("int4", 16, 128, 16),
        Layout("int4", 16, 100, 32),
        Layout("int8", 16, 128, 0, True),
        Layout("bf16", 16, 128, 32),
    ):
        assert layout.problem() is not None
        arguments = (layout.num_outputs, layout.num_inputs, layout.group_size, layout.has_zero)
        assert LIBRARY.l4_weight_bytes(weight_only.KINDS[layout.kind], *arguments) == 0


def test_scales_are_never_rounded() -> None:
    codes = torch.zeros(16, 32, dtype=torch.int8)
    with pytest.raises(L4Error, match="cannot lay out"):
        lay_out("int4", codes, torch.full((16, 1), 0.1))
    with pytest.raises(L4Error, match="cannot lay out"):
        lay_out("int4", codes[:, :24], torch.ones(16, 1))


@needs_library
def test_threads_and_shapes_change_nothing() -> None:
    packed, layout = made("int4", 32, False, 100, 256)
    x = torch.randn(2, 5, 256)
    before = torch.get_num_threads()
    one = linear(x, packed, layout)
    try:
        torch.set_num_threads(2)
        assert torch.equal(linear(x, packed, layout), one)
        assert linear(x[:, :1].bfloat16(), packed, layout).shape == (2, 1, 100)
    finally:
        torch.set_num_threads(before)
