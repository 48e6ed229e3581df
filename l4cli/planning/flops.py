"""Floating-point operations of training, counted from shapes.

in: a config and lengths; out: operations per token, or per tile of a picture
source: 6 operations a weight that a token meets (2 forward, 4 backward); attention counted causal,
per document, and per chunk in chunked layers, so that MFU is of work that is needed
"""

from __future__ import annotations

from l4cli.model import Llama4Config, TextConfig, VisionConfig

FORWARD_AND_BACKWARD = 3  # the backward is two products for each of the forward's


def flops_per_token(
    config: Llama4Config, seq_len: int, mean_document_length: float | None = None
) -> float:
    """Training operations of one text token; pictures come on top, by tile.

    Attention restarts at each document; without a mean length a row is one document.
    """
    length = min(float(seq_len), mean_document_length or seq_len)
    text = config.text
    attended = sum(mean_attended(text, i, length) for i in range(text.num_hidden_layers))
    # Scores and their product with the values: two products, two operations each.
    attention = 4 * text.num_attention_heads * text.head_dim * attended
    return FORWARD_AND_BACKWARD * (2 * active_matmul_parameters(text) + attention)


def active_matmul_parameters(text: TextConfig) -> int:
    """Weights a token is multiplied with: chosen experts only, no looked-up embedding, no norm."""
    hidden = text.hidden_size
    q_width, kv_width = (
        heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads)
    )
    expert = 3 * hidden * text.intermediate_size
    total = text.vocab_size * hidden
    for i in range(text.num_hidden_layers):
        total += 2 * hidden * (q_width + kv_width)
        if text.is_moe(i):
            total += (1 + text.num_experts_per_tok) * expert + text.num_local_experts * hidden
        else:
            total += 3 * hidden * text.intermediate_size_mlp
    return total


def mean_attended(text: TextConfig, layer_idx: int, length: float) -> float:
    """Keys a query of a document of this length sees on average, itself included."""
    chunk = text.attention_chunk_size
    if chunk is None or not text.is_local(layer_idx) or length <= chunk:
        return (length + 1) / 2
    whole, rest = divmod(length, chunk)
    return (whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2) / length


def vision_flops_per_tile(config: Llama4Config) -> float:
    """Training operations of one tile of a picture, through to the text's width."""
    vision = config.vision
    if vision is None:
        return 0.0
    tower = 2 * _tower_products(vision) + _tower_attention(vision)
    adapter = vision.intermediate_size * vision.projector_input_dim + vision.vision_output_dim**2
    projector = vision.vision_output_dim * config.text.hidden_size
    return FORWARD_AND_BACKWARD * (tower + 2 * vision.tokens_per_tile * (adapter + projector))


def _tower_products(vision: VisionConfig) -> int:
    """Multiply-adds of one tile's patches, and of the class token beside them."""
    width = vision.hidden_size
    layer = 4 * width**2 + 2 * width * vision.intermediate_size
    patch = vision.num_channels * vision.patch_size**2 * width
    layers = vision.num_hidden_layers * layer
    return vision.num_patches * patch + (vision.num_patches + 1) * layers


def _tower_attention(vision: VisionConfig) -> int:
    return vision.num_hidden_layers * 4 * vision.hidden_size * (vision.num_patches + 1) ** 2
