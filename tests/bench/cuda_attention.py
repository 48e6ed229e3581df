"""Our Triton kernels beside torch's own on a CUDA device: attention, decoding, the loss, rows.

run: python tests/bench/cuda_attention.py [--only train,decode,loss,rows] [--repeats 20]
out: one line a case: the time of each version, its share of the ceiling measured beside it (a
bf16 product for training, a copy for decoding and rows), and the largest difference to torch's
Shapes: Scout's heads (40 of queries, 8 of keys, 128 channels), packed documents of unequal length.
Without a CUDA device it says so and stops: nothing here means anything in the interpreter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 40, 8, 128
GIB = 2**30


def time_s(repeats: int, run: Callable[..., Any], *args: Any) -> float:
    """Median of GPU time, caches warm with code and cold with data."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run(*args)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*args)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings(repeats: int) -> tuple[float, float]:
    """FLOP/s of a large bf16 product and bytes/s of a copy, on this very device."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops = 2 * 8192**3 / time_s(repeats, torch.mm, a, a)
    x = torch.empty(2 * GIB, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    return flops, 2 * x.numel() / time_s(repeats, y.copy_, x)


def document_lengths(total: int, longest: int) -> Tensor:
    """Unequal lengths that fill `total`, log-uniform up to `longest`."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        share = torch.rand((), generator=generator).item()
        lengths.append(max(1, round(longest ** (0.5 + 0.5 * share))))
    lengths[-1] -= sum(lengths) - total
    return torch.tensor([n for n in lengths if n > 0])


