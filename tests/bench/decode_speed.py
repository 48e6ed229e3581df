"""Prefill and decode at batch 1, ours beside transformers `generate`, on the same weights.

run: python tests/bench/decode_speed.py [--threads 1] [--repeats 5] [--dtype bf16|fp32]
out: one table; medians of rounds in which the two sides take turns, and the load of the machine
With one thread the clock is CPU time, which a busy machine stretches less; else it is wall time.
The shape is facts/INFERENCE.md's bench-m: 1.06 B parameters, 276 M active, 16 experts, top-1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from l4cli.inference import Engine, Request, pack_weights
from l4cli.model import Llama4Config, build_model

BENCH_M = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "intermediate_size_mlp": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 131072,
    "attention_chunk_size": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def load_transformers() -> Any:
    """Import the peer, beside whatever torchvision there is."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torchvision_schemas

    torchvision_schemas.declare()
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def both_models(transformers: Any, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One set of random weights in transformers' modules and in ours."""
    config = transformers.Llama4TextConfig(**BENCH_M)
    torch.manual_seed(0)
    peer = transformers.Llama4ForCausalLM._from_config(
        config, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        for weight in peer.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    ours = build_model(Llama4Config.from_dict(config.to_dict()), device="meta", dtype=dtype)
    ours.load_state_dict(peer.state_dict(), assign=True)
    return peer, ours


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peer_times(peer: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> float:
    start = clock()
    peer.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return clock() - start


def our_times(engine: Engine, prompt: torch.Tensor, new_tokens: int) -> float:
    start = clock()
    assert len(list(engine.generate([Request(prompt, max_new_tokens=new_tokens)]))) == new_tokens
    return clock() - start


def measure(
    sides: dict[str, Callable[[torch.Tensor, int], float]], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Tokens per second of prefill and decode, medians over interleaved rounds."""
    long = torch.randint(3, 32000, (args.prompt,))
    times: dict[tuple[str, str], list[float]] = {}
    for round_ in range(args.repeats + 1):
        for name, run in sides.items():
            first = run(long, 1)
            rest = run(long, 1 + args.new_tokens) - first
            if round_:  # the first round warms up
                times.setdefault((name, "prefill"), []).append(args.prompt / first)
                times.setdefault((name, "decode"), []).append(args.new_tokens / rest)
    medians: dict[str, dict[str, float]] = {}
    for (name, what), values in times.items():
        medians.setdefault(what, {})[name] = statistics.median(values)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers = load_transformers()
    peer, ours = both_models(
        transformers, {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    )
    reason = pack_weights(ours)  # as `l4 chat` does
    engine = Engine(ours)
    sides = {
        "transformers": lambda prompt, n: peer_times(peer, prompt, n),
        "l4": lambda prompt, n: our_times(engine, prompt, n),
    }
    figures = measure(sides, args)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"bench-m, {args.dtype}, {args.threads} threads, {args.prompt} tokens prompt, batch 1")
    print("weights packed" if reason is None else f"weights plain: {reason}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, load {load}")
    print(f"{'tok/s':<10}{'transformers':>14}{'l4':>10}{'ratio':>8}")
    for what, row in figures.items():
        peer_rate, rate = row["transformers"], row["l4"]
        print(f"{what:<10}{peer_rate:>14.1f}{rate:>10.1f}{rate / peer_rate:>7.2f}x")


if __name__ == "__main__":
    main()
