"""The distillation loss beside plain autograd over all logits, and beside the hard loss alone.

usage: python tests/bench/distillation_speed.py [--tokens 4096] [--dim 128] [--vocab 4096]
       [--entries 32] [--dtype fp32|bf16] [--rounds 3] [--repeats 7]

Forward and backward of the head and the loss, one thread. Each run is a process of its own (clean
peak memory), the sides in turn; times are the median over rounds of the best of some repeats,
CPU time; memory is what the peak adds to the inputs.
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

# name: targets, temperature, per token
CASES = {
    "hard": (None, 1.0, None),
    "full": ("full", 1.0, None),
    "full, per token": ("full", 1.0, 1.0),
    "full, tau 2": ("full", 2.0, None),
    "sparse": ("sparse", 1.0, None),
    "sparse, tau 2": ("sparse", 2.0, None),
}


def problem(args: argparse.Namespace, kind: str | None, tau: float) -> tuple[Any, ...]:
    """States, head, labels, weights, targets; the teacher is as wide as the student."""
    import torch

    from l4cli.ops.batch import SparseTargets
    from l4cli.ops.distillation import FullTargets

    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    states = [torch.randn(args.tokens, args.dim).to(dtype) for _ in range(2)]
    heads = [torch.randn(args.vocab, args.dim) * args.dim**-0.5 for _ in range(2)]
    labels = torch.randint(args.vocab, (args.tokens,))
    targets: Any = None
    if kind == "full":
        targets = FullTargets(states[1], heads[1])
    elif kind == "sparse":
        step = args.vocab // args.entries
        ids = (labels.unsqueeze(-1) + step * torch.arange(args.entries)) % args.vocab
        weights = torch.rand(ids.shape).softmax(-1)
        entropy = -(weights * weights.log()).sum(-1)
        targets = SparseTargets(ids, weights, entropy, args.entries // 2, tau)
    leaves = [states[0].requires_grad_(), heads[0].requires_grad_()]
    return *leaves, labels, torch.full((args.tokens,), 1 / args.tokens), targets


def plain(h: Any, weight: Any, labels: Any, weights: Any, targets: Any, mixing: Any) -> Any:
    """As one writes it without thinking of memory."""
    import torch
    import torch.nn.functional as F

    from l4cli.ops.batch import SparseTargets

    tau = mixing.temperature
    logits = (h @ weight.to(h.dtype).T).float()
    hard = F.cross_entropy(logits, labels, reduction="none")
    if targets is None:
        return (hard * weights).sum()
    student = F.log_softmax(logits / tau, -1)
    picked = labels.unsqueeze(-1)
    if isinstance(targets, SparseTargets):
        soft = -(targets.weights_MK * student.gather(-1, targets.ids_MK)).sum(-1)
        soft, ahead = soft - targets.entropy_M, targets.weights_MK[:, :1].log()
    else:
        with torch.no_grad():
            logits_T = (targets.h_MD @ targets.weight_VD.to(targets.h_MD.dtype).T).float()
            teacher = F.log_softmax(logits_T / tau, -1)
        soft = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        ahead = teacher.gather(-1, picked)
    share: Any = mixing.alpha
    if mixing.gap_scale is not None:
        gap = (ahead - student.detach().gather(-1, picked)).squeeze(-1)
        share = share * (gap / mixing.gap_scale).sigmoid()
    return (((1 - share) * hard + share * tau**2 * soft) * weights).sum()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One side of one case in this process."""
    import torch

    from l4cli.ops.cross_entropy import linear_cross_entropy
    from l4cli.ops.distillation import Mixing, linear_distillation

    torch.set_num_threads(1)
    kind, tau, scale = CASES[args.case]
    h, weight, labels, weights, targets = problem(args, kind, tau)
    mixing = Mixing(0.5, temperature=tau, gap_scale=scale)

    def ours() -> Any:
        if targets is None:
            return linear_cross_entropy(h, weight, labels, weights)
        return linear_distillation(h, weight, labels, weights, targets, mixing).loss

    def theirs() -> Any:
        return plain(h, weight, labels, weights, targets, mixing)

    run: Callable[[], Any] = ours if args.side == "l4" else theirs
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(args.repeats):
        h.grad = weight.grad = None
        start = time.process_time()
        loss = run()
        loss.backward()
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"ms": 1e3 * min(times), "mib": (peak - base) / 1024, "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("tokens", 4096), ("dim", 128), ("vocab", 4096), ("entries", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--side", choices=("l4", "plain"))
    parser.add_argument("--case", choices=tuple(CASES))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    print(
        f"{args.tokens} tokens, {args.dim} x {args.vocab}, {args.dtype}, {os.getloadavg()[0]:.1f}"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    hard_ms = 0.0
    for case in CASES:
        found: dict[str, list[dict[str, float]]] = {"l4": [], "plain": []}
        for _ in range(args.rounds):
            for side, figures in found.items():
                call = [sys.executable, *sys.argv, "--side", side, "--case", case]
                done = subprocess.run(call, env=env, check=True, capture_output=True, text=True)
                figures.append(json.loads(done.stdout))
        ms, mib, loss = (
            {side: statistics.median(f[key] for f in figures) for side, figures in found.items()}
            for key in ("ms", "mib", "loss")
        )
        assert abs(loss["l4"] - loss["plain"]) <= 1e-2 * abs(loss["plain"]), loss
        hard_ms = hard_ms or ms["l4"]
        print(
            f"{case:16s} l4 {ms['l4']:6.0f} ms {mib['l4']:6.0f} MiB   plain {ms['plain']:6.0f} ms "
            f"{mib['plain']:6.0f} MiB   {ms['l4'] / hard_ms:.2f}x the hard loss"
        )


if __name__ == "__main__":
    main()
