"""A tiny checkpoint with vision and a chat template, random but of the real format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from l4cli.checkpoint import save_model
from l4cli.data.geometry import PictureGeometry
from l4cli.model import Llama4Config, build_model
from l4cli.text import load_tokenizer

GEOMETRY = PictureGeometry(image_size=16, patch_size=4, max_patches=4)


def tiny_config(**text_changes) -> Llama4Config:
    """Five layers, chunks of 16, room for 512 tokens, the built-in byte vocabulary."""
    tokenizer = load_tokenizer("bytes")
    text = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "projector_input_dim": 12,
        "projector_output_dim": 12,
        "vision_output_dim": 12,
    }
    keys = {
        "model_type": "llama4",
        "text_config": text | text_changes,
        "vision_config": vision,
        "image_token_index": tokenizer.patch_id,
        "boi_token_index": tokenizer.image_start_id,
        "eoi_token_index": tokenizer.image_end_id,
    }
    return Llama4Config.from_dict(keys)


def save_checkpoint(
    folder: Path,
    says: str | None = None,
    *,
    ends: bool = True,
    sees: bool = True,
    **text_changes,
) -> Path:
    """Save a random model; with `says` one that writes this (no byte twice), once or for ever."""
    tokenizer = load_tokenizer("bytes")
    config = tiny_config(**text_changes)
    model = build_model(config if sees else replace(config, vision=None), seed=0)
    if says is not None:
        _teach(model, [*says.encode(), *([tokenizer.eot_id] if ends else [])])
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, tokenizer.files(), GEOMETRY if sees else None)
    return folder


@torch.no_grad()
def _teach(model, ids: list[int]) -> None:
    """Make the logits a table of what follows what: silent layers, one direction a link.

    Whatever is not in the table (the end of a prompt) leads to the first id.
    """
    assert len(set(ids)) == len(ids) <= 30
    text = getattr(model, "language_model", model)  # absent without vision
    for layer in text.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        for name, weight in layer.feed_forward.named_parameters():
            if "down_proj" in name:
                weight.zero_()
    embedding, head = text.model.embed_tokens.weight, text.lm_head.weight
    embedding.zero_()
    head.zero_()
    embedding[:, 0] = 1.0
    for i, token in enumerate(ids[:-1]):
        embedding[token] = 0.0
        embedding[token, i + 1] = 1.0
    for i, token in enumerate(ids):
        head[token, i] = 50.0


def save_picture(path: Path, size: tuple[int, int] = (40, 24)) -> Path:
    """A red square on a green ground."""
    image = Image.new("RGB", size, (30, 120, 40))
    image.paste((220, 30, 30), (4, 4, 14, 14))
    image.save(path)
    return path
