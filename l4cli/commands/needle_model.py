"""The model under test: opened from small files first, loaded when everything else is known good.

in: a checkpoint folder, a tokenizer; out: an `Engine`; raises L4Error saying what does not fit
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from l4cli import terminal
from l4cli.checkpoint import load_config, load_model, open_weights, resolve_checkpoint
from l4cli.commands.chat_model import DTYPES, has_chat_template
from l4cli.commands.needle_lists import length_text
from l4cli.errors import L4Error, UsageError
from l4cli.evals.needle.costs import ReadingCost, reading_cost, require_room
from l4cli.inference import Engine
from l4cli.model import Llama4Config
from l4cli.planning import available_memory
from l4cli.text import Tokenizer, load_tokenizer
from l4cli.training.device import torch_device

_SAMPLED_BYTES = 1 << 16  # of each weights file, at both ends
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class TestedModel:
    """A checkpoint whose weights are not loaded yet."""

    folder: Path
    config: Llama4Config
    tokenizer: Tokenizer
    device: torch.device
    dtype: str  # auto, fp32, bf16
    kv_dtype: str = "auto"

    @classmethod
    def open(
        cls, checkpoint: Path, tokenizer: str | None, device: str, dtype: str, kv_dtype: str
    ) -> TestedModel:
        """Read config and tokenizer."""
        place = torch_device(device)
        folder = resolve_checkpoint(checkpoint)
        config = load_config(folder)
        found = _tokenizer(folder, tokenizer)
        if found.vocab_size > config.text.vocab_size:
            named = tokenizer or f"in `{folder}`"
            why = f"{found.vocab_size} tokens, and the model knows {config.text.vocab_size}"
            fix = "name the one it was trained with: `--tokenizer`"
            raise L4Error(f"the tokenizer {named} does not fit the model", why=why, fix=fix)
        return cls(folder, config, found, place, dtype, kv_dtype)

    @property
    def compute_dtype(self) -> str:
        """What is computed in."""
        if self.dtype != "auto":
            return self.dtype
        stored = open_weights(self.folder)
        return "fp32" if stored.size_bytes >= 4 * stored.num_parameters else "bf16"

    @cached_property
    def weights_id(self) -> str:
        """Tells other weights in the same folder apart, from their sizes and ends."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(self.folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(file.read(_SAMPLED_BYTES))
        return digest.hexdigest()[:16]

    def cost(self, length: int) -> ReadingCost:
        """What reading a text of this length takes."""
        return reading_cost(self.config, length, self.compute_dtype, self.kv_dtype)

    def check_lengths(self, lengths: tuple[int, ...]) -> None:
        """Warn of lengths beyond the config's, refuse those beyond memory."""
        limit = self.config.text.max_position_embeddings
        beyond = [length for length in lengths if length > limit]
        if beyond:
            terminal.warn(
                f"{length_text(beyond[-1])} tokens are more than `max_position_embeddings` "
                f"({limit}) of `{self.folder}`: it is tested beyond what it claims"
            )
        stored = open_weights(self.folder)
        per_value = {"fp32": 4, "bf16": 2}.get(self.dtype)
        weights = stored.num_parameters * per_value if per_value else stored.size_bytes
        available = available_memory(str(self.device))
        for length in lengths:
            require_room(self.cost(length), weights, available, length_text(length))

    def load(self) -> Engine:
        """Load the weights; the engine takes texts of any length."""
        model = load_model(self.folder, device=self.device, dtype=DTYPES[self.dtype])
        return Engine(model, num_token_ids=self.tokenizer.vocab_size, max_context=_NO_LIMIT)

    def warn_if_it_cannot_chat(self) -> None:
        """A model that never saw the chat format answers it by chance."""
        if not has_chat_template(self.folder):
            terminal.warn(f"`{self.folder}` has no chat template: `--chat` may be new to it")


def _tokenizer(folder: Path, named: str | None) -> Tokenizer:
    if named is not None:
        return load_tokenizer(named)
    try:
        return load_tokenizer(folder)
    except L4Error as error:
        fix = "name the one it was trained with: `--tokenizer FOLDER`"
        raise L4Error(error.what, why=error.why, fix=fix) from None


def require_checkpoint(checkpoint: Path | None) -> Path:
    """raises: UsageError when there is nothing to test"""
    if checkpoint is None:
        why = "no checkpoint was named"
        fix = "`l4 needle-test CHECKPOINT`, or `--dry-run --preset scout` without one"
        raise UsageError("nothing to test", why=why, fix=fix)
    return checkpoint