def gradients(run: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(run(*leaves), leaves, grad)


def train_cases(repeats: int, flops: float) -> Iterator[str]:
    """Forward and backward of segments: ours, buckets over SDPA, flex attention's block mask."""
    from l4cli.ops.attention import SEGMENT_ATTENTION, plan_attention

    for total, longest, what in (
        (32768, 2048, "documents up to 2k"),
        (32768, 8192, "documents up to 8k"),
        (32768, 32768, "one document of 32k"),
    ):
        lengths = torch.tensor([total]) if longest == total else document_lengths(total, longest)
        starts = lengths.cumsum(0) - lengths
        plan = plan_attention(starts, lengths, total, torch.device("cuda"))
        q, k, v = (
            torch.randn(1, total, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        grad = torch.randn_like(q)
        useful = 4 * HEADS * HEAD_DIM * float((lengths.double() ** 2).sum()) / 2
        found: dict[str, tuple[float, float]] = {}
        for name, attend in attention_versions(plan, starts, lengths, total).items():
            with torch.no_grad():
                forward = time_s(repeats, attend, q, k, v)
            found[name] = (forward, time_s(repeats, gradients, attend, (q, k, v), grad))
        run = SEGMENT_ATTENTION.named("triton").load()
        with torch.no_grad():
            difference = run(q, k, v, plan) - SEGMENT_ATTENTION.named("bucketed").load()(
                q, k, v, plan
            )
        for name, (forward, total_s) in found.items():
            yield (
                f"{what}  {name:8}  forward {forward * 1e3:7.2f} ms {useful / forward / flops:4.0%}"
                f"  with backward {total_s * 1e3:7.2f} ms {3.5 * useful / total_s / flops:4.0%}"
            )
        yield f"{what}  largest difference {difference.abs().max().item():.1e}"


def attention_versions(
    plan: Any, starts: Tensor, lengths: Tensor, total: int
) -> dict[str, Callable[..., Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from l4cli.ops.attention import SEGMENT_ATTENTION

    owner = torch.arange(len(starts)).repeat_interleave(lengths).cuda()

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (owner[query] == owner[key])

    mask = create_block_mask(visible, None, None, total, total, device="cuda")
    compiled = torch.compile(flex_attention)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2)

    versions: dict[str, Callable[..., Tensor]] = {"flex": flex}
    for name in ("triton", "bucketed"):
        run = SEGMENT_ATTENTION.named(name).load()
        versions[name] = lambda q, k, v, run=run: run(q, k, v, plan)
    return versions


def decode_cases(repeats: int, bandwidth: float) -> Iterator[str]:
    """One token against long caches, in parts as a cache keeps them; bytes read over time."""
    from l4cli.inference.kept import BLOCK, Packed, part_tensors
    from l4cli.ops.parts_attention import ATTEND_PARTS

    q = torch.randn(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    for num_tokens in (8192, 131072, 1048576):
        for kept in ("bf16", "int8", "int4"):
            parts: list[Any] = []
            for _ in range(max(1, num_tokens // BLOCK)):
                shape = (KV_HEADS, min(BLOCK, num_tokens), HEAD_DIM)
                pair = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
                parts.append(tuple(pair) if kept == "bf16" else Packed.of(*pair, int(kept[3:])))
            size = sum(x.numel() * x.element_size() for part in parts for x in part_tensors(part))
            outs, line = {}, f"decode {num_tokens:8} tokens {kept}"
            for name in ("triton", "part-by-part"):
                run = ATTEND_PARTS.named(name).load()
                spent = time_s(repeats, run, q, parts, None, None)
                outs[name] = run(q, parts, None, None)[0]
                line += f"  {name} {spent * 1e6:8.0f} us {size / spent / bandwidth:4.0%}"
            difference = (outs["triton"] - outs["part-by-part"]).abs().max().item()
            yield f"{line}  largest difference {difference:.1e}"


def loss_cases(repeats: int, flops: float) -> Iterator[str]:
    """Loss and both gradients over Scout's vocabulary: four products are the least."""
    from l4cli.ops.cross_entropy import LINEAR_CROSS_ENTROPY

    tokens, hidden, vocabulary = 8192, 2048, 202048
    h = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = 0.02 * torch.randn(vocabulary, hidden, device="cuda", dtype=torch.bfloat16)
    weight.requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    weights, one = torch.ones(tokens, device="cuda"), torch.ones((), device="cuda")
    for version in LINEAR_CROSS_ENTROPY.versions:
        run = partial(version.load(), labels_M=labels, weights_M=weights, chunk=None)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        spent = time_s(repeats, gradients, run, (h, weight), one)
        more = (torch.cuda.max_memory_allocated() - held) / GIB
        share = 4 * 2 * tokens * hidden * vocabulary / spent / flops
        yield f"loss  {version.name:10} {spent * 1e3:8.2f} ms {share:4.0%}  {more:.2f} GiB more"


def row_cases(repeats: int, bandwidth: float) -> Iterator[str]:
    """Forward and backward; the ceiling moves each tensor that must be moved once."""
    from l4cli.ops.norm import RMS_NORM
    from l4cli.ops.rope import ROTATE_UNIT, rotation
    from l4cli.ops.swiglu import SWIGLU

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    x, weight = normal(16384, 5120), normal(5120)
    heads, (gate, up) = normal(1, 16384, HEADS, HEAD_DIM), (normal(16384, 8192) for _ in range(2))
    turn = rotation(torch.arange(16384, device="cuda")[None], torch.rand(64, device="cuda"))
    cases = (
        (RMS_NORM, (x, weight), (1e-5,), 5 * x.numel()),
        (ROTATE_UNIT, (heads,), (turn, 1e-5), 5 * heads.numel()),
        (SWIGLU, (gate, up), (), 8 * gate.numel()),
    )
    for op, leaves, rest, moved in cases:
        for version in op.versions:
            run = with_rest(version.load(), rest)
            spent = time_s(repeats, gradients, run, leaves, torch.randn_like(leaves[0]))
            share = 2 * moved / spent / bandwidth
            yield f"{op.name:12} {version.name:10} {spent * 1e6:8.0f} us {share:4.0%}"


def with_rest(run: Callable[..., Tensor], rest: tuple[Any, ...]) -> Callable[..., Tensor]:
    return lambda *leaves: run(*leaves, *rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="train,decode,loss,rows")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: these kernels are timed on a GPU or not at all")
    flops, bandwidth = ceilings(args.repeats)
    print(torch.cuda.get_device_name(), f"bf16 {flops / 1e12:.0f} TFLOP/s", end="  ")
    print(f"copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    cases = {"train": train_cases, "decode": decode_cases, "loss": loss_cases, "rows": row_cases}
    for name in args.only.split(","):
        ceiling = flops if name in ("train", "loss") else bandwidth
        for line in cases[name](args.repeats, ceiling):
            print(line, flush=True)


if __name__ == "__main__":
    main()
