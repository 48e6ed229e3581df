"""Measure `l4 tokenize` beside tiktoken's own batch encoding, on the same text and cores.

in: the real Llama 4 vocabulary and the standard library's sources; out: both sides' MB/s, ratio
run: python tests/bench/tokenize_speed.py [--jobs 1 2] [--megabytes 30] [--rounds 3]

tiktoken encodes texts that are already in memory, with `encode_ordinary_batch`; `l4` reads the
files, decodes and cuts them, encodes, and writes the stream (to /dev/null). Loading the vocabulary
is outside of both. Rounds alternate; medians are shown, and the load of the machine.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from l4cli.data.documents import DocumentReader, Report
from l4cli.data.encoding import DocumentEncoder, encode_units
from l4cli.data.geometry import PictureGeometry
from l4cli.data.inputs import Inputs
from l4cli.data.stream import StreamWriter
from l4cli.text import Tokenizer, load_tokenizer

DEFAULT_FIXTURES = Path(__file__).parents[2] / ".." / "shared" / "fixtures"


def sources(num_bytes: int) -> tuple[list[Path], int]:
    """Python files of the standard library, the whole of it or the first `num_bytes`."""
    chosen, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        chosen.append(path)
        total += path.stat().st_size
        if total >= num_bytes:
            break
    return chosen, total


def run_l4(paths: list[Path], tokenizer: Tokenizer, jobs: int) -> int:
    """The work of `l4 tokenize FILES > /dev/null`, without loading the vocabulary."""
    inputs, report, geometry = Inputs([str(path) for path in paths]), Report(), PictureGeometry()
    reader = DocumentReader(inputs, tokenizer.divide, report)
    with open(os.devnull, "wb") as file:
        writer = StreamWriter(file, _WithoutFiles(tokenizer), geometry)
        encoder = DocumentEncoder(tokenizer, geometry)
        for frames, _ in encode_units(reader.units(), encoder, report, jobs):
            for frame in frames:
                writer.write(frame)
        writer.close()
    return writer.totals.tokens - 2 * writer.totals.documents


class _WithoutFiles:
    """A tokenizer whose folder is not written: tiktoken's side does not write it either."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint

    def files(self) -> dict[str, str]:
        return {}


def run_tiktoken(texts: list[str], encoding: object, jobs: int) -> int:
    """Only the library's own call."""
    batches = encoding.encode_ordinary_batch(texts, num_threads=jobs)  # type: ignore[attr-defined]
    return sum(map(len, batches))


def timed(function: Callable[[], int]) -> tuple[int, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    num_tokens = function()
    return num_tokens, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import tiktoken

    fixtures = Path(os.environ.get("L4_FIXTURES", DEFAULT_FIXTURES))
    tokenizer = load_tokenizer(fixtures / "llama4-tokenizer" / "tokenizer.model")
    assert tokenizer.backend == "tiktoken", tokenizer.backend_reason
    from l4cli.text.splitting import LLAMA4_PATTERN

    ranks = {tokenizer.token_bytes(i): i for i in range(200_000)}
    encoding = tiktoken.Encoding(
        "llama4",
        pat_str=LLAMA4_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=tokenizer.special_tokens,
    )
    paths, num_bytes = sources(int(args.megabytes * 1e6))
    texts = [path.read_bytes().decode("utf-8") for path in paths]
    print(f"{len(paths)} files, {num_bytes / 1e6:.1f} MB; load {os.getloadavg()[0]:.1f}")
    sides = {
        "tiktoken": lambda jobs: run_tiktoken(texts, encoding, jobs),
        "l4": lambda jobs: run_l4(paths, tokenizer, jobs),
    }
    for jobs in args.jobs:
        taken: dict[str, list[tuple[int, float, float]]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, run in sides.items():
                taken[name].append(timed(functools.partial(run, jobs)))
        assert len({num for rounds in taken.values() for num, _, _ in rounds}) == 1, "ids differ"
        speed = {}
        for name, rounds in taken.items():
            wall = statistics.median(wall for _, wall, _ in rounds)
            cpu = statistics.median(cpu for _, _, cpu in rounds)
            speed[name] = num_bytes / 1e6 / wall, num_bytes / 1e6 / cpu
            print(
                f"jobs {jobs}  {name:9} {speed[name][0]:6.1f} MB/s of wall time, "
                f"{speed[name][1]:6.1f} MB/s of CPU time, {rounds[0][0] / wall / 1e6:.2f} Mtok/s"
            )
        ratios = [
            ours / theirs for ours, theirs in zip(speed["l4"], speed["tiktoken"], strict=True)
        ]
        print(
            f"jobs {jobs}  l4 / tiktoken: {ratios[0]:.2f} by wall time, {ratios[1]:.2f} by CPU time"
        )


if __name__ == "__main__":
    main()
