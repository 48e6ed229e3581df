"""A model's shape in figures, by the names that tools rely on.

in: a config; out: counts, sizes and settings, for `l4 info` and whoever shows a model
"""

from __future__ import annotations

from typing import Any

from l4cli.model import Llama4Config, count_parameters
from l4cli.planning.flops import flops_per_token
from l4cli.planning.memory import inference_bytes

# Lengths at which costs are shown; k = 1024.
SHOWN_CONTEXT = 8192


def describe_config(config: Llama4Config) -> dict[str, Any]:
    """Counts first; `num_parameters` and its neighbours never change their names."""
    text, counts = config.text, count_parameters(config)
    layers = range(text.num_hidden_layers)
    context = min(SHOWN_CONTEXT, text.max_position_embeddings)
    facts: dict[str, Any] = {
        "num_parameters": counts.total,
        "num_active_parameters": counts.active,
        "num_vision_parameters": counts.vision,
        **({"is_estimate": True} if config.is_estimate else {}),
        "parameters": {name: size for name, size in counts.by_group.items() if size},
        "text": {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_moe_layers": sum(text.is_moe(i) for i in layers),
            "num_nope_layers": sum(not text.uses_rope(i) for i in layers),
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "num_local_experts": text.num_local_experts,
            "num_experts_per_tok": text.num_experts_per_tok,
            "intermediate_size": text.intermediate_size,
            "intermediate_size_mlp": text.intermediate_size_mlp,
            "attention_chunk_size": text.attention_chunk_size,
            "max_position_embeddings": text.max_position_embeddings,
            "use_qk_norm": text.use_qk_norm,
            "rope_theta": text.rope_theta,
            "rope_scaling": text.rope_scaling,
        },
        "vision": None,
        "weights_bytes_bf16": inference_bytes(config, "bf16", 0)["weights"],
        "cache_bytes_bf16": inference_bytes(config, "bf16", context)["cache"],
        "cache_context": context,
        "train_flops_per_token": flops_per_token(config, context),
    }
    vision = config.vision
    if vision is not None:
        facts["vision"] = {
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
            "tokens_per_tile": vision.tokens_per_tile,
        }
    return facts
