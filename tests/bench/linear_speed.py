"""How fast packed weights are multiplied, beside the memory's speed and torch's own operators.

run: python tests/bench/linear_speed.py [--shape 2048x1024] [--threads 1] [--rows 1,4,16,512]
out: one row: GB/s of the weight's bytes, and of reading as much memory; several: Gop/s
Each weight exists in so many copies that no cache holds them; the sides take turns, and each
figure is the best of many short calls, which a shared machine disturbs least.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import src_kernels.cpu as kernels
from l4cli.ops.weight_only import KINDS, Layout, lay_out, lay_out_values, layout_of, linear

COPIES_BYTES = 192 << 20
SIDES = (
    ("int4", 32, False),
    ("int4", 32, True),
    ("int4", 128, False),
    ("int8", 0, False),
    ("int8", 32, False),
    ("bf16", 0, False),
    ("fp32", 0, False),
)


class Turns:
    """Calls on copies in turn; keeps the shortest time."""

    def __init__(self, name: str, calls: list[Callable[[], object]], size_bytes: int) -> None:
        self.name, self.calls, self.size_bytes = name, calls, size_bytes
        self.best_s, self.next = float("inf"), 0

    def run(self) -> None:
        start = time.perf_counter()
        self.calls[self.next % len(self.calls)]()
        self.best_s = min(self.best_s, time.perf_counter() - start)
        self.next += 1


def packed(kind: str, group: int, has_zero: bool, rows: int, cols: int) -> tuple[Tensor, Layout]:
    if kind in ("bf16", "fp32"):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        return lay_out_values(torch.randn(rows, cols).to(dtype)), Layout(kind, rows, cols)
    limit = 8 if kind == "int4" else 128
    codes = torch.randint(-limit, limit, (rows, cols), dtype=torch.int8)
    scale = torch.rand(rows, cols // group if group else 1).bfloat16()
    zero = torch.randint(-8, 8, scale.shape, dtype=torch.int8) if has_zero else None
    return lay_out(kind, codes, scale, zero), layout_of(kind, codes, scale, zero)


def copies(weight: Tensor) -> list[Tensor]:
    size_bytes = weight.numel() * weight.itemsize
    return [weight.clone() for _ in range(max(2, COPIES_BYTES // size_bytes))]


def kernel_calls(
    library: ctypes.CDLL, weights: list[Tensor], layout: Layout, x: Tensor, num_threads: int
) -> list[Callable[[], object]]:
    """The C interface itself, as a decoding loop uses it."""
    m, y = len(x), torch.empty(len(x), layout.num_outputs)
    form = {"fp32": kernels.AS_FP32, "bf16": kernels.AS_BF16}.get(layout.kind, kernels.AS_INT8)
    size = library.l4_rows_bytes(m, layout.num_inputs, form)
    scratch = torch.empty(size, dtype=torch.uint8)

    def call(weight: kernels.Weight) -> Callable[[], object]:
        return lambda: library.l4_linear(
            ctypes.byref(weight),
            x.data_ptr(),
            layout.num_inputs,
            m,
            y.data_ptr(),
            layout.num_outputs,
            scratch.data_ptr(),
            num_threads,
        )

    sizes = (layout.num_outputs, layout.num_inputs, layout.group_size, layout.has_zero)
    return [call(kernels.Weight(w.data_ptr(), KINDS[layout.kind], *sizes)) for w in weights]


def torch_sides(x: Tensor, rows: int, cols: int) -> list[Turns]:
    """torch's operators on weights of the same shape in their own layouts."""
    ops, low = torch.ops.aten, x.bfloat16()
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    int4 = copies(ops._convert_weight_to_int4pack_for_cpu(codes, 1))
    scales = torch.rand(cols // 32, rows, 2).bfloat16()
    bf16 = copies(torch.randn(rows, cols).bfloat16())
    int8 = copies(torch.randint(-128, 128, (rows, cols), dtype=torch.int8))
    row_scale = torch.rand(rows).bfloat16()

    def mm4(w: Tensor) -> Callable[[], object]:
        return lambda: ops._weight_int4pack_mm_for_cpu(low, w, 32, scales)

    def mm8(w: Tensor) -> Callable[[], object]:
        return lambda: ops._weight_int8pack_mm(low, w, row_scale)

    def mm16(w: Tensor) -> Callable[[], object]:
        return lambda: F.linear(low, w)

    return [
        Turns("torch int4pack g32", [mm4(w) for w in int4], rows * cols * 5 // 8),
        Turns("torch int8pack", [mm8(w) for w in int8], rows * cols),
        Turns("torch bf16 linear", [mm16(w) for w in bf16], rows * cols * 2),
    ]


def measure(library: ctypes.CDLL, m: int, rows: int, cols: int, num_threads: int) -> None:
    """Print a table for `m` tokens."""
    x = torch.randn(m, cols)
    kept, sides = [], []
    for kind, group, has_zero in SIDES:
        weight, layout = packed(kind, group, has_zero, rows, cols)
        assert linear(x, weight, layout).isfinite().all()
        kept.append(copies(weight))
        name = f"{kind}{f' g{group}' if group else ''}{' zp' if has_zero else ''}"
        calls = kernel_calls(library, kept[-1], layout, x, num_threads)
        sides.append(Turns(name, calls, layout.num_bytes))
    sides += torch_sides(x, rows, cols)
    # The ceiling reads such small pieces too: in one go it would use longer streams.
    pieces = torch.ones(COPIES_BYTES, dtype=torch.uint8).split(rows * cols)
    reads = [lambda p=p: library.l4_read(p.data_ptr(), p.numel(), num_threads) for p in pieces]
    ceiling = Turns("reading memory", reads, rows * cols)
    for _ in range(max(20, 600 // m)):
        for side in [ceiling, *sides]:
            side.run()
    print(f"\n{m} rows, weight {rows} x {cols}, {num_threads} threads")
    best = ceiling.size_bytes / ceiling.best_s / 1e9
    print(f"  {ceiling.name:20s} {best:7.1f} GB/s")
    for side in sides:
        rate = side.size_bytes / side.best_s / 1e9
        ops = 2 * m * rows * cols / side.best_s / 1e9
        print(f"  {side.name:20s} {rate:7.1f} GB/s  {rate / best:5.0%}  {ops:7.0f} Gop/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="2048x1024")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,4,16,512")
    args = parser.parse_args()
    library = kernels.load()
    if isinstance(library, str):
        raise SystemExit(f"error: no kernels: {library}")
    torch.set_num_threads(args.threads)
    rows, cols = map(int, args.shape.split("x"))
    print(f"{library.l4_cpu_isa().decode()}, load {os.getloadavg()[0]:.1f}", end="")
    for m in map(int, args.rows.split(",")):
        measure(library, m, rows, cols, args.threads)


if __name__ == "__main__":
    main()
