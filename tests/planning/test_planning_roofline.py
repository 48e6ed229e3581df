"""Decode ceilings by hand: bytes of Scout and Maverick worked out weight by weight."""

from __future__ import annotations

import dataclasses
import math

import pytest

from l4cli.model import load_preset
from l4cli.planning import GPUS, QUOTED, STORAGES, BandwidthProbe, ceiling, step_cost
from l4cli.planning.roofline import experts_met, held_bytes, prefill_flops

SCOUT, MAVERICK = load_preset("scout"), load_preset("maverick")
HIDDEN, EXPERT, HEAD = 5120, 3 * 5120 * 8192, 202048 * 5120
ATTENTION = 48 * (2 * 5120 * 5120 + 2 * 5120 * 1024)


def test_scout_reads_two_experts_a_layer() -> None:
    cost = step_cost(SCOUT, STORAGES["bf16"])
    weights = ATTENTION + 48 * (2 * EXPERT + 16 * HIDDEN) + HEAD
    assert cost.weight_bytes == 2 * weights
    assert cost.cache_bytes == 0
    assert cost.flops == 2 * weights
    assert cost.tok_per_sec(3.35e12) == pytest.approx(3.35e12 / (2 * weights))


def test_maverick_has_dense_layers_between() -> None:
    cost = step_cost(MAVERICK, STORAGES["bf16"])
    moe, dense = 24 * (2 * EXPERT + 128 * HIDDEN), 24 * 3 * HIDDEN * 16384
    assert cost.weight_bytes == 2 * (ATTENTION + moe + dense + HEAD)


def test_int4_keeps_head_and_router() -> None:
    """Four bits and a share of an fp16 scale for linear maps; the head is half of nothing."""
    cost = step_cost(SCOUT, STORAGES["int4"])
    linear = ATTENTION + 48 * 2 * EXPERT
    assert cost.weight_bytes == linear * 4.5 / 8 + 2 * HEAD + 2 * 48 * 16 * HIDDEN


def test_the_cache_grows_in_full_layers_only() -> None:
    per_key = 2 * 8 * 128 * 2
    short, long = (step_cost(SCOUT, STORAGES["bf16"], depth) for depth in (4096, 131072))
    assert short.cache_bytes == 48 * 4096 * per_key
    assert long.cache_bytes == (12 * 131072 + 36 * 8192) * per_key
    assert step_cost(SCOUT, STORAGES["bf16"], 4096, 3).cache_bytes == 3 * short.cache_bytes


@pytest.mark.parametrize("num_sequences", [1, 2, 7])
def test_experts_met_by_counting_all_choices(num_sequences: int) -> None:
    """Every way that 7 tokens at most can choose among 4 experts, counted out."""
    import itertools

    text = dataclasses.replace(SCOUT.text, num_local_experts=4)
    choices = list(itertools.product(range(4), repeat=num_sequences))
    mean = sum(len(set(choice)) for choice in choices) / len(choices)
    assert experts_met(text, num_sequences) == pytest.approx(mean)


def test_a_batch_reads_shared_weights_once() -> None:
    one, many = (step_cost(SCOUT, STORAGES["bf16"], 0, n) for n in (1, 1000))
    assert one.weight_bytes < many.weight_bytes
    every = ATTENTION + 48 * (17 * EXPERT + 16 * HIDDEN) + HEAD
    assert many.weight_bytes == pytest.approx(2 * every, rel=1e-6)
    assert many.tok_per_sec(1e12) > 100 * one.tok_per_sec(1e12)


def test_scout_fits_one_h100_in_int4_and_not_in_fp8() -> None:
    found = ceiling(SCOUT, STORAGES["int4"], "h100")
    assert found is not None
    assert (found.num_gpus, found.gpu) == (1, "h100")
    assert 55e9 < found.held_bytes < 80e9
    eight = ceiling(SCOUT, STORAGES["fp8"], "h100")
    assert eight is not None
    assert eight.num_gpus == 2
    assert held_bytes(SCOUT, STORAGES["bf16"]) == 2 * 108_641_793_536


def test_what_does_not_fit_or_compute_is_none() -> None:
    assert ceiling(MAVERICK, STORAGES["bf16"], "l40s", num_gpus=8) is None
    assert ceiling(SCOUT, STORAGES["fp8"], "a100") is None
    assert ceiling(load_preset("behemoth"), STORAGES["bf16"], "rtx5090") is None


def test_more_devices_read_faster() -> None:
    found = ceiling(MAVERICK, STORAGES["bf16"], "h200", 8192)
    assert found is not None
    assert found.num_gpus == 8  # 801 GB and a cache
    assert found.tok_per_sec == pytest.approx(8 * 4.8e12 / found.cost.read_bytes)


def test_quotations_are_of_things_we_know() -> None:
    for quoted in QUOTED:
        assert load_preset(quoted.preset)
        assert quoted.storage is None or quoted.storage in STORAGES
        assert quoted.gpu is None or quoted.gpu in GPUS
        if quoted.gpu is not None and quoted.storage is not None:
            config, storage = load_preset(quoted.preset), STORAGES[quoted.storage]
            assert ceiling(config, storage, quoted.gpu, num_gpus=quoted.num_gpus) is not None


def test_prefill_adds_up_over_pieces() -> None:
    """Two pieces are the whole, but for the head, which each piece's last token goes through."""
    text = dataclasses.replace(SCOUT.text, attention_chunk_size=100)
    whole = prefill_flops(text, 250)
    parts = prefill_flops(text, 130) + prefill_flops(text, 120, depth=130)
    assert parts - whole == pytest.approx(2 * HEAD)
    local = 100 * 101 / 2 * 2 + 50 * 51 / 2
    keys = 12 * 250 * 251 / 2 + 36 * local
    linear = ATTENTION + 48 * (2 * EXPERT + 16 * HIDDEN)
    assert whole == pytest.approx(2 * 250 * linear + 2 * HEAD + 4 * 40 * 128 * keys)


def test_bandwidth_of_this_machine_is_measured() -> None:
    probe = BandwidthProbe(size_bytes=1 << 24)
    for num_threads in (1, 2):
        assert 1e8 < probe.measure(num_threads) < 1e13
        assert math.isfinite(probe.measure(num_threads))
