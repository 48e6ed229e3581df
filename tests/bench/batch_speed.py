"""Tokens per second of many answers side by side, beside the same answers one by one.

run: python tests/bench/batch_speed.py [--preset nano] [--batches 1,2,4,8,16,32] [--threads 1]
out: one table; medians of rounds in which all batch sizes take turns, and the load of the machine
Weights are random. With one thread the clock is CPU time, which a busy machine stretches less.
"Shared" prompts have a beginning in common, which is read once; "own" prompts have none.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace

import torch

from l4cli.inference import Engine, Request, pack_weights
from l4cli.model import build_model, load_preset


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def requests_of(args: argparse.Namespace, count: int, vocab_size: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, vocab_size, (length,), generator=generator)

    begin = ids(args.shared)
    return [
        Request(torch.cat([begin, ids(args.prompt)]), max_new_tokens=args.new_tokens)
        for _ in range(count)
    ]


def rate(engine: Engine, requests: list[Request], batch_size: int) -> float:
    start = clock()
    num_tokens = sum(1 for _ in engine.generate(requests, max_batch_size=batch_size))
    return num_tokens / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batches", default="1,2,4,8,16,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--plain", action="store_true", help="weights as they are, not packed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = replace(load_preset(args.preset), vision=None)
    model = build_model(config, seed=0)
    packed = "plain" if args.plain or pack_weights(model) is not None else "packed"
    engine = Engine(model)
    sizes = [int(size) for size in args.batches.split(",")]
    requests = requests_of(args, args.requests, config.text.vocab_size)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for round_ in range(args.repeats + 1):
        for size in sizes:
            found = rate(engine, requests, size)
            if round_:  # the first round warms up
                rates[size].append(found)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{args.preset}, fp32, weights {packed}, {args.threads} threads; {args.requests} requests"
        f" of {args.shared} shared and {args.prompt} own tokens, {args.new_tokens} new each"
    )
    print(f"torch {torch.__version__}, load {load}")
    print(f"{'batch':>6}{'tok/s':>10}{'ratio':>8}")
    one = statistics.median(rates[sizes[0]])
    for size, found in rates.items():
        print(f"{size:>6}{statistics.median(found):>10.0f}{statistics.median(found) / one:>7.2f}x")


if __name__ == "__main__":
    main()
