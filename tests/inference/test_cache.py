"""Cached reading equals the full forward, however the tokens arrive."""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import CHUNK, full_logits, random_ids, text_model

from l4cli.errors import L4Error
from l4cli.inference import Cache, CacheBatch, CacheOptions, Engine
from l4cli.inference.attention import attend_causally
from l4cli.ops.parts_attention import attention, reference_attention


def test_every_prefix_length_around_chunk_borders():
    model = text_model()
    engine = Engine(model)
    ids = random_ids(3 * CHUNK + 3)
    expected = full_logits(model, ids)
    for prefix in range(1, len(ids) + 1):
        cache = engine.prefill(ids[:prefix])
        for end in range(prefix, min(prefix + CHUNK + 2, len(ids)) + 1):
            if end > prefix:
                engine.prefill(ids[end - 1 : end], cache=cache)
            torch.testing.assert_close(cache.logits_V, expected[end - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 64])
def test_other_attention_chunk_sizes(chunk_size):
    model = text_model(attention_chunk_size=chunk_size)
    ids = random_ids(23)
    expected = full_logits(model, ids)
    cache = Engine(model).prefill(ids[:9], chunk_size=4)
    Engine(model).prefill(ids[9:], cache=cache, chunk_size=3)
    torch.testing.assert_close(cache.logits_V, expected[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 26), (3, 9, 11, 4), (8, 8, 8, 3), (12, 12, 3), (17, 10)])
def test_prefill_in_odd_pieces(sizes):
    model = text_model()
    ids = random_ids(27)
    expected = full_logits(model, ids)
    engine, cache, start = Engine(model), None, 0
    for size in sizes:
        cache = engine.prefill(ids[start : start + size], cache=cache)
        start += size
        torch.testing.assert_close(cache.logits_V, expected[start - 1], atol=1e-5, rtol=1e-5)


def test_chunked_layers_keep_the_current_chunk_only():
    model = text_model()
    cache = Engine(model).prefill(random_ids(2 * CHUNK + 3))
    kept = [sum(keys.shape[1] for keys, _ in layer.parts()) for layer in cache.layers]
    assert kept == [3, 3, 3, 19, 3]
    Engine(model).prefill(random_ids(5), cache=cache)
    kept = [sum(keys.shape[1] for keys, _ in layer.parts()) for layer in cache.layers]
    assert kept == [0, 0, 0, 24, 0]


def test_memory_grows_with_what_was_read_not_with_the_longest_context():
    model = text_model(max_position_embeddings=10_000_000)
    engine = Engine(model)
    cache = engine.prefill(random_ids(100))
    assert cache.size_bytes < 100_000
    capacities = set()
    for token in random_ids(200).tolist():
        engine.prefill([token], cache=cache)
        capacities.add(cache.layers[3].tail[0].shape[1])
    assert len(capacities) <= 3
    assert max(layer.tail[0].shape[1] for i, layer in enumerate(cache.layers) if i != 3) <= CHUNK


@pytest.mark.parametrize("prefix", [5, 8, 13, 16])
def test_forks_share_the_past_and_go_their_own_ways(prefix):
    model = text_model()
    engine = Engine(model)
    past = random_ids(prefix)
    cache = engine.prefill(past)
    forks = cache.fork(3)
    assert sum(fork.size_bytes for fork in forks) == 3 * cache.size_bytes
    shared = {part[0].data_ptr() for fork in forks for part in fork.layers[3].parts()}
    assert len(shared) == 1
    for seed, fork in enumerate([*forks, cache], start=1):
        more = random_ids(11, seed)
        expected = full_logits(model, torch.cat([past, more]))
        for start, end in ((0, 1), (1, 5), (5, 6), (6, 11)):
            engine.prefill(more[start:end], cache=fork)
            at = prefix + end - 1
            torch.testing.assert_close(fork.logits_V, expected[at], atol=1e-5, rtol=1e-5)
    # A fork of a fork: its past lies in two places until it is joined.
    again = forks[0].fork(1)[0]
    more = torch.cat([past, random_ids(11, 1), random_ids(4, 9)])
    engine.prefill(more[-4:], cache=again)
    torch.testing.assert_close(again.logits_V, full_logits(model, more)[-1], atol=1e-5, rtol=1e-5)


def test_rows_of_unequal_length_decode_together():
    model = text_model()
    engine = Engine(model)
    prompts = [random_ids(n, seed=n) for n in (3, 8, 15)]
    batch = CacheBatch(engine.prefill(ids) for ids in prompts)
    assert batch.lengths == [3, 8, 15]
    q = torch.randn(3, 1, 4, 8)
    k, v = torch.randn(2, 3, 1, 2, 8)
    together = CacheBatch(row.fork(1)[0] for row in batch.rows).attend(3, q, k, v)

    for i, row in enumerate(batch.rows):
        alone = row.attend(3, q[i, None], k[i, None], v[i, None])
        torch.testing.assert_close(together[i], alone[0])


def test_save_and_load(tmp_path):
    model = text_model()
    engine = Engine(model)
    ids = random_ids(21)
    cache = engine.prefill(ids[:10])
    cache.save(tmp_path / "prefix.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.safetensors"]
    loaded = Cache.load(tmp_path / "prefix.safetensors", model.config.text)
    assert loaded.tokens == ids[:10].tolist()
    torch.testing.assert_close(loaded.logits_V, cache.logits_V)
    engine.prefill(ids[10:], cache=loaded)
    expected = full_logits(model, ids)[-1]
    torch.testing.assert_close(loaded.logits_V, expected, atol=1e-5, rtol=1e-5)


