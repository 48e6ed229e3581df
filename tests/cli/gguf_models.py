"""Tiny Llama 4 checkpoints that llama.cpp computes alike, and the tensors a GGUF file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from l4cli.checkpoint import save_model
from l4cli.model import Llama4Config, build_model
from l4cli.text import Tokenizer, load_tokenizer
from l4cli.text.loading import ranked_tokenizer
from l4cli.text.training import train_vocabulary

TEXT = "".join(f"line {i} says {i * 7919 % 1000} and ends. It's OK!\n" for i in range(300))
SHAPE: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 704,  # more than the tokenizer has
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 16384,
}


def trained_tokenizer() -> Tokenizer:
    """A byte-level BPE of 640 tokens."""
    return ranked_tokenizer(train_vocabulary([TEXT], 640), name="trained")


def fitting_checkpoint(folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
    """A random text model; logits spread as those of a trained one."""
    tokenizer = tokenizer or load_tokenizer("bytes")
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    keys = SHAPE | ids | {"eos_token_id": list(tokenizer.stop_ids)} | changes
    model = build_model(Llama4Config.from_dict(keys), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # ones would hide a norm in the wrong place
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
            elif name == "lm_head.weight":
                weight.mul_(20)
    save_model(model, folder, tokenizer.files())
    return folder


def expected_tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A text model's weights by llama.cpp's names, written out layer by layer."""
    weights = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for i in range(model.config.text.num_hidden_layers):
        here, there = f"model.layers.{i}.", f"blk.{i}."
        found[there + "attn_norm.weight"] = weights[here + "input_layernorm.weight"]
        found[there + "ffn_norm.weight"] = weights[here + "post_attention_layernorm.weight"]
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            found[f"{there}attn_{theirs}.weight"] = weights[f"{here}self_attn.{ours}_proj.weight"]
        if not model.config.text.is_moe(i):
            for part in ("gate", "up", "down"):
                name = f"{here}feed_forward.{part}_proj.weight"
                found[f"{there}ffn_{part}.weight"] = weights[name]
            continue
        found[there + "ffn_gate_inp.weight"] = weights[here + "feed_forward.router.weight"]
        for part in ("gate", "up", "down"):
            name = f"{here}feed_forward.shared_expert.{part}_proj.weight"
            found[f"{there}ffn_{part}_shexp.weight"] = weights[name]
        gate_up = weights[here + "feed_forward.experts.gate_up_proj"]  # [E, in, both]
        down = weights[here + "feed_forward.experts.down_proj"]
        half = gate_up.shape[2] // 2
        found[there + "ffn_gate_exps.weight"] = np.stack([e[:, :half].T for e in gate_up])
        found[there + "ffn_up_exps.weight"] = np.stack([e[:, half:].T for e in gate_up])
        found[there + "ffn_down_exps.weight"] = np.stack([e.T for e in down])
    return found
