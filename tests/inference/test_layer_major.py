"""Reading layer by layer equals the ordinary way, with one layer in memory at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import (
    CHUNK,
    PATCH,
    TOKENS_PER_TILE,
    random_ids,
    text_model,
    vision_model,
)

from l4cli.checkpoint import save_model
from l4cli.errors import L4Error
from l4cli.inference import CacheOptions, Engine
from l4cli.inference.layer_major import open_streamed

QUESTIONS = [random_ids(n, seed=n) for n in (1, 5, 3, 2 * CHUNK + 1, 5)]
FULL, LOCAL = "full_attention", "chunked_attention"
SHAPES = [
    {},
    {"num_hidden_layers": 4},
    {"attention_chunk_size": None},
    {"num_hidden_layers": 4, "scalable_softmax": True, "attn_temperature_tuning": False},
    {"no_rope_layers": [1] * 5, "layer_types": [LOCAL, LOCAL, FULL, LOCAL, FULL]},
]


def assert_same(ours, expected, atol=1e-5):
    assert len(ours) == len(expected)
    for (logprobs, likeliest), (other, other_ids) in zip(ours, expected, strict=True):
        torch.testing.assert_close(logprobs, other, atol=atol, rtol=1e-5)
        assert torch.equal(likeliest, other_ids)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 8, 9, 45])
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_equals_the_ordinary_way(changes, length, chunk_size):
    engine = Engine(text_model(**changes))
    ids = random_ids(length)
    expected = engine.score_many(engine.prefill(ids), QUESTIONS)
    assert_same(engine.read_layer_major(ids, QUESTIONS, chunk_size=chunk_size), expected)


def test_states_in_a_file(tmp_path):
    engine = Engine(text_model())
    ids, path = random_ids(45), tmp_path / "states"
    seen = []

    def look(done: int, total: int) -> None:
        seen.append((done, total, path.stat().st_size))

    ours = engine.read_layer_major(ids, QUESTIONS, hidden_store=path, on_progress=look)
    assert_same(ours, engine.score_many(engine.prefill(ids), QUESTIONS))
    assert seen == [(i, 5, 44 * 32 * 4) for i in range(1, 6)]
    assert not path.exists()


def test_a_file_that_exists_or_cannot_be_made_is_refused(tmp_path):
    engine = Engine(text_model())
    path = tmp_path / "states"
    path.write_text("mine")
    with pytest.raises(L4Error, match="the file exists"):
        engine.read_layer_major(random_ids(9), QUESTIONS, hidden_store=path)
    assert path.read_text() == "mine"
    with pytest.raises(L4Error, match="no such file or directory; 1024 bytes are needed"):
        engine.read_layer_major(random_ids(9), QUESTIONS, hidden_store=tmp_path / "no" / "states")


def test_weights_come_from_the_checkpoint_one_layer_at_a_time(tmp_path):
    model = text_model()
    save_model(model, tmp_path / "checkpoint", {})
    ids = random_ids(45)
    expected = Engine(model).score_many(Engine(model).prefill(ids), QUESTIONS)
    streamed = open_streamed(tmp_path / "checkpoint", "cpu", None)
    layers = streamed.model.layers
    present = set()

    def look(*_: object) -> None:
        here = (i for i, layer in enumerate(layers) for p in layer.parameters() if not p.is_meta)
        present.add(tuple(sorted(set(here))))

    for layer in layers:
        layer.register_forward_pre_hook(look)
    ours = Engine(streamed).read_layer_major(ids, QUESTIONS, weights=tmp_path / "checkpoint")
    assert_same(ours, expected)
    assert present == {(0,), (1,), (2,), (3,), (4,)}
    assert all(p.is_meta for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("chunk_size", [2, 5, 100])
def test_pictures_in_the_text(chunk_size):
    model = vision_model()
    ids = torch.tensor([1, 2, 3, *[PATCH] * TOKENS_PER_TILE, 4, *[PATCH] * TOKENS_PER_TILE, 5, 6])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    engine = Engine(model)
    expected = engine.score_many(engine.prefill(ids, pixels), QUESTIONS)
    assert_same(engine.read_layer_major(ids, QUESTIONS, pixels, chunk_size=chunk_size), expected)


def test_quantized_keys_cost_as_little_as_in_the_ordinary_way():
    model = text_model(max_position_embeddings=2048, floor_scale=64)
    plain, packed = Engine(model), Engine(model, cache_options=CacheOptions("int8"))
    ids = random_ids(700)
    expected = plain.score_many(plain.prefill(ids), QUESTIONS)
    ours = packed.read_layer_major(ids, QUESTIONS)
    errors = [float((a - b).abs().max()) for (a, _), (b, _) in zip(ours, expected, strict=True)]
    assert 0 < max(errors) < 0.05


def test_nothing_asked_and_empty_questions():
    engine = Engine(text_model())
    assert engine.read_layer_major(random_ids(9), []) == []
    (empty, one) = engine.read_layer_major(random_ids(9), [[], [3]])
    assert [len(empty[0]), len(one[0])] == [0, 1]
    assert [len(logprobs) for logprobs, _ in engine.read_layer_major(random_ids(9), [[]])] == [0]
