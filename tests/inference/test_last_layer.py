"""The last layer is spared positions nobody asks for; what is asked comes out the same."""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import PATCH, TOKENS_PER_TILE, full_logits, random_ids, text_model, vision_model

from l4cli.inference import Cache, Engine, pack_weights
from l4cli.ops.batch import Batch

FULL, LOCAL = "full_attention", "chunked_attention"
SHAPES = [
    {},  # the last layer is chunked and dense
    {"moe_layers": [4]},  # chunked, with experts
    {"num_hidden_layers": 4},  # full, with experts
    {"num_hidden_layers": 4, "scalable_softmax": True, "attn_temperature_tuning": False},
    {"no_rope_layers": [1] * 5, "layer_types": [LOCAL, LOCAL, FULL, LOCAL, FULL]},
]


def whole_read(model, ids: torch.Tensor) -> tuple[Cache, torch.Tensor]:
    cache = Cache(model.config.text)
    positions = torch.arange(len(ids))[None]
    with torch.inference_mode():
        hidden = model.hidden(Batch.continuing(ids[None], positions), cache)
    return cache, hidden[0]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("needed", [0, 1, 2, 7, 8, 20, 27])
def test_needed_states_and_kept_keys_are_those_of_the_whole_pass(changes, needed):
    model = text_model(**changes)
    ids = random_ids(27)
    expected_cache, expected = whole_read(model, ids)
    cache = Cache(model.config.text)
    batch = Batch.continuing(ids[None], torch.arange(27)[None])
    with torch.inference_mode():
        hidden = model.hidden(batch, cache, num_needed=needed)
    assert hidden.shape == (1, needed, 32)
    torch.testing.assert_close(hidden[0], expected[27 - needed :], atol=2e-6, rtol=1e-6)
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert layer.num_tokens == other.num_tokens
        for (keys, values), (k, v) in zip(layer.parts(), other.parts(), strict=True):
            torch.testing.assert_close(keys, k, atol=2e-6, rtol=1e-6)
            torch.testing.assert_close(values, v, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 11, 100])
def test_reading_in_pieces_ends_like_the_full_forward(changes, chunk_size):
    model = text_model(**changes)
    ids = random_ids(27)
    cache = Engine(model).prefill(ids, chunk_size=chunk_size)
    torch.testing.assert_close(cache.logits_V, full_logits(model, ids)[-1], atol=1e-5, rtol=1e-5)


def test_packed_weights_take_no_rows():
    model, packed = text_model(), text_model()
    if pack_weights(packed) is not None:
        pytest.skip("weights cannot be packed here")
    ids = random_ids(21)
    cache = Engine(packed).prefill(ids, chunk_size=5)
    torch.testing.assert_close(cache.logits_V, full_logits(model, ids)[-1], atol=1e-5, rtol=1e-5)


def test_a_picture_in_the_last_piece():
    model = vision_model()
    ids = torch.tensor([1, 2, 3, *[PATCH] * TOKENS_PER_TILE, 4])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for size in (2, 3, 100):
        cache = Engine(model).prefill(ids, pixels, chunk_size=size)
        expected = full_logits(model, ids, pixels)[-1]
        torch.testing.assert_close(cache.logits_V, expected, atol=1e-5, rtol=1e-5)
