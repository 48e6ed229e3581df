"""Keys and values in other formats: codes against a plain loop, answers against fp32."""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import full_logits, random_ids, text_model

from l4cli.errors import UsageError
from l4cli.inference import Cache, CacheOptions, Engine
from l4cli.inference import kept as kept_module
from l4cli.inference.kept import KEY_GROUP, NEWEST, Packed, load, num_tokens
from l4cli.inference.layer_cache import LayerCache

LONG = 700


def long_model(**changes):
    return text_model(max_position_embeddings=2048, floor_scale=64, **changes)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_against_a_plain_loop(bits):
    keys = torch.randn(2, 2 * KEY_GROUP, 6) * torch.tensor([1, 5, 0.01, 100, 1, 1])
    values = torch.randn(2, 2 * KEY_GROUP, 6) + 3
    values[0, 5] = 0.25  # a constant row has no range
    packed = Packed.of(keys, values, bits)
    got_keys, got_values = packed.load(torch.float32)
    top = 2**bits - 1

    def levels(x: torch.Tensor) -> torch.Tensor:
        low = x.min().half().float()
        scale = ((x.max() - low) / top).half().float()
        if scale == 0:
            return low.expand_as(x)
        return torch.tensor(
            [low + scale * min(max(torch.round((v - low) / scale), 0), top) for v in x]
        )

    for head in range(2):
        for channel in range(6):
            for start in (0, KEY_GROUP):
                rows = slice(start, start + KEY_GROUP)
                expected = levels(keys[head, rows, channel])
                torch.testing.assert_close(got_keys[head, rows, channel], expected)
        for token in (0, 5, 130, 255):
            torch.testing.assert_close(got_values[head, token], levels(values[head, token]))
    item = {8: 1, 4: 0.5}[bits]
    assert packed.tensors[0].untyped_storage().nbytes() == keys.numel() * item


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("sizes", [(LONG,), (1,) * 5 + (300, 7, 388), (129, 571)])
def test_all_is_kept_in_order_and_the_newest_exactly(kv_dtype, sizes):
    torch.manual_seed(0)
    layer = LayerCache(None, CacheOptions(kv_dtype))
    keys, values = torch.randn(2, LONG, 2, 8)
    start = 0
    for size in sizes:
        layer.store(keys[start : start + size], values[start : start + size])
        start += size
    parts = layer.parts()
    assert sum(num_tokens(part) for part in parts) == LONG
    loaded = [load(part, torch.float32) for part in parts]
    got = torch.cat([k for k, _ in loaded], 1).transpose(0, 1)
    step = {"bf16": 0.02, "int8": 0.02, "int4": 0.4}[kv_dtype]
    assert float((got - keys).abs().max()) < step
    if kv_dtype != "bf16":
        assert NEWEST <= num_tokens(parts[-1]) < NEWEST + KEY_GROUP
        assert torch.equal(got[-NEWEST:], keys[-NEWEST:])
    other = torch.cat([v for _, v in loaded], 1).transpose(0, 1)
    assert float((other - values).abs().max()) < step


@pytest.mark.parametrize(("kv_dtype", "most"), [("fp32", 1e-5), ("bf16", 3e-2), ("int8", 3e-2)])
def test_the_loss_of_accuracy_is_small_and_known(kv_dtype, most):
    model = long_model()
    ids = random_ids(LONG)
    expected = full_logits(model, ids)[-1]
    cache = Engine(model, cache_options=CacheOptions(kv_dtype)).prefill(ids, chunk_size=200)
    error = float((cache.logits_V - expected).abs().max() / expected.std())
    assert error < most
    if kv_dtype != "fp32":
        assert error > 0


def test_four_bits_lose_more_than_eight_and_less_than_the_answer():
    model = long_model()
    ids = random_ids(LONG)
    expected = full_logits(model, ids)[-1]
    errors = {}
    for kv_dtype in ("int8", "int4"):
        cache = Engine(model, cache_options=CacheOptions(kv_dtype)).prefill(ids)
        # One pass sees its own keys as they are: the next pass meets the codes.
        errors[kv_dtype] = 0.0
        Engine(model).prefill(random_ids(3, 5), cache=cache)
        whole = full_logits(model, torch.cat([ids, random_ids(3, 5)]))[-1]
        errors[kv_dtype] = float((cache.logits_V - whole).abs().max() / expected.std())
    assert errors["int8"] < errors["int4"] < 0.5


@pytest.mark.parametrize(("kv_dtype", "per_value"), [("bf16", 2), ("int8", 1.047), ("int4", 0.547)])
def test_bytes_a_token(kv_dtype, per_value):
    layer = LayerCache(None, CacheOptions(kv_dtype))
    x = torch.randn(16384 + NEWEST, 1, 64)
    layer.store(x, x)
    quantized = sum(
        tensor.nbytes for part in layer.sealed for tensor in kept_module.part_tensors(part)
    )
    assert quantized / (2 * 16384 * 64) == pytest.approx(per_value, rel=1e-3)


@pytest.mark.parametrize("kv_dtype", ["auto", "bf16", "int4"])
def test_long_pasts_lie_in_blocks_that_are_never_copied(kv_dtype, monkeypatch):
    monkeypatch.setattr("l4cli.inference.layer_cache.BLOCK", 256)
    monkeypatch.setattr("l4cli.inference.kept.BLOCK", 256)
    layer = LayerCache(None, CacheOptions(kv_dtype))
    keys = torch.randn(1000, 2, 8)
    addresses: list[int] = []
    for start in range(0, 1000, 100):
        layer.store(keys[start : start + 100], keys[start : start + 100])
        now = [kept_module.part_tensors(part)[0].data_ptr() for part in layer.sealed]
        assert now[: len(addresses)] == addresses
        addresses = now
    assert len(addresses) == 3
    got = torch.cat([load(part, torch.float32)[0] for part in layer.parts()], 1).transpose(0, 1)
    assert float((got - keys).abs().max()) < {"auto": 1e-9, "bf16": 0.02, "int4": 0.4}[kv_dtype]


def test_forks_of_a_quantized_past():
    model = long_model()
    engine = Engine(model, cache_options=CacheOptions("int8"))
    past = random_ids(450)
    forks = engine.prefill(past).fork(2)
    for seed, fork in enumerate(forks, start=1):
        more = random_ids(300, seed)
        engine.prefill(more, cache=fork, chunk_size=90)
        expected = full_logits(model, torch.cat([past, more]))[-1]
        assert float((fork.logits_V - expected).abs().max() / expected.std()) < 3e-2


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match="unknown format `int5`"):
        CacheOptions("int5")


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "int4"])
def test_saved_as_it_is_kept(kv_dtype, tmp_path):
    model = long_model()
    engine = Engine(model, cache_options=CacheOptions(kv_dtype))
    cache = engine.prefill(random_ids(LONG))
    path = tmp_path / "past.safetensors"
    cache.save(path)
    loaded = engine.load_cache(path)
    assert loaded.options == cache.options
    assert loaded.tokens == cache.tokens
    assert isinstance(loaded, Cache)
    more = random_ids(200, 3)
    for one in (cache, loaded):
        engine.prefill(more, cache=one)
    torch.testing.assert_close(loaded.logits_V, cache.logits_V, atol=1e-5, rtol=1e-5)
