"""Stages of mid-training: where each begins, what it carries over, where the last one ends.

in: a checkpoint, a new loop; out: the loop with its weights and moments, a fingerprint, a link
source: OLMo 3's stages keep optimizer state and begin a new schedule
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l4cli import terminal
from l4cli.checkpoint import RunFolder, load_training_state, load_weights, read_state_json
from l4cli.checkpoint.atomic import replace_symlink
from l4cli.checkpoint.run_folder import LATEST
from l4cli.errors import UsageError
from l4cli.training.loop import Loop
from l4cli.training.stretching import NEW_PARAMETERS

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file, spread evenly
_MANIFEST, _STATE = "l4/manifest.json", "l4/state.json"


@dataclass(frozen=True)
class Origin:
    """What the first stage begins from, and what is known of how it was trained."""

    folder: Path
    optim: str | None = None  # None: no optimizer state
    peak_lr: float | None = None
    seq_len: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """Read what `l4/state.json` says; a folder without one has weights only."""
        if not (folder / _STATE).exists():
            return cls(folder)
        identity: dict[str, Any] = read_state_json(folder).get("identity", {})
        options, notes = identity.get("options", {}), identity.get("notes", {})
        return cls(folder, options.get("optim"), options.get("lr"), notes.get("seq_len"))


def fingerprint(folder: Path) -> str:
    """What tells this checkpoint from another: its manifest, else its config and its files.

    Of a file its size and some of its bytes, spread evenly: training changes all weights.
    """
    if (folder / _MANIFEST).exists():
        return hashlib.sha256((folder / _MANIFEST).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def require_same_optimizer(origin: Origin, optim: str) -> None:
    """Refuse moments that belong to another optimizer."""
    if origin.optim is not None and origin.optim != optim:
        raise UsageError(
            f"cannot use `--optim {optim}`",
            why=f"the checkpoint's optimizer state is of `{origin.optim}`",
            fix=f"`--optim {origin.optim}`, or `--reset-optimizer` to begin without it",
        )


def begin(
    loop: Loop, folder: Path, *, keeps_optimizer: bool, trained_len: int | None = None
) -> None:
    """Give a new loop the weights of a checkpoint and, unless told otherwise, its moments."""
    (trainee,) = loop.trainees
    new = load_weights(trainee.model, folder, may_lack=NEW_PARAMETERS)
    if new and trained_len is not None:
        # A temperature of 1 where the model was trained: nothing changes there.
        parameters = dict(trainee.model.named_parameters())
        with torch.no_grad():
            for name in new:
                parameters[name].fill_(1 / math.log(trained_len))
    if not keeps_optimizer:
        return
    state = load_training_state(folder)
    trainee.optimizer.load_state_dict(state["optimizer"])
    if trainee.balance is not None and state.get("balance") is not None:
        trainee.balance.load_state_dict(state["balance"])
    terminal.say(f"optimizer state carried over from `{folder}`")


def require_known_stages(out: Path, names: list[str]) -> None:
    """Refuse a folder in which other stages were begun than the ones asked for."""
    begun = sorted(path.name for path in out.glob("stage-*") if RunFolder(path).steps())
    foreign = [name for name in begun if name not in names]
    if foreign:
        raise UsageError(
            f"`{out}` holds a run with other stages",
            why=f"it has `{foreign[0]}`, and the stages now are "
            + ", ".join(f"`{name}`" for name in names),
            fix="give the same `--stages` to continue it (more at the end are fine), "
            "or choose another folder with `-o`",
        )


def require_not_begun(out: Path, name: str, later: list[str]) -> None:
    """Refuse to train a stage further when one after it began from where it stood."""
    begun = [other for other in later if RunFolder(out / other).steps()]
    if begun:
        raise UsageError(
            f"cannot train `{out / name}` further",
            why=f"`{begun[0]}` has begun from its last checkpoint",
            fix="give the tokens it was trained with, or choose another folder with `-o`",
        )


def point_to(out: Path, checkpoint: Path) -> None:
    """Make `OUT/latest` name a checkpoint below it."""
    replace_symlink(out / LATEST, os.path.relpath(checkpoint, out))


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that has one."""
    checkpoint = RunFolder(folder).latest()
    assert checkpoint is not None
    return checkpoint
