"""Train a narrow `nano` (its text half) for three steps in fp32 and print what happened.

usage: python tests/training/three_steps.py FOLDER
Run by `test_triton_training.py`, with `L4_OPS` and perhaps `TRITON_INTERPRET` set. Layers, experts
and positions are nano's; widths, heads and the vocabulary are cut for the interpreter's sake.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from tiny_training import CountingSource
from triton_harness import repair_interpreter

from l4cli.checkpoint import RunFolder
from l4cli.model import Llama4Config, build_model, load_preset
from l4cli.ops.batch import Batch
from l4cli.ops.choice import all_ops
from l4cli.training.balance import Balance, BalanceOptions
from l4cli.training.loop import Loop, LoopOptions
from l4cli.training.objectives.language_model import LanguageModel
from l4cli.training.optim import Optimizer, OptimizerOptions
from l4cli.training.schedule import Schedule
from l4cli.training.trainee import Trainee

NUM_STEPS = 3
NARROW = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 64},
    **{"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
}


class OneRow(CountingSource):
    """Every step the same row: documents of 13 and 5 tokens, then padding."""

    def next(self) -> list[Batch]:
        return super().next()[2:3]


def main(folder: Path) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        repair_interpreter()
    narrow = dataclasses.replace(load_preset("nano").text, **NARROW)
    config, text = Llama4Config(text=narrow, vision=None), narrow
    model = build_model(config, seed=0)
    sparse = [layer for layer in range(text.num_hidden_layers) if text.is_moe(layer)]
    with RunFolder(folder) as run:
        trainee = Trainee(
            model,
            Optimizer(model.named_parameters(), OptimizerOptions("adamw")),
            Schedule("wsd", 3e-3, 0.0, NUM_STEPS, 1),
            run,
            {},
            None,
            Balance(sparse, text.num_local_experts, BalanceOptions("both")),
        )
        options = LoopOptions(NUM_STEPS, log_every=1)
        source = OneRow(1, seq_len=20, is_constant=True)
        device = torch.device("cpu")
        Loop([trainee], source, LanguageModel(), options, device).run()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    used = {op.name: op.choose(device, torch.float32)[0].name for op in all_ops() if op.is_used}
    print(
        json.dumps(
            {
                "losses": [event["loss"] for event in steps],
                "grad_norms": [event["grad_norm"] for event in steps],
                "weight": sum(
                    float(w.detach().double().square().sum()) for w in model.parameters()
                ),
                "used": used,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
