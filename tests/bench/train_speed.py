"""Training speed beside transformers: same model, batch, data and optimizer, one thread.

usage: python tests/bench/train_speed.py [--rounds 3] [--steps 3] [--dtypes fp32,bf16] [--experts 8]
       [--every-layer] [--profile]

Each run is a process of its own (clean peak memory), the two sides in turn; figures are CPU time,
so that another program on the machine weighs little. transformers keeps its parameters in the
compute dtype; `l4` computes in it over fp32 masters.
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
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "intermediate_size_mlp": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 256,
}
BATCH, LENGTH = 4, 1024


def transformers_step(shape: dict[str, Any], dtype: Any, ids: Any) -> Callable[[], float]:
    """The peer: Llama4ForCausalLM with its fastest CPU attention."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torchvision_schemas

    torchvision_schemas.declare()
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(**shape, use_cache=False, attn_implementation="sdpa")
    model = Llama4ForCausalLM(config).train().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def l4_step(shape: dict[str, Any], dtype: Any, ids: Any) -> Callable[[], float]:
    """Our model, op by op as `l4 pretrain` runs it."""
    import torch

    from l4cli.model import Llama4Config, TextConfig, build_model
    from l4cli.ops.batch import Batch
    from l4cli.ops.cross_entropy import linear_cross_entropy

    model = build_model(Llama4Config(text=TextConfig(**shape), vision=None), seed=0)
    model.compute_dtype = dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = Batch.from_tokens(ids, attention_chunk_size=shape["attention_chunk_size"])
    weights_M, labels_M = batch.loss_weight.flatten(), batch.labels.flatten()

    def step() -> float:
        h_MD = model.hidden(batch).flatten(0, 1)
        loss = linear_cross_entropy(h_MD, model.lm_head.weight, labels_M, weights_M)
        loss = loss / weights_M.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def run_side(side: str, dtype_name: str, shape: dict[str, Any], steps: int, profile: bool) -> None:
    """One process: warm up, time, print one JSON line."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    ids = torch.randint(0, shape["vocab_size"], (BATCH, LENGTH))
    step = {"transformers": transformers_step, "l4": l4_step}[side](shape, dtype, ids)
    first_loss = step()
    times = []
    for _ in range(steps):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"cpu_s": statistics.median(times), "peak_mb": peak_mb, "first_loss": first_loss}
    print(json.dumps(figures), flush=True)
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        print(table, file=sys.stderr)


def measure(side: str, dtype: str, shape: dict[str, Any], args: argparse.Namespace) -> dict:
    call = [sys.executable, __file__, "--side", side, "--dtypes", dtype, "--steps", str(args.steps)]
    call += ["--experts", str(args.experts)] + ["--every-layer"] * args.every_layer
    call += ["--profile"] * (args.profile and side == "l4")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    stderr = None if args.profile else subprocess.DEVNULL
    done = subprocess.run(call, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if done.returncode:
        sys.exit(f"{side} {dtype} failed: {' '.join(call)}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Interleave the sides and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--every-layer", action="store_true", help="a mixture on every layer")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--side", choices=["l4", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = {**SHAPE, "num_local_experts": args.experts}
    shape["interleave_moe_layer_step"] = 1 if args.every_layer else 2
    if args.side:
        run_side(args.side, args.dtypes, shape, args.steps, args.profile)
        return
    layers = "every layer" if args.every_layer else "every second layer"
    load = os.getloadavg()[0]
    print(f"# {args.experts} experts on {layers}, {BATCH} x {LENGTH} tokens, load {load:.1f}")
    for dtype in args.dtypes.split(","):
        runs: dict[str, list[dict]] = {"transformers": [], "l4": []}
        for _ in range(args.rounds):
            for side, figures in runs.items():
                figures.append(measure(side, dtype, shape, args))
        speed, peak = {}, {}
        for side, figures in runs.items():
            speed[side] = BATCH * LENGTH / statistics.median(f["cpu_s"] for f in figures)
            peak[side] = statistics.median(f["peak_mb"] for f in figures)
            print(f"{dtype} {side:<12} {speed[side]:7.0f} tok/core-s  {peak[side]:6.0f} MB peak")
        faster, larger = (of["l4"] / of["transformers"] for of in (speed, peak))
        print(f"{dtype} l4 / transformers: {faster:.2f}x speed, {larger:.2f}x memory")


if __name__ == "__main__":
    main()
