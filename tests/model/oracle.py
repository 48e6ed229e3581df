"""Tiny random Llama 4 models of transformers, the numerical truth of this room."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from l4cli.model import Llama4Config, build_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "use_qk_norm": True,
    "attention_chunk_size": 8,
    "attn_temperature_tuning": True,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_parameters": LLAMA3_ROPE,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "pad_token_id": 0,
}
MAVERICK = {
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
ALL_ROPE = {
    "no_rope_layers": [1, 1, 1, 1, 1],
    "layer_types": [*["chunked_attention"] * 3, "full_attention", "chunked_attention"],
}


def rope(kind: str, **options: float) -> dict[str, Any]:
    """`rope_parameters` of a kind."""
    return {"rope_type": kind, "rope_theta": 100.0, **options}


VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "vision_output_dim": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
BOI, EOI, PATCH, IMAGE, TILE_X, TILE_Y = 500, 501, 502, 503, 504, 505
TOKENS_PER_TILE = 16


def text_oracle(**changes: Any) -> Any:
    """transformers' text model; weights drawn wide, so that errors show."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**{**copy.deepcopy(TEXT), **changes})
    model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager")
    return _randomised(model)


def picture_oracle(**changes: Any) -> Any:
    """transformers' text and vision model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Llama4Config(
        text_config={**copy.deepcopy(TEXT), **changes},
        vision_config=copy.deepcopy(VISION),
        boi_token_index=BOI,
        eoi_token_index=EOI,
        image_token_index=PATCH,
    )
    cls = transformers.Llama4ForConditionalGeneration
    return _randomised(cls._from_config(config, attn_implementation="eager"))


def _randomised(model: Any) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # ones and zeros would hide mistakes
                is_scale = name.endswith("weight") and "norm" in name
                weight.copy_(0.1 * torch.randn_like(weight) + float(is_scale))
    return model.eval()


def ours(oracle: Any) -> Any:
    """Our model with the oracle's weights, through the names alone."""
    config = Llama4Config.from_dict(oracle.config.to_dict())
    model = build_model(config, seed=0)
    model.load_state_dict(oracle.state_dict())
    return model


def picture_tokens(rows: int, cols: int) -> list[int]:
    """The placeholder block of one picture."""
    tokens = [BOI]
    if rows * cols > 1:
        for _ in range(rows):
            for col in range(cols):
                tokens += [PATCH] * TOKENS_PER_TILE + ([TILE_X] if col < cols - 1 else [])
            tokens.append(TILE_Y)
    return [*tokens, IMAGE, *[PATCH] * TOKENS_PER_TILE, EOI]
