"""What makes answers come sooner and changes nothing in them: guessing ahead.

in: options of `l4 chat` and the model they are for; out: a `Speculation`; L4Error for what does
not fit together
"""

from __future__ import annotations

from pathlib import Path

from l4cli.checkpoint import load_config, load_model, resolve_checkpoint
from l4cli.commands.chat_model import DTYPES, ChatModel, require_memory, require_vocabulary
from l4cli.errors import L4Error
from l4cli.inference import (
    Engine,
    LookupDrafter,
    ModelDrafter,
    Speculation,
    pack_weights,
    step_cost,
)
from l4cli.text import load_tokenizer


def speculation(
    model: ChatModel,
    draft: Path | None,
    dtype: str,
    *,
    uses_lookup: bool,
    num_tokens: int | None,
) -> Speculation | None:
    """Who guesses ahead for this model; nobody, unless it was asked for."""
    config = model.engine.config
    pictures = [] if config.vision is None else [config.image_token_index]
    if uses_lookup:
        cost = step_cost(config, None)
        return Speculation(LookupDrafter(never=pictures), num_tokens, cost)
    if draft is None:
        return None
    engine = _load_draft(model, draft, dtype)
    drafter = ModelDrafter(engine, skipped=pictures)
    return Speculation(drafter, num_tokens, step_cost(config, engine.config))


def _load_draft(model: ChatModel, draft: Path, dtype: str) -> Engine:
    """The small model; what can be known from small files is checked before its weights."""
    folder = resolve_checkpoint(draft)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    require_vocabulary(folder, tokenizer, config)
    if tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise L4Error(
            f"cannot draft with `{draft}`",
            why=f"its tokenizer is not that of `{model.folder}`",
            fix="name a checkpoint that was trained with the same tokenizer, or use `--lookup`",
        )
    device = model.engine.device
    require_memory(folder, dtype, device)
    small = load_model(folder, device=device, dtype=DTYPES[dtype])
    pack_weights(small)
    return Engine(small, num_token_ids=tokenizer.vocab_size)
