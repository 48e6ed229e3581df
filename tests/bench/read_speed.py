"""How fast long texts are read, how much memory they take, and what other formats of keys lose.

run: python tests/bench/read_speed.py [--shape one-nope|two-nope] [--tokens 64k,1m] [--hidden 128]
     [--dtype fp32|bf16] [--kv-dtype auto] [--threads 2] [--ten-million] [--loss] [--sparse 256]
out: one line a length: wall and CPU seconds, tokens a second, the quadratic part with its rate
beside the same at 8k, twenty questions on the cache, bytes kept, peak memory of the process
Shapes: 4 layers with one NoPE layer at the end (linear: nobody asks it), or 8 with two (the one in
the middle is quadratic). Chunks of 128, 2 heads of 64, one of keys, dense, 320 byte tokens.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from typing import Any

import torch

from l4cli.inference import Cache, CacheOptions, Engine, pack_weights
from l4cli.model import Llama4Config, build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = {"k": 1024, "m": 1024**2}
QUESTIONS, QUESTION_TOKENS = 20, 16
HEADS, HEAD_DIM = 2, 64


def config_of(num_layers: int, hidden: int) -> Llama4Config:
    keys = {
        "model_type": "llama4_text",
        "vocab_size": 320,
        "hidden_size": hidden,
        "intermediate_size": 256,
        "intermediate_size_mlp": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "moe_layers": [],
        "attention_chunk_size": 128,
        "max_position_embeddings": 10_485_760,
        "rope_theta": 100.0,
    }
    return Llama4Config.from_dict(keys)


class Timed:
    """A cache whose full layers note how long they attend."""

    def __init__(self, engine: Engine) -> None:
        self.cache = engine.new_cache()
        self.time_s = self.cpu_s = 0.0
        for layer in self.cache.layers:
            if layer.chunk_size is None:
                layer.attend = self._noting(layer.attend)  # type: ignore[method-assign]

    def _noting(self, attend: Any) -> Any:
        def run(*tensors: torch.Tensor) -> torch.Tensor:
            start, cpu = time.perf_counter(), time.process_time()
            out = attend(*tensors)
            self.time_s += time.perf_counter() - start
            self.cpu_s += time.process_time() - cpu
            return out

        return run


def attention_flops(engine: Engine, num_tokens: int) -> float:
    """Of full layers before the last, which is asked for one token only."""
    text = engine.config.text
    full = [i for i in range(text.num_hidden_layers - 1) if not text.is_local(i)]
    return len(full) * 4 * HEADS * HEAD_DIM * num_tokens * (num_tokens + 1) / 2


def read(engine: Engine, num_tokens: int) -> tuple[Cache, str, float]:
    """Read random bytes and ask; the line to print, and the rate of the quadratic part."""
    ids = torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(0))
    timed = Timed(engine)
    start, cpu = time.perf_counter(), time.process_time()
    cache = engine.prefill(ids, cache=timed.cache)
    time_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    engine.score_many(cache, ids[: QUESTIONS * QUESTION_TOKENS].split(QUESTION_TOKENS))
    ask_s = time.perf_counter() - start
    flops = attention_flops(engine, num_tokens)
    rate = flops / max(timed.time_s, 1e-9) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = f"{num_tokens:>10} {time_s:>8.2f} {cpu_s:>8.2f} {num_tokens / time_s:>10.0f}"
    if flops:
        line += f" {timed.time_s:>9.2f} {rate:>8.1f} {flops / max(timed.cpu_s, 1e-9) / 1e9:>8.1f}"
    else:
        line += f" {'-':>9} {'-':>8} {'-':>8}"
    line += f" {ask_s:>7.3f} {cache.size_bytes / 2**20:>9.1f} {peak:>7.2f}"
    return cache, line, rate


def speeds(engine: Engine, lengths: list[int]) -> None:
    print(
        f"{'tokens':>10} {'wall s':>8} {'CPU s':>8} {'tok/s':>10} {'full s':>9} {'GFLOP/s':>8} "
        f"{'per CPU':>8} {'ask s':>7} {'kept MiB':>9} {'GiB':>7}"
    )
    engine.prefill(torch.randint(0, 256, (8192,)))  # warm up
    for num_tokens in lengths:
        cache, line, _ = read(engine, num_tokens)
        print(line, flush=True)
        for layer, recall in cache.recall.items():
            print(f"{'':>10} layer {layer}: pages held {recall.mean:.4f}, least {recall.least:.4f}")
        del cache


def losses(model: Any, num_tokens: int) -> None:
    """Against fp32 keys and values: answers' log-probabilities after a long past."""
    ids = torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(1))
    asked = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(2)).unbind()
    exact: torch.Tensor | None = None
    print(f"after {num_tokens} tokens: difference of {64 * 32} log-probabilities from fp32")
    for kv_dtype in ("fp32", "bf16", "int8", "int4"):
        engine = Engine(model, cache_options=CacheOptions(kv_dtype))
        cache = engine.prefill(ids)
        scores = torch.cat([logprobs for logprobs, _ in engine.score_many(cache, asked)])
        exact = scores if exact is None else exact
        off = (scores - exact).abs()
        size = cache.size_bytes / 2**20
        print(f"{kv_dtype:>6}: mean {off.mean():.5f}, most {off.max():.5f}, {size:.1f} MiB kept")


def length_of(text: str) -> int:
    unit = UNITS.get(text[-1].lower())
    return int(text) if unit is None else int(text[:-1]) * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("one-nope", "two-nope"), default="one-nope")
    parser.add_argument("--tokens", default=None, help="as 8k,64k,1m")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--sparse", type=int, default=0, help="pages a query reads")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ten-million", action="store_true", help="also ten million tokens")
    parser.add_argument("--loss", action="store_true", help="what formats lose, instead of speed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    num_layers = {"one-nope": 4, "two-nope": 8}[args.shape]
    default = {"one-nope": "8k,64k,1m", "two-nope": "8k,64k"}[args.shape]
    lengths = [length_of(word) for word in (args.tokens or default).split(",")]
    lengths += [10_000_000] if args.ten_million else []
    model = build_model(config_of(num_layers, args.hidden), dtype=DTYPES[args.dtype], seed=0)
    reason = pack_weights(model)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{args.shape}, {num_layers} layers, hidden {args.hidden}, {args.dtype}", end=", ")
    print(f"keys {args.kv_dtype}, {args.threads} threads, torch {torch.__version__}, load {load}")
    print("weights packed" if reason is None else f"weights plain: {reason}")
    if args.loss:
        losses(model, lengths[-1])
    else:
        options = CacheOptions(args.kv_dtype, args.sparse)
        speeds(Engine(model, cache_options=options), lengths)


if __name__ == "__main__":
    main()
