"""The special tokens of Llama 4: their names and the order of their ids.

out: `SPECIAL_TOKENS`, all 2,048 in published order (the ids are 200000, 200001, ...), and the
named ones among them, which small vocabularies hold
source: llama-models/models/llama4/tokenizer.py
"""

from __future__ import annotations


def _reserved(kind: str, first: int, last: int) -> list[str]:
    return [f"<|{kind}reserved_special_token_{i}|>" for i in range(first, last + 1)]


def _named(*names: str) -> list[str]:
    return [f"<|{name}|>" for name in names]


def _published_order() -> tuple[str, ...]:
    names = _named("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix")
    names += _named("header_start", "header_end", "eom", "eot", "step")
    # 6 and 7 of this run do not exist: the two python tokens and the pad took their places.
    names += _reserved("text_post_train_", 0, 5)
    names += _named("python_start", "python_end", "finetune_right_pad")
    names += _reserved("text_post_train_", 8, 68)
    names += _named("image_start", "image_end")
    names += _reserved("vision_", 0, 1)
    names += _named("tile_x_separator", "tile_y_separator")
    names += _reserved("vision_", 2, 5)
    names += _named("image")
    names += _reserved("vision_", 6, 6)
    names += _named("patch")
    names += _reserved("vision_", 7, 1047)
    names += _reserved("reasoning_", 0, 7)
    names += _named("reasoning_thinking_start", "reasoning_thinking_end")
    names += _reserved("", 0, 903)
    return tuple(names)


SPECIAL_TOKENS = _published_order()
NAMED_SPECIAL_TOKENS = tuple(name for name in SPECIAL_TOKENS if "reserved" not in name)

# How many ordinary tokens the published vocabulary has: its special ids begin here.
NUM_PUBLISHED_RANKS = 200_000

# What Llama 3's vocabularies call the same thing.
LLAMA3_NAMES = {
    "<|header_start|>": "<|start_header_id|>",
    "<|header_end|>": "<|end_header_id|>",
    "<|eot|>": "<|eot_id|>",
    "<|eom|>": "<|eom_id|>",
    "<|finetune_right_pad|>": "<|finetune_right_pad_id|>",
}


def special_ids(first_id: int, *, all_special: bool = False) -> dict[str, int]:
    """Give the special tokens the ids that follow the ordinary ones."""
    names = SPECIAL_TOKENS if all_special else NAMED_SPECIAL_TOKENS
    return {name: first_id + i for i, name in enumerate(names)}
