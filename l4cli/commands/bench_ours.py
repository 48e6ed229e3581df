"""Our side of `l4 bench`: the engine that `l4 chat` uses, and a training step.

in: a checkpoint; out: tokens per second of reading, answering and training
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from l4cli.checkpoint import load_model
from l4cli.commands import chat_model
from l4cli.commands.bench_cases import PREFILL, TRAIN, Case
from l4cli.inference import Cache, Request, SamplingOptions
from l4cli.inference.native import NativeModel
from l4cli.ops.batch import Batch
from l4cli.ops.cross_entropy import linear_cross_entropy
from l4cli.planning.roofline import experts_met
from l4cli.training.optim import Optimizer, OptimizerOptions

LEARNING_RATE = 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_ids(count: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Ids of a text that nobody wrote."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator)


def finished(device: torch.device) -> float:
    """The time, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class OurEngine:
    """Reads and answers, loaded as `l4 chat` loads it."""

    name = "l4"

    def __init__(self, folder: Path, device: str, dtype: str, vocab_size: int) -> None:
        self.engine = chat_model.load(folder, device, dtype, is_raw=True).engine
        self.vocab_size = vocab_size
        self._pasts: dict[int, Cache] = {}

    @property
    def native(self) -> NativeModel | None:
        """The model where it runs in C++."""
        model: object = self.engine.model
        return model if isinstance(model, NativeModel) else None

    def why_not(self, case: Case) -> str | None:
        return "it is for answering" if case.what == TRAIN else None

    def run(self, case: Case) -> float:
        return self._prefill(case) if case.what == PREFILL else self._decode(case)

    def _prefill(self, case: Case) -> float:
        caches = [self._past(case.depth).fork(1)[0] for _ in range(case.batch)]
        texts = [random_ids(case.num_tokens, self.vocab_size, 1 + i) for i in range(case.batch)]
        start = finished(self.engine.device)
        for cache, ids in zip(caches, texts, strict=True):
            self.engine.prefill(ids, cache=cache)
        return case.batch * case.num_tokens / (finished(self.engine.device) - start)

    def _decode(self, case: Case) -> float:
        """Time the steps alone: an answer's first token is chosen from what was read before.

        Several sequences go on with different tokens, so that they meet different experts.
        """
        requests = []
        for i, cache in enumerate(self._past(case.depth).fork(case.batch)):
            self.engine.prefill(random_ids(1, self.vocab_size, 1 + i), cache=cache)
            sampling = SamplingOptions(temperature=0.0 if case.batch == 1 else 1.0, seed=i)
            new_tokens = case.num_tokens + 1
            requests.append(Request([], max_new_tokens=new_tokens, cache=cache, sampling=sampling))
        events = self.engine.generate(requests, max_batch_size=case.batch)
        for _ in range(case.batch):
            next(events)
        start = finished(self.engine.device)
        count = sum(1 for _ in events)
        assert count == case.batch * case.num_tokens
        return count / (finished(self.engine.device) - start)

    def _past(self, depth: int) -> Cache:
        """A cache that has read so many tokens; read once, forked for every use."""
        if depth not in self._pasts:
            cache = self.engine.new_cache()
            if depth:
                self.engine.prefill(random_ids(depth, self.vocab_size, 0), cache=cache)
            self._pasts[depth] = cache
        return self._pasts[depth]


def native_weight_bytes(model: NativeModel, num_sequences: int) -> float:
    """Bytes of the weights that a step meets, as they are laid out; of experts those chosen."""
    text = model.config.text
    chosen = experts_met(text, num_sequences) / text.num_local_experts
    num_moe = sum(map(text.is_moe, range(text.num_hidden_layers)))
    total = 4.0 * num_moe * text.num_local_experts * text.hidden_size  # routers, fp32
    for name, layouts in model.weights.layouts.items():
        size = sum(layout.num_bytes for layout in layouts)
        total += size * chosen if ".experts." in name else size
    return total


class OurTraining:
    """One training step after another: forward, backward, AdamW over fp32 masters."""

    name = "l4"

    def __init__(self, folder: Path, device: torch.device, dtype: str) -> None:
        self.device = device
        self.model = load_model(folder, device=device, dtype=torch.float32)
        self.model.compute_dtype = DTYPES[dtype]
        self.optimizer = Optimizer(self.model.named_parameters(), OptimizerOptions())

    def why_not(self, case: Case) -> str | None:
        return None if case.what == TRAIN else "it is for training"

    def run(self, case: Case) -> float:
        text = self.model.config.text
        shape = (case.batch, case.num_tokens)
        ids = random_ids(case.batch * case.num_tokens, text.vocab_size, 0).view(shape)
        batch = Batch.from_tokens(
            ids.to(self.device), attention_chunk_size=text.attention_chunk_size
        )
        weights_M, labels_M = batch.loss_weight.flatten(), batch.labels.flatten()
        start = finished(self.device)
        h_MD = self.model.hidden(batch).flatten(0, 1)
        loss = linear_cross_entropy(h_MD, self.model.lm_head.weight, labels_M, weights_M)
        (loss / weights_M.sum()).backward()
        self.optimizer.step(LEARNING_RATE)
        self.optimizer.zero_grad()
        return case.batch * case.num_tokens / (finished(self.device) - start)
