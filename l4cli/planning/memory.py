"""Bytes a job takes, by what takes them.

in: a config, a precision, lengths; out: bytes by class, before anything is allocated
source: fp32 masters, gradients and AdamW moments are exact; activations are an estimate from what
the layers keep for the backward, checked against autograd's own tensors in a test
"""

from __future__ import annotations

from l4cli.model import Llama4Config, TextConfig, VisionConfig, count_parameters
from l4cli.ops.cross_entropy import CHUNK_ELEMENTS

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
OPTIMIZERS = ("adamw", "muon")
_MASTER = 4  # masters, gradients and moments are fp32
_LIBRARY_BYTES = 128 << 20  # primitives and pools of torch on a CPU (measured)
_MUON_STACK, _MUON_BYTES = 2**26, 12  # elements at once; an fp32 copy and four bf16 ones of each


def training_bytes(
    config: Llama4Config,
    optim: str,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    *,
    checkpoint_layers: bool = False,
    tiles: int = 0,
    passes_at_once: int = 1,
) -> dict[str, int]:
    """What training holds at its peak on one rank, the largest part of it exact.

    `tiles`: picture tiles in a micro-batch; `passes_at_once`: how many share a micro-batch's rows.
    """
    num_gradients = 1 if passes_at_once == 1 else 1 + passes_at_once
    total = count_parameters(config).total
    return {
        "weights": _MASTER * total,
        "gradients": num_gradients * _MASTER * total,
        "optimizer": _optimizer_bytes(config, optim),
        "activations": _activation_bytes(
            config, dtype, micro_batch_size * seq_len, checkpoint_layers, tiles
        ),
        "loss": _loss_bytes(config.text, micro_batch_size * seq_len),
        "workspace": _workspace_bytes(config, optim),
    }


def inference_bytes(
    config: Llama4Config, dtype: str, context_length: int, num_sequences: int = 1
) -> dict[str, int]:
    """Weights, and a cache that keeps a chunk in chunked layers and everything in the others."""
    text = config.text
    item = ITEM_BYTES[dtype]
    positions = sum(
        min(context_length, text.attention_chunk_size or context_length)
        if text.is_local(i)
        else context_length
        for i in range(text.num_hidden_layers)
    )
    per_position = 2 * text.num_key_value_heads * text.head_dim * max(item, 2)
    return {
        "weights": int(count_parameters(config).total * item),
        "cache": int(num_sequences * positions * per_position),
    }


def _optimizer_bytes(config: Llama4Config, optim: str) -> int:
    """Two moments a weight; Muon keeps one for the hidden matrices."""
    assert optim in OPTIMIZERS
    groups = count_parameters(config).by_group
    total = sum(groups.values())
    if optim == "adamw":
        return 2 * _MASTER * total
    apart = sum(groups[name] for name in ("embed_tokens", "lm_head", "routers", "norms"))
    return _MASTER * (total + apart)


def _workspace_bytes(config: Llama4Config, optim: str) -> int:
    """Libraries' own buffers, and the matrices that Muon orthogonalises at once."""
    if optim != "muon":
        return _LIBRARY_BYTES
    groups = count_parameters(config).by_group
    # The matrices of all experts and layers have one shape once laid on their long side.
    stacked = max(groups["routed experts"], groups["dense MLPs"])
    return _LIBRARY_BYTES + _MUON_BYTES * min(stacked, _MUON_STACK)


def _activation_bytes(
    config: Llama4Config, dtype: str, num_tokens: int, checkpoint_layers: bool, tiles: int
) -> int:
    text, is_fp8 = config.text, dtype == "fp8"
    item = int(ITEM_BYTES["bf16" if is_fp8 else dtype])  # only products of experts are in fp8
    layers = [_layer_bytes(text, i, item) for i in range(text.num_hidden_layers)]
    weights = [_cast_bytes(text, i, item) for i in range(text.num_hidden_layers)]
    if is_fp8:
        weights = [size + _code_bytes(text, i) for i, size in enumerate(weights)]
    if checkpoint_layers:
        # Each layer's input, and one layer at a time in full.
        kept = len(layers) * text.hidden_size * item + max(layers)
        casts = max(weights)
    else:
        kept, casts = sum(layers), sum(weights)
    vision = 0
    if config.vision is not None and tiles:
        casts += 0 if item == _MASTER else item * count_parameters(config).vision
        vision = tiles * _tile_bytes(config.vision, item)
    return num_tokens * kept + casts + vision


def _layer_bytes(text: TextConfig, layer_idx: int, item: int) -> int:
    """What one layer keeps of one token for its backward."""
    q_width = text.num_attention_heads * text.head_dim
    kv_width = text.num_key_value_heads * text.head_dim
    # Two norms (input and output each); q and k before and after the turn; v; the output.
    attention = item * (4 * text.hidden_size + 4 * q_width + 5 * kv_width)
    if not text.is_moe(layer_idx):
        return attention + item * 3 * text.intermediate_size_mlp
    # The router reads fp32. Chosen experts keep gate and up, the shared one also their product.
    routed = 2 * text.num_experts_per_tok * text.intermediate_size + text.hidden_size
    shared = 3 * text.intermediate_size
    return attention + 4 * (text.hidden_size + text.num_local_experts) + item * (routed + shared)


def _cast_bytes(text: TextConfig, layer_idx: int, item: int) -> int:
    """Weights cast to the compute dtype and kept for the backward; experts are cast again."""
    if item == _MASTER:
        return 0
    q_width, kv_width = (
        heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads)
    )
    ffn = text.intermediate_size if text.is_moe(layer_idx) else text.intermediate_size_mlp
    return item * text.hidden_size * (2 * q_width + 2 * kv_width + 3 * ffn)


def _code_bytes(text: TextConfig, layer_idx: int) -> int:
    """Experts' weights in fp8, kept for the backward."""
    size = 3 * text.num_local_experts * text.hidden_size * text.intermediate_size
    return size if text.is_moe(layer_idx) else 0


def _tile_bytes(vision: VisionConfig, item: int) -> int:
    """What the tower keeps of one tile."""
    layer = 12 * vision.hidden_size + 2 * vision.intermediate_size
    kept = item * (vision.num_patches + 1) * vision.num_hidden_layers * layer
    adapter = vision.intermediate_size + 4 * vision.vision_output_dim
    return kept + item * vision.tokens_per_tile * adapter


def _loss_bytes(text: TextConfig, num_tokens: int) -> int:
    """A chunk of logits with its gradient, and the head's gradient beside its accumulation."""
    chunk = min(CHUNK_ELEMENTS, num_tokens * text.vocab_size)
    return 2 * _MASTER * chunk + _MASTER * text.vocab_size * text.hidden_size
