"""Logits and gradients of transformers' Llama 4, in fp32."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch

SHAPES: dict[str, dict[str, Any]] = {
    "scout": {},
    "maverick": oracle.MAVERICK,
    "top-2": {"num_experts_per_tok": 2},
    "no temperature": {"attn_temperature_tuning": False},
    "middle band": {
        "rope_parameters": {**oracle.LLAMA3_ROPE, "factor": 8.0, "high_freq_factor": 4.0}
    },
    "every layer with RoPE, one of them in full": oracle.ALL_ROPE,
    "linear": {**oracle.ALL_ROPE, "rope_parameters": oracle.rope("linear", factor=4.0)},
    "yarn": {
        **oracle.ALL_ROPE,
        "use_qk_norm": False,
        "rope_parameters": oracle.rope(
            "yarn", factor=4.0, original_max_position_embeddings=24, beta_fast=8.0
        ),
    },
    "yarn with QK norm": {
        **oracle.ALL_ROPE,
        "rope_parameters": oracle.rope("yarn", factor=2.5, original_max_position_embeddings=64),
    },
}


def assert_same_gradients(theirs: Any, mine: Any) -> None:
    """Relative to each tensor's largest gradient; experts nobody chose have none on either side."""
    wanted = dict(theirs.named_parameters())
    for name, weight in mine.named_parameters():
        grad = wanted[name].grad
        scale = grad.abs().max()
        assert weight.grad is not None, name
        assert (weight.grad - grad).abs().max() <= 1e-3 * scale + 1e-9, name


@pytest.mark.parametrize("shape", SHAPES)
def test_text_logits_and_gradients_equal_transformers(shape: str) -> None:
    theirs = oracle.text_oracle(**SHAPES[shape])
    mine = oracle.ours(theirs)
    ids_BT = torch.randint(10, 490, (2, 37), generator=torch.Generator().manual_seed(1))

    wanted, got = theirs(ids_BT).logits, mine(ids_BT)
    assert wanted.abs().max() > 1
    assert (wanted - got).abs().max() < 1e-4

    probe = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (wanted * probe).sum().backward()
    (got * probe).sum().backward()
    assert_same_gradients(theirs, mine)


def test_pictures_of_several_tiles_equal_transformers() -> None:
    theirs = oracle.picture_oracle()
    mine = oracle.ours(theirs)
    first = [1, 7, 8, *oracle.picture_tokens(1, 2), 9, *oracle.picture_tokens(1, 1), 10, 11]
    second = [1, *oracle.picture_tokens(2, 1), 5, *oracle.picture_tokens(1, 1), 6, 7, 8, 9]
    width = max(len(first), len(second))
    ids_BT = torch.tensor([row + [12] * (width - len(row)) for row in (first, second)])
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    wanted = theirs(input_ids=ids_BT, pixel_values=pixels).logits
    got = mine(ids_BT, pixels)
    assert (wanted - got).abs().max() < 1e-4

    probe = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4))
    (wanted * probe).sum().backward()
    (got * probe).sum().backward()
    assert_same_gradients(theirs, mine)


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = oracle.ours(oracle.text_oracle())
    ids_BT = torch.arange(10, 40).view(1, -1)
    gradients = []
    for checkpoint_layers in (False, True):
        model.checkpoint_layers = checkpoint_layers
        model.zero_grad()
        model(ids_BT).square().mean().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_left_padding_keeps_true_positions_where_transformers_shifts_them() -> None:
    """HF measures the temperature from the physical index, so a padded row differs from itself."""
    from l4cli.ops.batch import Batch, Segments

    model = oracle.ours(oracle.text_oracle())
    ids_BT = torch.arange(20, 40).view(1, -1)
    wanted = model(ids_BT)
    num_pads, length = 5, ids_BT.shape[1]
    padded_BT = torch.cat([torch.zeros(1, num_pads, dtype=torch.long), ids_BT], dim=1)
    documents_BT = (torch.arange(num_pads + length) >= num_pads).int().view(1, -1)
    positions_BT = (torch.arange(num_pads + length) - num_pads).clamp(min=0).view(1, -1)
    batch = Batch(
        padded_BT,
        padded_BT,
        documents_BT.float(),
        documents_BT,
        positions_BT,
        Segments.from_document_ids(documents_BT, 8),
    )
    got = model.lm_head(model.hidden(batch))[:, num_pads:]
    assert (wanted - got).abs().max() < 1e-5


def test_no_chunk_size_means_full_attention() -> None:
    """transformers refuses a null chunk size; a chunk longer than the text is the same."""
    theirs = oracle.text_oracle(attention_chunk_size=64)
    mine = oracle.ours(theirs)
    ids_BT = torch.arange(10, 50).view(1, -1)
    wanted = mine(ids_BT)
    mine.config.text.attention_chunk_size = None
    assert torch.allclose(mine(ids_BT), wanted, atol=1e-6)


def test_permuting_experts_with_their_router_rows_changes_nothing() -> None:
    model = oracle.ours(oracle.text_oracle())
    ids_BT = torch.arange(10, 50).view(1, -1)
    wanted = model(ids_BT)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in model.model.layers:
            moe = layer.feed_forward
            moe.router.weight.copy_(moe.router.weight[order])
            moe.experts.gate_up_proj.copy_(moe.experts.gate_up_proj[order])
            moe.experts.down_proj.copy_(moe.experts.down_proj[order])
    assert torch.allclose(model(ids_BT), wanted, atol=1e-5)
