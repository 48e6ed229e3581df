"""Figures of long readings, against Scout's arithmetic worked out by hand."""

from __future__ import annotations

import pytest
import torch

from l4cli.errors import UsageError
from l4cli.inference import CacheOptions
from l4cli.inference.kept import part_tensors
from l4cli.inference.layer_cache import LayerCache
from l4cli.model import load_preset
from l4cli.planning.reading import cache_bytes_per_token, parse_gpus, plan_reading, this_machine

SCOUT = load_preset("scout")
H100 = parse_gpus("h100")
K, M, TEN_MILLION = 1024, 1024**2, 10_000_000
WHOLE = {"spares_last_layer": False}


@pytest.mark.parametrize(
    ("tokens", "bf16", "fp8", "int4"),
    [
        (128 * K, 6.4, 3.2, 1.7),
        (256 * K, 12.9, 6.4, 3.4),
        (M, 51.5, 25.8, 13.7),
        (TEN_MILLION, 491.5, 245.8, 130.6),
    ],
)
def test_bytes_of_keys_and_values(tokens: int, bf16: float, fp8: float, int4: float) -> None:
    for kv_dtype, expected in (("bf16", bf16), ("fp8", fp8), ("int4", int4)):
        plan = plan_reading(SCOUT, tokens, H100, kv_dtype=kv_dtype)
        assert plan.full_cache_bytes / 1e9 == pytest.approx(expected, abs=0.06)
        assert plan.local_cache_bytes / 1e9 == pytest.approx(1.21, abs=0.01)


@pytest.mark.parametrize(
    ("tokens", "linear", "full", "local"),
    [
        (128 * K, 4.5e15, 2.1e15, 0.4e15),
        (256 * K, 8.9e15, 8.4e15, 0.8e15),
        (M, 3.6e16, 1.35e17, 3.2e15),
        (TEN_MILLION, 3.4e17, 1.23e19, 3.0e16),
    ],
)
def test_operations(tokens: int, linear: float, full: float, local: float) -> None:
    plan = plan_reading(SCOUT, tokens, H100, **WHOLE)
    # By hand 17e9 weights were counted, with head and embedding, which a text does not meet.
    ends = 2 * 2 * tokens * SCOUT.text.vocab_size * SCOUT.text.hidden_size
    assert plan.linear_flops + ends == pytest.approx(linear, rel=0.02)
    assert plan.full_attention_flops == pytest.approx(full, rel=0.03)
    assert plan.local_attention_flops == pytest.approx(local, rel=0.06)


def test_the_last_layer_is_spared() -> None:
    whole = plan_reading(SCOUT, TEN_MILLION, H100, **WHOLE)
    plan = plan_reading(SCOUT, TEN_MILLION, H100)
    assert whole.full_attention_flops - plan.full_attention_flops == pytest.approx(
        1.02e18, rel=0.01
    )
    assert plan.full_attention_flops == pytest.approx(whole.full_attention_flops * 11 / 12)
    saved = whole.linear_flops - plan.linear_flops
    assert saved == pytest.approx(2 * 1e7 * (2 * 5120 * 5120 + 2 * 3 * 5120 * 8192 + 5120 * 16))


def test_seconds_on_gpus() -> None:
    assert plan_reading(SCOUT, M, H100, **WHOLE).time_s == pytest.approx(315, rel=0.05)
    assert plan_reading(SCOUT, M, parse_gpus("8xh100"), **WHOLE).time_s == pytest.approx(
        43, rel=0.05
    )
    one = plan_reading(SCOUT, TEN_MILLION, H100, **WHOLE)
    assert one.time_s == pytest.approx(21_300, rel=0.03)
    eight = plan_reading(SCOUT, TEN_MILLION, parse_gpus("8xh100"), **WHOLE)
    assert eight.time_s == pytest.approx(2_900, rel=0.03)
    # The cache's part of a token; 17e9 weights come on top.
    for gpus, expected in (("8xh100", 0.023), ("8xh200", 0.016), ("h200", 0.128)):
        plan = plan_reading(SCOUT, TEN_MILLION, parse_gpus(gpus))
        share = plan.full_cache_bytes / plan.decode_bytes
        assert plan.decode_s * share == pytest.approx(expected, rel=0.03)


def test_what_fits_where() -> None:
    def fits(gpus: str, dtype: str, kv_dtype: str, tokens: int = TEN_MILLION, **how: bool) -> bool:
        machine = parse_gpus(gpus)
        return plan_reading(SCOUT, tokens, machine, dtype=dtype, kv_dtype=kv_dtype, **how).fits

    assert fits("8xh100", "bf16", "fp8")
    assert not fits("8xh100", "bf16", "bf16")
    assert fits("8xh200", "bf16", "bf16")
    assert fits("h200", "int4", "int4", 6_000_000)
    assert not fits("h200", "int4", "int4")
    assert fits("h100", "bf16", "bf16", is_layer_major=True)


def test_layer_by_layer() -> None:
    plan = plan_reading(SCOUT, TEN_MILLION, H100, is_layer_major=True)
    assert plan.host_bytes == pytest.approx(102.4e9)
    assert plan.full_cache_bytes == pytest.approx(41e9, rel=0.01)
    # 16 experts, the shared one, attention.
    assert plan.weights_bytes == pytest.approx(4.0e9 + 0.25e9 + 0.13e9, rel=0.03)
    assert plan.decode_bytes == 0
    usual = plan_reading(SCOUT, TEN_MILLION, H100)
    assert plan.time_s == usual.time_s  # moving states hides behind the arithmetic


def test_bytes_are_those_the_cache_really_takes() -> None:
    text = SCOUT.text
    for kv_dtype in ("bf16", "int8", "int4"):
        layer = LayerCache(None, CacheOptions(kv_dtype))
        x_TKH = torch.randn(16384 + 256, text.num_key_value_heads, text.head_dim)
        layer.store(x_TKH, x_TKH)
        held = sum(t.nbytes for part in layer.sealed for t in part_tensors(part))
        assert held / 16384 == cache_bytes_per_token(text, kv_dtype)


def test_this_machine() -> None:
    plan = plan_reading(load_preset("nano"), 64 * K, this_machine("fp32"), dtype="fp32")
    assert plan.fits
    assert 0 < plan.time_s < 3600


@pytest.mark.parametrize("text", ["8x", "0xh100", "h1000", "two"])
def test_unknown_gpus(text: str) -> None:
    with pytest.raises(UsageError, match="unknown `--gpus"):
        parse_gpus(text)