def test_load_refuses_what_it_cannot_use(tmp_path):
    model = text_model()
    path = tmp_path / "prefix.safetensors"
    with pytest.raises(L4Error, match="no such file"):
        Cache.load(path, model.config.text)
    Engine(model).prefill(random_ids(10)).save(path)
    other = text_model(attention_chunk_size=4).config.text
    with pytest.raises(L4Error, match="another config"):
        Cache.load(path, other)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(L4Error, match="cannot open cache"):
        Cache.load(path, model.config.text)
    path.write_bytes(b"")
    with pytest.raises(L4Error, match="cannot open cache"):
        Cache.load(path, model.config.text)


def test_another_model_of_the_same_shape_is_refused(tmp_path):
    path = tmp_path / "prefix.safetensors"
    Engine(text_model()).prefill(random_ids(10)).save(path)
    with pytest.raises(L4Error, match="of this shape with other weights"):
        Engine(text_model(seed=1)).load_cache(path)
    # The same weights in another precision are the same model.
    half = Engine(text_model().bfloat16())
    assert half.load_cache(path).num_tokens == 10


def test_a_cache_that_lost_a_layer_is_refused(tmp_path):
    model = text_model()
    path = tmp_path / "prefix.safetensors"
    cache = Engine(model).prefill(random_ids(10))
    cache.layers[3].sealed, cache.layers[3].tail_length = (), 0
    cache.save(path)
    with pytest.raises(L4Error, match="not whole: layer 3 has 0 keys for 10 tokens"):
        Cache.load(path, model.config.text)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_log_sum_exp(is_causal, dtype):
    q, k, v = torch.randn(3, 2, 4, 33, 16, dtype=dtype)
    out, lse = attention(q, k, v, is_causal)
    expected, expected_lse = reference_attention(q, k, v, is_causal)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)


def test_parts_of_the_past_equal_one_softmax():
    q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    past = [(torch.randn(2, n, 8), torch.randn(2, n, 8)) for n in (3, 7)]
    out = attend_causally(q, k, v, past)[0]
    keys = torch.cat([*(keys for keys, _ in past), k[0].transpose(0, 1)], 1)
    values = torch.cat([*(values for _, values in past), v[0].transpose(0, 1)], 1)
    for t in range(5):
        for head in range(4):
            seen = slice(0, 10 + t + 1)
            scores = keys[head // 2, seen] @ q[0, t, head] * 8**-0.5
            expected = scores.softmax(-1) @ values[head // 2, seen]
            torch.testing.assert_close(out[t, head], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("chunk", [CHUNK, 100, None])
@pytest.mark.parametrize("common", [0, 3, 8, 299, 300, 517, 700])
def test_going_back_to_where_another_text_parts(kv_dtype, chunk, common):
    model = text_model(max_position_embeddings=2048, floor_scale=64, attention_chunk_size=chunk)
    engine = Engine(model, cache_options=CacheOptions(kv_dtype))
    past = random_ids(700)
    other = torch.cat([past[:common], (past[common : common + 40] + 1) % 60, random_ids(9, 3)])
    cache = engine.prefill(past)
    kept = cache.keep_common(other.tolist())
    assert kept == (700 if common == 700 else common // (chunk or 1) * (chunk or 1))
    assert cache.num_tokens == kept
    assert cache.tokens == past[:kept].tolist()
    engine.prefill(other[kept:], cache=cache)
    expected = full_logits(model, other)[-1]
    most = {"auto": 1e-5, "int8": 0.05, "int4": 1.0}[kv_dtype]
    assert float((cache.logits_V - expected).abs().max() / expected.std()) < most


def test_going_back_leaves_a_token_to_read():
    engine = Engine(text_model(attention_chunk_size=None))
    cache = engine.prefill(random_ids(20))
    assert cache.keep_common(random_ids(20)[:11].tolist()) == 10
    cache = engine.prefill(random_ids(20))
    assert cache.keep_common(random_ids(20).tolist()) == 20
    assert cache.logits_V is not None


def test_going_back_to_nothing():
    """What a draft hears of a prompt that is all pictures."""
    for chunk in (CHUNK, None):
        cache = Engine(text_model(attention_chunk_size=chunk)).prefill(random_ids(20))
        assert cache.keep_common([]) == 0
        assert cache.num_tokens == 0
        assert {layer.num_tokens for layer in cache.layers} == {0}


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_short_runs_are_attended_each_alone(heads, kv_heads, length, dtype, monkeypatch):
    monkeypatch.setattr("l4cli.inference.attention.SCORES", 3 * heads * length * length)
    q = torch.randn(5, length, heads, 8, dtype=dtype)
    k, v = torch.randn(2, 5, length, kv_heads, 8, dtype=dtype)
    out = attend_causally(q, k, v, [])
    for run in range(5):
        for head in range(heads):
            kv = head * kv_heads // heads
            expected, _ = reference_attention(
                q[run, :, head].double(), k[run, :, kv].double(), v[run, :, kv].double(), True
            )
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            got = out[run, :, head].double()
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
