"""What makes answers come sooner and changes nothing in them: guessing ahead.

in: options of `l4 chat` and the model they are for; out: a `Speculation`; L4Error for what does
not fit together
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from l4cli.checkpoint import load_config, resolve_checkpoint
from l4cli.commands.chat_model import ChatModel, open_model, require_vocabulary
from l4cli.errors import L4Error
from l4cli.inference import (
    Engine,
    LookupDrafter,
    ModelDrafter,
    Speculation,
    step_cost,
)
from l4cli.model import Llama4Config
from l4cli.text import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Draft:
    """A small model's folder, and what its small files tell."""

    folder: Path
    config: Llama4Config
    tokenizer: Tokenizer

    def require_same_tokenizer(self, folder: Path, tokenizer: Tokenizer) -> None:
        """raises: L4Error where the large model's ids mean something else"""
        if self.tokenizer.fingerprint != tokenizer.fingerprint:
            raise L4Error(
                f"cannot draft with `{self.folder}`",
                why=f"its tokenizer is not that of `{folder}`",
                fix="name a checkpoint that was trained with the same tokenizer, or use `--lookup`",
            )


def find_draft(path: Path) -> Draft:
    """Look at a small model before any weights are read."""
    folder = resolve_checkpoint(path)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    require_vocabulary(folder, tokenizer, config)
    return Draft(folder, config, tokenizer)


def speculation(
    model: ChatModel,
    draft: Draft | None,
    dtype: str,
    *,
    uses_lookup: bool,
    num_tokens: int | None,
) -> Speculation | None:
    """Who guesses ahead for this model; nobody, unless it was asked for."""
    config = model.engine.config
    pictures = [] if config.vision is None else [config.image_token_index]
    if uses_lookup:
        return Speculation(LookupDrafter(never=pictures), num_tokens, step_cost(config, None))
    if draft is None:
        return None
    small = open_model(draft.folder, draft.config, model.engine.device, dtype)
    engine = Engine(small, num_token_ids=draft.tokenizer.vocab_size)
    drafter = ModelDrafter(engine, skipped=pictures)
    return Speculation(drafter, num_tokens, step_cost(config, draft.config))
