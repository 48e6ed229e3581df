"""How many parameters a config has, by formula, so that Scout takes microseconds.

in: a config; out: counts by group; checked against the meta device in tests
source: facts on Llama 4's shapes; DESIGN "machine-readable names"
"""

from __future__ import annotations

from dataclasses import dataclass

from l4cli.model.config import Llama4Config, TextConfig, VisionConfig


@dataclass(frozen=True)
class ParameterCounts:
    """`total` has everything; `active` is text, per token, both embeddings; by group for tables."""

    total: int
    active: int
    vision: int  # encoder, adapter and projector
    by_group: dict[str, int]


def count_parameters(config: Llama4Config) -> ParameterCounts:
    """Count what `build_model` would allocate."""
    groups = _text_groups(config.text)
    text = sum(groups.values())
    experts, chosen = config.text.num_local_experts, config.text.num_experts_per_tok
    idle = groups["routed experts"] // experts * (experts - chosen)
    vision = 0
    if config.vision is not None:
        vision_groups = _vision_groups(config.vision, config.text.hidden_size)
        vision = sum(vision_groups.values())
        groups |= vision_groups
    return ParameterCounts(text + vision, text - idle, vision, groups)


def _text_groups(text: TextConfig) -> dict[str, int]:
    hidden, layers = text.hidden_size, text.num_hidden_layers
    num_moe = sum(text.is_moe(i) for i in range(layers))
    q_width = text.num_attention_heads * text.head_dim
    kv_width = text.num_key_value_heads * text.head_dim
    expert = 3 * hidden * text.intermediate_size
    nope = sum(not text.uses_rope(i) for i in range(layers)) if text.scalable_softmax else 0
    return {
        "embed_tokens": text.vocab_size * hidden,
        "lm_head": text.vocab_size * hidden,
        "attention": layers * (2 * hidden * q_width + 2 * hidden * kv_width),
        "routed experts": num_moe * text.num_local_experts * expert,
        "shared experts": num_moe * expert,
        "routers": num_moe * text.num_local_experts * hidden,
        "dense MLPs": (layers - num_moe) * 3 * hidden * text.intermediate_size_mlp,
        "norms": (2 * layers + 1) * hidden + nope * text.num_attention_heads,
    }


def _vision_groups(vision: VisionConfig, text_hidden: int) -> dict[str, int]:
    width, ffn = vision.hidden_size, vision.intermediate_size
    patch = vision.num_channels * vision.patch_size**2
    layer = 4 * (width**2 + width) + 2 * width * ffn + ffn + width + 4 * width
    ends = patch * width + width + (vision.num_patches + 1) * width + 4 * width
    out = vision.vision_output_dim
    return {
        "vision encoder": ends + vision.num_hidden_layers * layer,
        "vision adapter": ffn * out + out * out,
        "projector": out * text_hidden,
    }
