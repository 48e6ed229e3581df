"""Whom `l4 bench` measures beside us: llama.cpp's llama-bench, and transformers.

in: a GGUF file, a checkpoint; out: tokens per second of the same work, or why it cannot be done
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from l4cli.checkpoint.gguf_fit import misfits
from l4cli.commands.bench_cases import DECODE, PREFILL, TRAIN, Case
from l4cli.commands.bench_ours import DTYPES, LEARNING_RATE, finished, random_ids
from l4cli.errors import L4Error, UsageError
from l4cli.model import Llama4Config


class LlamaBench:
    """llama.cpp on a CPU: one call of its own benchmark for each figure."""

    name = "llama.cpp"

    def __init__(self, program: Path, file: Path, num_threads: int) -> None:
        self.program, self.file, self.num_threads = program, file, num_threads

    def why_not(self, case: Case) -> str | None:
        if case.what == TRAIN:
            return "llama-bench does not train"
        return "llama-bench has no batches" if case.batch > 1 else None

    def run(self, case: Case) -> float:
        numbers = {"-p": 0, "-n": 0, "-d": case.depth, "-t": self.num_threads, "-r": 1}
        numbers["-ngl"] = 0  # a build for GPUs too is measured where we are
        numbers["-p" if case.what == PREFILL else "-n"] = case.num_tokens
        words = [word for flag, number in numbers.items() for word in (flag, str(number))]
        call = [str(self.program), "-m", str(self.file), *words, "-o", "json"]
        done = subprocess.run(call, capture_output=True, text=True)
        try:
            (row,) = json.loads(done.stdout)
            return float(row["avg_ts"])
        except (ValueError, KeyError, TypeError) as error:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            what, fix = f"`{self.program}` failed", "leave it out with `--peers none`"
            raise L4Error(what, why=lines[-1], fix=fix) from error


def find_llama_bench(named: Path | None) -> Path | None:
    """The program named, or the one on the PATH. raises: UsageError when the named one is not"""
    if named is None:
        found = shutil.which("llama-bench")
        return Path(found) if found else None
    path = named / "llama-bench" if named.is_dir() else named
    if shutil.which(path) is None:
        why = "there is no such program"
        fix = "name llama.cpp's `llama-bench`, or the folder it is in"
        raise UsageError(f"cannot run `--llama-bench {named}`", why=why, fix=fix)
    return path


def why_no_gguf(config: Llama4Config) -> str | None:
    """Why no GGUF file is made to compare with: it would not be the same work."""
    if importlib.util.find_spec("gguf") is None:
        return "the `gguf` library is not installed"
    found = misfits(config.text)
    return f"{found[0].what}: {found[0].why}" if found else None


class Transformers:
    """transformers' own model and cache; a loop of forward passes, without `generate`'s cost."""

    name = "transformers"

    def __init__(self, folder: Path, device: torch.device, dtype: str, vocab_size: int) -> None:
        self.device, self.vocab_size = device, vocab_size
        self.model = _load(folder, device, dtype).eval()
        self._pasts: dict[tuple[int, int], Any] = {}

    def why_not(self, case: Case) -> str | None:
        return "it is for answering" if case.what == TRAIN else None

    @torch.inference_mode()
    def run(self, case: Case) -> float:
        past = copy.deepcopy(self._past(case.batch, case.depth))
        if case.what == PREFILL:
            ids = self._ids(case.batch, case.num_tokens, 1)
            start = finished(self.device)
            self._read(ids, past)
            return case.batch * case.num_tokens / (finished(self.device) - start)
        assert case.what == DECODE
        logits, past = self._read(self._ids(case.batch, 1, 1), past)
        start = finished(self.device)
        for _ in range(case.num_tokens):
            logits, past = self._read(logits[:, -1:].argmax(-1), past)
        return case.batch * case.num_tokens / (finished(self.device) - start)

    def _past(self, batch: int, depth: int) -> Any:
        if depth and (batch, depth) not in self._pasts:
            self._pasts[batch, depth] = self._read(self._ids(batch, depth, 0), None)[1]
        return self._pasts.get((batch, depth))

    def _read(self, ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        out = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def _ids(self, batch: int, length: int, seed: int) -> torch.Tensor:
        rows = [random_ids(length, self.vocab_size, seed + i) for i in range(batch)]
        return torch.stack(rows).to(self.device)


class TransformersTraining:
    """The same step as ours: parameters in the dtype of the computation, AdamW."""

    name = "transformers"

    def __init__(self, folder: Path, device: torch.device, dtype: str, vocab_size: int) -> None:
        self.device, self.vocab_size = device, vocab_size
        self.model = _load(folder, device, dtype).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, fused=True, weight_decay=0.1
        )

    def why_not(self, case: Case) -> str | None:
        return None if case.what == TRAIN else "it is for training"

    def run(self, case: Case) -> float:
        ids = random_ids(case.batch * case.num_tokens, self.vocab_size, 0)
        ids = ids.view(case.batch, case.num_tokens).to(self.device)
        start = finished(self.device)
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return case.batch * case.num_tokens / (finished(self.device) - start)


def why_no_transformers(
    config: Llama4Config, *, is_quantized: bool = False, trains: bool = False
) -> str | None:
    """Why transformers is not measured."""
    if is_quantized and trains:
        return "it does not train quantized weights"
    if is_quantized and importlib.util.find_spec("compressed_tensors") is None:
        return "it opens quantized weights with `compressed-tensors`, which is not installed"
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed"
    if not config.text.is_plain:
        return "the shape is no Llama 4"
    return "it would bring its picture encoder along" if config.vision is not None else None


def _load(folder: Path, device: torch.device, dtype: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device)
