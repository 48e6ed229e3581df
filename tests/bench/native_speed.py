"""Decode and prefill of the C++ engine at batch 1, beside llama.cpp where it is given.

run: python tests/bench/native_speed.py [--threads 1 2] [--repeats 5] [--folder DIR]
     [--llama-bench PATH --gguf FILE]
out: a table: tokens per second by threads and depth, medians of rounds in which both sides take
turns, bytes of weights a token reads and the share of the read bandwidth measured in the same
rounds, memory, time to the first token. The shape is bench-m, random weights, int4 in groups of 32.
Time is wall time; `--cpu-time` counts this process's own, for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decode_speed import BENCH_M

from l4cli.inference import Engine, Request, kernel_file
from l4cli.inference.native import NativeModel, why_not
from l4cli.inference.native_loading import native_from_model
from l4cli.model import Llama4Config, build_model
from l4cli.quantization import WeightFormat

Clock = Callable[[], float]


def config() -> Llama4Config:
    return Llama4Config.from_dict({**BENCH_M, "model_type": "llama4_text"})


def made(folder: Path) -> Path:
    """The file of laid out weights; made when it is missing or of another version."""
    path = folder / kernel_file.KERNELS
    try:
        kernel_file.open_file(path, is_mapped=True)
    except Exception:
        folder.mkdir(parents=True, exist_ok=True)
        model = build_model(config(), dtype=torch.bfloat16, seed=0)
        path.unlink(missing_ok=True)
        native_from_model(model, lambda name: WeightFormat("int4", 32), folder=folder)
    return path


def token_bytes(weights: kernel_file.KernelFile) -> int:
    """Bytes of weights that one token reads: of the experts of a layer, `top_k`."""
    text = config().text
    total = 0
    for name, layouts in weights.layouts.items():
        size = sum(layout.num_bytes for layout in layouts)
        share = text.num_experts_per_tok / text.num_local_experts if ".experts." in name else 1
        total += int(size * share)
    num_moe = sum(text.is_moe(i) for i in range(text.num_hidden_layers))
    return total + num_moe * 4 * text.hidden_size * text.num_local_experts


def kv_bytes(depth: int) -> int:
    """Bytes of keys and values in bf16 that a token at this depth reads, inside one chunk."""
    text = config().text
    return depth * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * 2


def bandwidth(weights: kernel_file.KernelFile, clock: Clock) -> float:
    """GB/s of reading all weights, more than the last cache holds, with torch's threads."""
    data = torch.from_numpy(weights.bytes).view(torch.int64)
    best = 0.0
    for _ in range(3):
        start = clock()
        data.max()
        best = max(best, weights.size_bytes / (clock() - start) / 1e9)
    return best


def decode(engine: Engine, depth: int, num_tokens: int, clock: Clock) -> float:
    """Tokens per second after a prompt of `depth`; the prompt's own token is not counted."""
    cache = engine.prefill(torch.randint(3, 32000, (max(1, depth),)))
    events = engine.generate([Request([], cache=cache, max_new_tokens=num_tokens + 1)])
    next(events)
    start = clock()
    assert len(list(events)) == num_tokens
    return num_tokens / (clock() - start)


def prefill(engine: Engine, length: int, clock: Clock) -> float:
    ids = torch.randint(3, 32000, (length,))
    start = clock()
    engine.prefill(ids)
    return length / (clock() - start)


def first_token(path: Path) -> float:
    """Seconds from opening the file to the first token of a short prompt."""
    start = time.perf_counter()
    engine = Engine(NativeModel(kernel_file.open_file(path, is_mapped=True), config()))
    next(iter(engine.generate([Request([5, 6, 7], max_new_tokens=1)])))
    return time.perf_counter() - start


def llama(args: argparse.Namespace, threads: int, prompt: int, new: int, depth: int) -> float:
    """One figure of llama-bench, tokens per second."""
    command = [args.llama_bench, "-m", args.gguf, "-t", str(threads), "-r", "1", "-o", "json"]
    command += ["-p", str(prompt), "-n", str(new), "-d", str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)[-1]["avg_ts"])


def measure(args: argparse.Namespace, path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    clock = time.process_time if args.cpu_time and threads == 1 else time.perf_counter
    weights = kernel_file.open_file(path)
    engine = Engine(NativeModel(weights, config()))
    ours: dict[str, list[float]] = {}
    peers: dict[str, list[float]] = {}
    read: list[float] = []
    for round_ in range(args.repeats + 1):
        found = {f"decode {d}": decode(engine, d, args.new_tokens, clock) for d in args.depths}
        found |= {f"prefill {n}": prefill(engine, n, clock) for n in args.prompts}
        if round_:  # the first round warms up
            read.append(bandwidth(weights, clock))
            for name, rate in found.items():
                ours.setdefault(name, []).append(rate)
            for name in found if args.llama_bench else ():
                what, size = name.split()
                shape = (0, args.new_tokens, int(size)) if what == "decode" else (int(size), 0, 0)
                peers.setdefault(name, []).append(llama(args, threads, *shape))
    ceiling = statistics.median(read)
    print(f"\n{threads} threads, {engine.model.instructions}, read bandwidth {ceiling:.1f} GB/s")
    print(
        f"{'tok/s':<14}{'l4':>9}{'spread':>9}{'GB/s':>7}{'share':>7}{'llama.cpp':>11}{'ratio':>7}"
    )
    for name, rates in ours.items():
        rate = statistics.median(rates)
        line = f"{name:<14}{rate:>9.1f}{max(rates) / min(rates) - 1:>9.0%}"
        if name.startswith("decode"):
            size = token_bytes(weights) + kv_bytes(int(name.split()[1]))
            line += f"{rate * size / 1e9:>7.1f}{rate * size / 1e9 / ceiling:>7.0%}"
        else:
            line += f"{'':>14}"
        if name in peers:
            peer = statistics.median(peers[name])
            line += f"{peer:>11.1f}{rate / peer:>6.2f}x"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="*", default=[0, 2048])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/l4-native-speed"))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--llama-bench")
    parser.add_argument("--gguf")
    args = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    path = made(args.folder)
    weights = kernel_file.open_file(path, is_mapped=True)
    size, per_token = weights.size_bytes / 1e6, token_bytes(weights) / 1e6
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"bench-m int4 g32: file {size:.0f} MB, {per_token:.0f} MB a token, load {load}")
    times = sorted(first_token(path) for _ in range(3))
    print(f"first token after {times[1]:.3f} s (warm file, imports apart)")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for threads in args.threads:
        measure(args, path, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\nresident at most {peak / 1024:.0f} MiB, {base / 1024:.0f} MiB after the first tokens")


if __name__ == "__main__":
    main()
