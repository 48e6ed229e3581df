"""A model of a few thousand parameters and a source of known batches, for tests of the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4cli.checkpoint import RunFolder
from l4cli.model import Llama4Config, TextConfig, build_model
from l4cli.ops.batch import Batch, Segments
from l4cli.training.balance import Balance, BalanceOptions
from l4cli.training.loop import Loop, LoopOptions
from l4cli.training.objectives.language_model import LanguageModel
from l4cli.training.optim import Optimizer, OptimizerOptions
from l4cli.training.schedule import Schedule
from l4cli.training.trainee import Trainee

CHUNK = 8


def tiny_config() -> Llama4Config:
    """Two layers, the second one sparse and without positions."""
    text = TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=CHUNK,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return Llama4Config(text=text, vision=None)


def batch_of(ids_BT: Tensor, documents_BT: Tensor, weight_BT: Tensor | None = None) -> Batch:
    """A packed batch, made plainly."""
    is_same = torch.zeros_like(documents_BT, dtype=torch.bool)
    is_same[:, :-1] = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, 1:] != 0)
    positions_BT = torch.zeros_like(ids_BT)
    for t in range(1, ids_BT.shape[1]):
        goes_on = documents_BT[:, t] == documents_BT[:, t - 1]
        positions_BT[:, t] = torch.where(goes_on, positions_BT[:, t - 1] + 1, 0)
    weights = torch.ones(ids_BT.shape) if weight_BT is None else weight_BT
    return Batch(
        ids_BT,
        ids_BT.roll(-1, dims=1),
        weights * is_same,
        documents_BT.to(torch.int32),
        positions_BT,
        Segments.from_document_ids(documents_BT, CHUNK),
    )


class CountingSource:
    """Step n is drawn from seed n: four rows of two documents, padding, some targets masked."""

    def __init__(self, micro_batch_size: int = 4, seq_len: int = 24, is_constant: bool = False):
        self.micro_batch_size, self.seq_len, self.is_constant = (
            micro_batch_size,
            seq_len,
            is_constant,
        )
        self.num_steps = 0

    def next(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(0 if self.is_constant else self.num_steps)
        self.num_steps += 1
        shape = (4, self.seq_len)
        ids_BT = torch.randint(3, 64, shape, generator=generator)
        documents_BT = torch.ones(shape, dtype=torch.int64)
        for row in range(4):
            documents_BT[row, 7 + 3 * row :] = 2
            documents_BT[row, self.seq_len - row :] = 0
        weight_BT = (torch.rand(shape, generator=generator) > 0.3).float()
        size = self.micro_batch_size
        return [
            batch_of(ids_BT[i : i + size], documents_BT[i : i + size], weight_BT[i : i + size])
            for i in range(0, 4, size)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


def tiny_trainee(run: RunFolder, num_steps: int, lr: float = 1e-2, kind: str = "muon") -> Trainee:
    model = build_model(tiny_config(), seed=0)
    balance = Balance([1], 4, BalanceOptions("both"))
    optimizer = Optimizer(model.named_parameters(), OptimizerOptions(kind))
    schedule = Schedule("wsd", lr, 0.0, num_steps, 1)
    return Trainee(model, optimizer, schedule, run, {}, None, balance)


def train(
    folder: Path,
    num_steps: int,
    *,
    stop_after: int | None = None,
    source: CountingSource | None = None,
    change: Callable[[Loop], None] = lambda loop: None,
    **options: Any,
) -> Loop:
    """Train or continue in a folder; `stop_after` steps the checkpoint is written and it ends."""
    with RunFolder(folder) as run:
        trainee = tiny_trainee(run, num_steps, options.pop("lr", 1e-2))
        loop_options = LoopOptions(num_steps, **{"log_every": 2, **options})
        device = torch.device("cpu")
        loop = Loop([trainee], source or CountingSource(), LanguageModel(), loop_options, device)
        newest = run.latest()
        if newest is not None:
            loop.resume([newest])
        change(loop)
        if stop_after is None:
            loop.run()
        else:
            run_steps(loop, stop_after)
    return loop


def run_steps(loop: Loop, num_steps: int) -> None:
    """What a signal after `num_steps` steps does, without the signal."""
    import os
    import signal

    inner = loop.source.next

    def next_batches() -> list[Batch]:
        batches = inner()
        if loop.step + 1 == num_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches

    loop.source.next = next_batches  # type: ignore[method-assign]
    loop.run()
