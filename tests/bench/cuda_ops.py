"""Our CUDA operations beside torch's and beside the device's ceilings.

usage: python tests/bench/cuda_ops.py [--tokens 16384] [--experts 16] [--dim 2048] [--width 4096]
       [--only product,experts,int4] [--json]

Ceilings first: a bf16 product by torch, and a copy. Then each version of each operation in the same
process, interleaved, median of timed rounds: milliseconds, and what share of its ceiling that is.
Decides the order of versions in `l4cli/ops`. Needs a GPU that Triton compiles for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WARMUP, ROUNDS = 5, 25
Run = Callable[[], object]


def times_ms(runs: dict[str, Run]) -> dict[str, float]:
    """The median time of each, every round running all of them in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(WARMUP + ROUNDS):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if i >= WARMUP:
                found[name].append(begin.elapsed_time(end))
    return {name: statistics.median(each) for name, each in found.items()}


def ceilings() -> tuple[float, float]:
    """bf16 TFLOP/s of a large product, GB/s of a copy (read and written)."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(big)
    ms = times_ms({"product": lambda: a @ b, "copy": lambda: target.copy_(big)})
    return 2 * n**3 / ms["product"] / 1e9, 2 * big.numel() / ms["copy"] / 1e6


def problem(args: argparse.Namespace) -> list[Tensor]:
    """Tokens chosen unevenly, as a young router does."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    popularity = normal(args.experts)
    gate, chosen = (normal(args.tokens, args.experts) + popularity).topk(1, dim=-1)
    w_in = normal(args.experts, args.dim, 2 * args.width) * args.dim**-0.5
    w_out = normal(args.experts, args.width, args.dim) * args.width**-0.5
    x = normal(args.tokens, args.dim).bfloat16()
    return [x, gate.sigmoid(), chosen, w_in.bfloat16(), w_out.bfloat16()]


def expert_rows(args: argparse.Namespace, tflops: float) -> list[dict[str, Any]]:
    """Every version of routed experts that runs here, and fp8: forward, forward and backward."""
    from l4cli.ops.fp8 import FP8_EXPERTS
    from l4cli.ops.moe import ROUTED_EXPERTS

    inputs = problem(args)
    device, dtype = inputs[0].device, inputs[0].dtype
    versions = {}
    for op, names in ((ROUTED_EXPERTS, None), (FP8_EXPERTS, ["triton"])):
        for version in op.versions:
            if version.name == "reference" or (names and version.name not in names):
                continue
            why = version.why_not(device, dtype)
            if why is not None:
                print(f"{op.name} {version.name}: {why}", file=sys.stderr)
                continue
            versions[f"{op.name} {version.name}"] = version.load()
    flops = 2 * args.tokens * 3 * args.dim * args.width
    dy = torch.randn_like(inputs[0])
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]

    def forward(run: Callable[..., Tensor]) -> Run:
        def once() -> None:
            with torch.no_grad():
                run(*inputs)

        return once

    def both(run: Callable[..., Tensor]) -> Run:
        def once() -> None:
            for leaf in leaves:
                leaf.grad = None
            run(*leaves).backward(dy)

        return once

    rows = []
    for what, wrap, factor in (("forward", forward, 1), ("forward, backward", both, 3)):
        ms = times_ms({name: wrap(run) for name, run in versions.items()})
        for name, each in ms.items():
            reached = factor * flops / each / 1e9
            figures = {"ms": each, "tflops": reached, "of_bf16_ceiling": reached / tflops}
            rows.append({"op": name, "what": what, **figures})
    return rows


def int4_rows(args: argparse.Namespace, gb_per_s: float) -> list[dict[str, Any]]:
    """Decoding: int4 beside bf16 experts, one token to sixteen."""
    from l4cli.ops.int4_experts import INT4_EXPERTS, pack
    from l4cli.ops.moe import ROUTED_EXPERTS

    x, gate, chosen, w_in, w_out = problem(args)

    def packed(w_EIO: Tensor) -> Any:
        shape = (w_EIO.shape[0], w_EIO.shape[2], w_EIO.shape[1])
        codes = torch.randint(-8, 8, shape, device="cuda", dtype=torch.int8)
        scale = torch.full((*shape[:2], shape[2] // 32), 0.01, device="cuda").bfloat16()
        return pack(codes, scale)

    small = [packed(w_in), packed(w_out)]
    bytes_of_expert = sum(
        part[0].numel() * part.element_size()
        for weight in small
        for part in (weight.codes, weight.scale)
    )
    rows = []
    for tokens in (1, 4, 16):
        some = [x[:tokens], gate[:tokens], chosen[:tokens]]
        num_read = len(chosen[:tokens].unique())
        runs: dict[str, Run] = {
            "int4_experts triton": lambda s=some: INT4_EXPERTS.named("triton").load()(*s, *small)
        }
        bf16 = ROUTED_EXPERTS.pick(x)
        runs["routed_experts bf16"] = lambda s=some, run=bf16: run(*s, w_in, w_out)
        with torch.no_grad():
            ms = times_ms(runs)
        for name, each in ms.items():
            wide = (w_in[0].numel() + w_out[0].numel()) * 2
            size = num_read * (bytes_of_expert if name.startswith("int4") else wide)
            rate = size / each / 1e6
            figures = {"ms": each, "gb_per_s": rate, "of_copy_ceiling": rate / gb_per_s}
            rows.append({"op": name, "what": f"{tokens} tokens", **figures})
    return rows


def product_rows(args: argparse.Namespace, tflops: float) -> list[dict[str, Any]]:
    """One grouped product alone, ours and torch's, on rows that are already sorted."""
    if not hasattr(F, "grouped_mm"):
        return []
    from src_kernels.cuda import moe
    from src_kernels.cuda.grouping import Groups

    x, _, chosen, w_in, _ = problem(args)
    groups = Groups.from_choices(chosen, args.experts)
    ms = times_ms(
        {
            "grouped product triton": lambda: moe.product(x, w_in, groups),
            "grouped product torch": lambda: F.grouped_mm(x, w_in, offs=groups.ends),
        }
    )
    flops = 2 * args.tokens * args.dim * 2 * args.width
    return [
        {"op": name, "what": "forward", "ms": each, "tflops": flops / each / 1e9}
        | {"of_bf16_ceiling": flops / each / 1e9 / tflops}
        for name, each in ms.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--only", default="product,experts,int4")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and this torch sees none", file=sys.stderr)
        return 1
    tflops, gb_per_s = ceilings()
    rows: list[dict[str, Any]] = [
        {"op": "torch matmul 8192", "what": "ceiling", "tflops": tflops},
        {"op": "copy 1 GiB", "what": "ceiling", "gb_per_s": gb_per_s},
    ]
    sides = {
        "product": lambda: product_rows(args, tflops),
        "experts": lambda: expert_rows(args, tflops),
        "int4": lambda: int4_rows(args, gb_per_s),
    }
    for name in args.only.split(","):
        rows += sides[name]()
    device = torch.cuda.get_device_name()
    for row in rows:
        if args.json:
            print(json.dumps({"device": device, **row}))
        else:
            figures = "  ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float))
            print(f"{row['op']:<28} {row['what']:<18} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
