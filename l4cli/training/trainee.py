"""One model in training with everything that is its own, and how it is saved and found again.

in: model, optimizer, schedule, balance, run folder; out: checkpoints that continue bit for bit
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l4cli.checkpoint import RunFolder, load_training_state, load_weights, save_model
from l4cli.checkpoint import save_training_state as write_state
from l4cli.data.geometry import PictureGeometry
from l4cli.data.loader import ShardSource
from l4cli.model import Llama4Config, build_model
from l4cli.model.text import Experts
from l4cli.training.balance import Balance, BalanceOptions
from l4cli.training.optim import Optimizer, OptimizerOptions
from l4cli.training.schedule import Schedule


@dataclass
class Trainee:
    """What the loop trains; it takes a list of these."""

    model: Any  # Llama4ForCausalLM or Llama4ForConditionalGeneration, fp32 master weights
    optimizer: Optimizer
    schedule: Schedule
    run: RunFolder
    tokenizer_files: Mapping[str, str]
    geometry: PictureGeometry | None = None
    balance: Balance | None = None  # None without MoE layers
    name: str = ""  # told apart by it where several are trained
    # Trained with the model and no part of it: kept in `l4/` only.
    extra: nn.Module | None = None

    def own(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Its own figures of all trainees' (`NAME/loss`), and those that are nobody's."""
        prefix = f"{self.name}/"
        return {
            key.removeprefix(prefix): value
            for key, value in figures.items()
            if "/" not in key or key.startswith(prefix)
        }

    def labelled(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """An event for a stream that several trainees write to."""
        return {**event, "model": self.name} if self.name else dict(event)

    def save(self, step: int, shared: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, whole or not at all. raises: L4Error when it fails"""
        with self.run.writing(step) as folder:
            geometry = self.geometry if self.model.config.vision is not None else None
            save_model(self.model, folder, self.tokenizer_files, geometry)
            state = {"optimizer": self.optimizer.state_dict()}
            if self.balance is not None:
                state["balance"] = self.balance.state_dict()
            if self.extra is not None:
                state["extra"] = self.extra.state_dict()
            write_state(folder, {**shared, **state})
        return self.run.step_folder(step)

    def load(self, folder: Path) -> dict[str, Any]:
        """Take back weights and own state; return the state shared with the loop."""
        state = load_training_state(folder)  # checks every file's hash first
        load_weights(self.model, folder)
        self.optimizer.load_state_dict(state.pop("optimizer"))
        balance = state.pop("balance", None)
        if self.balance is not None and balance is not None:
            self.balance.load_state_dict(balance)
        extra = state.pop("extra", None)
        if self.extra is not None and extra is not None:
            self.extra.load_state_dict(extra)
        return state


@dataclass(frozen=True)
class TraineeOptions:
    """How one model is trained, apart from its shape and its schedule."""

    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    balance: BalanceOptions = field(default_factory=BalanceOptions)
    dtype: str = "fp32"  # of the computation: fp32, bf16 or fp8 (experts; else bf16)
    freeze: str | None = None  # text or vision
    activation_checkpointing: bool = False


def build_trainee(
    config: Llama4Config,
    options: TraineeOptions,
    schedule: Schedule,
    run: RunFolder,
    source: ShardSource,
    *,
    device: torch.device,
    seed: int,
    name: str = "",
    extra: nn.Module | None = None,
) -> Trainee:
    """Make a model with its first weights, and everything around it."""
    model = build_model(config, device=device, seed=seed)
    model.compute_dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    for module in model.modules():
        if isinstance(module, Experts):
            module.in_fp8 = options.dtype == "fp8"
    model.checkpoint_layers = options.activation_checkpointing
    if options.freeze is not None:
        freeze(model, options.freeze)
    parameters = list(model.named_parameters())
    if extra is not None:
        parameters += extra.to(device).named_parameters(prefix="extra")
    return Trainee(
        model,
        Optimizer(parameters, options.optimizer),
        schedule,
        run,
        source.tokenizer().files(),
        source.geometry if source.num_media else None,
        _build_balance(config, options.balance, device),
        name,
        extra,
    )


def _build_balance(
    config: Llama4Config, options: BalanceOptions, device: torch.device
) -> Balance | None:
    text = config.text
    layers = [i for i in range(text.num_hidden_layers) if text.is_moe(i)]
    if not layers or text.num_local_experts < 2:
        return None
    return Balance(layers, text.num_local_experts, options, device)


def freeze(model: Any, half: str) -> None:
    """Keep the weights of the `text` or the `vision` half; the projector always learns."""
    prefix = {"text": "language_model.", "vision": "vision_model."}[half]
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            parameter.requires_grad_(False)
