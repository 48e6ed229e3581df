"""What a checked guess is worth: tokens per second by how often guesses are right.

run: python tests/bench/speculative_speed.py [--preset nano | --bench-m] [--dtype bf16|fp32]
out: one table; medians of rounds in which all rates take turns, and the load of the machine
The drafter knows the answer and errs at a given rate, at no cost: what is measured is the price
of checking, and what the adaptive number of guesses makes of it. A real draft adds its own time.
With one thread the clock is CPU time, which a busy machine stretches less.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from decode_speed import BENCH_M

from l4cli.inference import Engine, Request, Speculation, pack_weights, step_cost
from l4cli.inference.drafts import Draft
from l4cli.inference.sampler import Sampler
from l4cli.model import Llama4Config, build_model, load_preset

RATES = (0.0, 0.5, 0.7, 0.9, 1.0)


class KnowingDrafter:
    """Knows the answer; each guess is right with one probability."""

    def __init__(self, answer: list[int], num_read: int, rate: float) -> None:
        self.answer, self.num_read, self.rate = answer, num_read, rate
        self.random, self.num_said = random.Random(0), 0

    def follow(self, ids_T: torch.Tensor) -> None:
        self.num_said = len(ids_T) - self.num_read

    def add(self, tokens: Iterable[int]) -> None:
        self.num_said += len(list(tokens))

    def draft(self, count: int, sampler: Sampler) -> Draft:
        ahead = self.answer[self.num_said : self.num_said + count]
        tokens = [t if self.random.random() < self.rate else (t + 1) % 1000 for t in ahead]
        return Draft(tokens, [None] * len(tokens))


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--bench-m", action="store_true", help="the 1.06 B shape of decode_speed")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--draft-tokens", type=int, help="default: as many as pay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = replace(load_preset(args.preset), vision=None)
    if args.bench_m:
        config = Llama4Config.from_dict({"model_type": "llama4_text", **BENCH_M})
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    model = build_model(config, dtype=dtype, seed=0)
    packed = "packed" if pack_weights(model) is None else "plain"
    engine = Engine(model)
    prompt = torch.randint(3, config.text.vocab_size, (args.prompt,))
    prefix = engine.prefill(prompt)

    def run(speculation: Speculation | None) -> tuple[list[int], float]:
        request = Request([], cache=prefix.fork(1)[0], max_new_tokens=args.new_tokens)
        start = clock()
        tokens = [event.token for event in engine.generate([request], speculation=speculation)]
        return tokens, len(tokens) / (clock() - start)

    answer, _ = run(None)
    found: dict[float | None, list[float]] = {}
    steps: dict[float | None, Speculation] = {}
    for round_ in range(args.repeats + 1):
        for rate in (None, *RATES):
            speculation = None
            if rate is not None:
                drafter = KnowingDrafter(answer, args.prompt, rate)
                speculation = Speculation(drafter, args.draft_tokens, step_cost(config, None))
                steps[rate] = speculation
            tokens, speed = run(speculation)
            if round_:  # the first round warms up
                found.setdefault(rate, []).append(speed)
            if tokens != answer:  # in bf16 rounding may turn a near choice
                print(f"rate {rate}: parts from the plain answer")
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    name = "bench-m" if args.bench_m else args.preset
    print(f"{name}, {args.dtype}, weights {packed}, {args.threads} threads, greedy, random weights")
    print(f"torch {torch.__version__}, load {load}")
    print(f"{'right':>6}{'tok/s':>10}{'ratio':>8}{'guesses':>9}{'taken':>7}  a step")
    plain = statistics.median(found[None])
    for rate, speeds in found.items():
        speed = statistics.median(speeds)
        label = "none" if rate is None else f"{rate:.0%}"
        line = f"{label:>6}{speed:>10.1f}{speed / plain:>7.2f}x"
        if rate is not None:
            counted = steps[rate]
            line += f"{counted.num_drafted / counted.num_steps:>9.2f}"
            line += f"{counted.accepted_per_step:>7.2f}"
        print(line)


if __name__ == "__main__":
    main()
