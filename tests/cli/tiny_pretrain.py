"""A model of a few thousand parameters trained through the command line, and what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from l4cli.cli import main

TINY = {
    "model_type": "llama4_text",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 16,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}
TIMINGS = {"tok_per_sec", "mfu", "mem_gib"}


def pack_shards(folder: Path, name: str, file: str, *options: str) -> None:
    stream = folder / f"{name}.tokens"
    assert main(["tokenize", str(folder / file), "-o", str(stream), "-q", *options]) == 0
    shards = str(folder / name)
    assert main(["pack", str(stream), "--seq-len", "64", "-o", shards, "-q"]) == 0


def run_options(data: Path, out: Path, *more: str) -> list[str]:
    tiny = ["--config", str(data / "tiny.json"), "--batch-size", "4", "--log-every", "2"]
    return [str(data / "text"), *tiny, "-o", str(out), *more]


def pretrain(data: Path, out: Path, *more: str) -> int:
    return main(["pretrain", *run_options(data, out, *more)])


def metrics_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]


def weights_of(folder: Path) -> bytes:
    return (folder / "latest" / "model.safetensors").read_bytes()


def as_many_threads() -> dict[str, str]:
    """The last bits of a run depend on the threads, so a process gets as many as we have."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start_process(args: list[str], **kwargs: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "l4cli", "pretrain", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=as_many_threads(),
        **kwargs,  # type: ignore[call-overload]
    )


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    assert "fix:" in captured.err
    return captured.err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
