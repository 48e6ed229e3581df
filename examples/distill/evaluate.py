"""Measure checkpoints on several held-out folders, one row of a table each.

in: folders of shards, run folders; out: bits per byte on stdout
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from l4cli.checkpoint import load_model
from l4cli.data.loader import eval_batches
from l4cli.data.shards import ShardSet
from l4cli.evals.bits_per_byte import held_out


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", type=Path, action="append", required=True, help="packed shards")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    arguments = parser.parse_args()
    folders = [ShardSet.open(folder) for folder in arguments.on]
    print("| run | " + " | ".join(str(shards.folder.name) for shards in folders) + " |")
    print("|---|" + "---|" * len(folders))
    for run in arguments.runs:
        model = load_model(run / "latest", dtype=torch.bfloat16)
        chunk = model.config.text.attention_chunk_size
        bits = []
        for shards in folders:
            batches = eval_batches(shards, 16, chunk)
            bits.append(held_out(model, batches, shards.tokenizer().num_bytes()).bits_per_byte)
        print(f"| {run.name} | " + " | ".join(f"{each:.4f}" for each in bits) + " |", flush=True)


if __name__ == "__main__":
    main()
