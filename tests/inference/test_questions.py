"""Many continuations of one past at once equal one after the other."""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import CHUNK, full_logits, random_ids, text_model, vision_model

from l4cli.inference import Cache, CacheBatch, CacheOptions, Engine, Request


def expected_scores(model, past, ids):
    """By the model's plain forward. shapes: -> log-probabilities [n], likeliest ids [n]"""
    logits = full_logits(model, torch.cat([past, ids]))[len(past) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0], logits.argmax(-1)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 4}, {"attention_chunk_size": None}])
@pytest.mark.parametrize("prefix", [1, 7, 8, 13, 16, 40])
def test_scores_equal_those_of_each_alone(changes, prefix):
    model = text_model(**changes)
    engine = Engine(model)
    past = random_ids(prefix)
    cache = engine.prefill(past)
    continuations = [random_ids(n, seed=n) for n in (1, 5, 3, 5, 2, 2 * CHUNK + 3, 9, CHUNK)]
    before = cache.logits_V.clone()
    scores = engine.score_many(cache, continuations)
    assert len(scores) == len(continuations)
    for ids, (logprobs, likeliest) in zip(continuations, scores, strict=True):
        expected, expected_ids = expected_scores(model, past, ids)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(likeliest, expected_ids)
        alone = engine.score(ids, cache=cache.fork(1)[0])
        torch.testing.assert_close(logprobs, alone, atol=1e-5, rtol=1e-5)
    assert cache.num_tokens == prefix
    assert torch.equal(cache.logits_V, before)


def test_groups_of_few_tokens_give_the_same():
    model = text_model()
    engine, small = Engine(model), Engine(model)
    small.prefill_chunk = 7
    cache = engine.prefill(random_ids(20))
    continuations = [random_ids(n, seed=n) for n in (4, 1, 9, 3, 3)]
    for (a, b), (c, d) in zip(
        engine.score_many(cache, continuations),
        small.score_many(cache, continuations),
        strict=True,
    ):
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
        assert torch.equal(b, d)
    assert engine.score_many(cache, []) == []


def test_single_tokens_need_no_pass():
    model = text_model()
    engine = Engine(model)
    cache = engine.prefill(random_ids(9))
    for token in (3, 7):
        ((logprobs, likeliest),) = engine.score_many(cache, [[token]])
        assert float(logprobs) == pytest.approx(float(cache.logits_V.log_softmax(-1)[token]))
        assert int(likeliest) == int(cache.logits_V.argmax())


def test_what_is_never_chosen_is_never_the_likeliest():
    engine = Engine(vision_model(), num_token_ids=20)
    cache = engine.prefill(random_ids(9))
    for _, likeliest in engine.score_many(cache, [random_ids(30, 1), random_ids(20, 2)]):
        assert int(likeliest.max()) < 20


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_questions_after_blocks_of_any_format(kv_dtype, monkeypatch):
    monkeypatch.setattr("l4cli.inference.layer_cache.BLOCK", 256)
    monkeypatch.setattr("l4cli.inference.kept.BLOCK", 256)
    model = text_model(max_position_embeddings=2048, floor_scale=64)
    engine = Engine(model, cache_options=CacheOptions(kv_dtype))
    past = random_ids(900)
    cache = engine.prefill(past, chunk_size=300)
    most = 1e-4 if kv_dtype == "auto" else 0.05
    for ids, (logprobs, _) in zip(
        [random_ids(5, 1), random_ids(12, 2)],
        engine.score_many(cache, [random_ids(5, 1), random_ids(12, 2)]),
        strict=True,
    ):
        expected, _ = expected_scores(model, past, ids)
        assert float((logprobs - expected).abs().max()) < most


@pytest.mark.parametrize("prefix", [5, 8, 13])
def test_forks_decode_together_as_they_do_alone(prefix):
    model = text_model()
    engine = Engine(model)
    past = random_ids(prefix)

    def requests(cache: Cache) -> list[Request]:
        prompts = [random_ids(n, seed=n) for n in (1, 3, 6)]
        forks = cache.fork(3)
        return [Request(p, max_new_tokens=12, cache=f) for p, f in zip(prompts, forks, strict=True)]

    cache = engine.prefill(past)
    together: dict[int, list[tuple[int, float]]] = {}
    for event in engine.generate(requests(cache)):
        together.setdefault(event.request, []).append((event.token, event.logprob))
    for i, request in enumerate(requests(engine.prefill(past))):
        alone = list(engine.generate([request]))
        assert [token for token, _ in together[i]] == [event.token for event in alone]
        expected = [event.logprob for event in alone]
        assert [p for _, p in together[i]] == pytest.approx(expected, abs=1e-4)


def test_rows_of_which_some_share_a_past():
    model = text_model()
    engine = Engine(model)
    one, two = engine.prefill(random_ids(21)).fork(2)
    rows = [one, engine.prefill(random_ids(10, 4)), two]
    q, k, v = torch.randn(3, 1, 4, 8), torch.randn(3, 1, 2, 8), torch.randn(3, 1, 2, 8)
    copies = [row.fork(1)[0] for row in rows]
    out = CacheBatch(rows).attend(3, q, k, v)
    for i, row in enumerate(copies):
        torch.testing.assert_close(out[i], row.attend(3, q[i, None], k[i, None], v[i, None])[0])
