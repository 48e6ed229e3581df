"""Tiny random models whose every mechanism shows within a few dozen tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from l4cli.model import Llama4Config, build_model

CHUNK = 8
PATCH, TOKENS_PER_TILE = 61, 4
TEXT = {
    "model_type": "llama4_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": CHUNK,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
VISION = {
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


def text_model(seed: int = 0, dtype: torch.dtype | None = None, **changes):
    """A decoder of five layers: RoPE x 3, NoPE, RoPE; MoE at 1 and 3."""
    config = Llama4Config.from_dict({**TEXT, **changes})
    return _sharpened(build_model(config, dtype=dtype, seed=seed))


def vision_model(seed: int = 0):
    """The same with a one-layer picture encoder of four tokens a tile."""
    keys = {"model_type": "llama4", "text_config": TEXT, "vision_config": VISION}
    config = Llama4Config.from_dict({**keys, "image_token_index": PATCH})
    return _sharpened(build_model(config, seed=seed))


def _sharpened(model):
    """First weights are quiet by design; louder ones make mistakes visible in the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and ("down_proj" in name or "o_proj" in name or "lm_head" in name):
                weight.mul_(10)
    return model


def random_ids(length: int, seed: int = 0) -> Tensor:
    """Ordinary ids, away from the placeholder."""
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def full_logits(model, ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
    """Logits of every position, without a cache. shapes: -> [T, V]"""
    return model(ids[None], pixel_values)[0]
