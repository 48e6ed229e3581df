"""Measure `l4 tokenize | l4 pack`, two processes in a pipe, beside tiktoken's batch call.

in: the real Llama 4 vocabulary and the standard library's sources; out: both sides' MB/s, ratio
run: python tests/bench/pack_speed.py [--megabytes 120] [--rounds 3] [--folder DIR]

tiktoken encodes texts that are already in memory, on all cores, and keeps the ids. `l4` reads the
files, encodes, sends frames through the pipe, packs best-fit, shuffles, hashes, writes and syncs
the shards. What both processes take for an almost empty input (imports, the vocabulary) is
measured too and shown apart: it does not grow. Rounds alternate; medians are shown.
CPU time is that of all processes; on a busy machine it says more than wall time.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken

from l4cli.data.shards import ShardSet
from l4cli.text import load_tokenizer
from l4cli.text.splitting import LLAMA4_PATTERN

DEFAULT_FIXTURES = Path(__file__).parents[2] / ".." / "shared" / "fixtures"


def copy_sources(folder: Path, num_bytes: int) -> list[str]:
    """Copy the standard library's Python files until there are enough; their texts."""
    texts: list[str] = []
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        (folder / f"{len(texts):06d}.py").write_bytes(text.encode())
        texts.append(text)
        total += path.stat().st_size
        if total >= num_bytes:
            break
    return texts


def run_pipe(docs: Path, vocabulary: Path, out: Path) -> int:
    """`l4 tokenize DOCS | l4 pack -o OUT`; the tokens packed."""
    l4 = [sys.executable, "-m", "l4cli"]
    producer = subprocess.Popen(
        [*l4, "tokenize", str(docs), "--tokenizer", str(vocabulary), "-q"], stdout=subprocess.PIPE
    )
    consumer = subprocess.run([*l4, "pack", "-o", str(out), "-q"], stdin=producer.stdout)
    assert producer.stdout is not None
    producer.stdout.close()
    assert (producer.wait(), consumer.returncode) == (0, 0)
    num_tokens = ShardSet.open(out).num_tokens
    shutil.rmtree(out)
    return num_tokens


def timed(function: Callable[[], int]) -> tuple[int, float, float]:
    """Result, wall seconds, CPU seconds of this process and its children."""
    began, used = time.perf_counter(), cpu_time()
    num_tokens = function()
    return num_tokens, time.perf_counter() - began, cpu_time() - used


def cpu_time() -> float:
    sides = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    return sum(side.ru_utime + side.ru_stime for side in sides)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put text and shards")
    args = parser.parse_args()
    fixtures = Path(os.environ.get("L4_FIXTURES", DEFAULT_FIXTURES))
    vocabulary = fixtures / "llama4-tokenizer" / "tokenizer.model"
    tokenizer = load_tokenizer(vocabulary)
    encoding = tiktoken.Encoding(
        "llama4",
        pat_str=LLAMA4_PATTERN,
        mergeable_ranks={tokenizer.token_bytes(i): i for i in range(200_000)},
        special_tokens=tokenizer.special_tokens,
    )
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        docs, tiny, out = Path(name) / "docs", Path(name) / "tiny", Path(name) / "shards"
        docs.mkdir()
        tiny.mkdir()
        (tiny / "a.txt").write_text("a\n")
        texts = copy_sources(docs, int(args.megabytes * 1e6))
        num_bytes = sum(len(text.encode()) for text in texts)
        print(
            f"{len(texts)} files, {num_bytes / 1e6:.1f} MB, {cores} cores, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        sides: dict[str, Callable[[], int]] = {
            "tiktoken": lambda: sum(
                map(len, encoding.encode_ordinary_batch(texts, num_threads=cores))
            ),
            "l4 tokenize | l4 pack": lambda: run_pipe(docs, vocabulary, out),
            "the same, of nothing": lambda: run_pipe(tiny, vocabulary, out),
        }
        taken: dict[str, list[tuple[int, float, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, run in sides.items():
                taken[side].append(timed(run))
        report(taken, num_bytes, len(texts))


def report(
    taken: dict[str, list[tuple[int, float, float]]], num_bytes: int, num_texts: int
) -> None:
    peer, ours, start = (
        [statistics.median(round_[i] for round_ in rounds) for i in range(3)]
        for rounds in taken.values()
    )
    assert ours[0] == peer[0] + 2 * num_texts, "ids differ"  # BOS and EOS of each document
    for side, (_, wall, cpu) in zip(taken, (peer, ours, start), strict=True):
        speed = f"{num_bytes / 1e6 / wall:.1f} and {num_bytes / 1e6 / cpu:.1f} MB/s"
        print(f"{side:22} {wall:6.2f} s wall, {cpu:6.2f} s CPU: {speed}")
    for i, clock in ((1, "wall"), (2, "CPU")):
        print(
            f"l4 / tiktoken by {clock} time: {peer[i] / ours[i]:.2f}, "
            f"without starting up {peer[i] / (ours[i] - start[i]):.2f}"
        )


if __name__ == "__main__":
    main()
