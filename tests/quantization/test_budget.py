"""A budget's choices: against trying everything, and what must share a format."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from l4cli.errors import L4Error
from l4cli.quantization import WeightFormat, round_weight
from l4cli.quantization.budget import (
    PLAIN_BITS,
    Sensitivity,
    budget_formats,
    choose_within,
    weight_sensitivity,
)

G128, G64, G32, INT8 = budget_formats(zero_points=False)
BITS = {G128: 4.125, G64: 4.25, G32: 4.5, INT8: 8 + 16 / 256, None: PLAIN_BITS}


def maps(names: list[str], seed: int = 0, size: int = 256) -> dict[str, Sensitivity]:
    """Maps of one size that differ in how much they lose."""
    rng = random.Random(seed)
    found = {}
    for name in names:
        loss = 10 ** rng.uniform(-3, 0)
        errors = {G128: loss, G64: loss * 0.8, G32: loss * 0.6, INT8: loss * 0.004}
        found[name] = Sensitivity((size, size), 1.0, errors)
    return found


def spent(chosen: dict[str, WeightFormat | None]) -> float:
    return sum(BITS[format] for format in chosen.values()) / len(chosen)


def lost(measured: dict[str, Sensitivity], chosen: dict[str, WeightFormat | None]) -> float:
    return sum(measured[n].errors[f] for n, f in chosen.items() if f is not None)


@pytest.mark.parametrize("budget", [4.2, 4.5, 5.5, 7.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_near_the_best_of_all_choices(budget: float, seed: int) -> None:
    names = [f"layers.{i}.down_proj" for i in range(5)]
    measured = maps(names, seed)
    chosen = choose_within(measured, budget)
    assert spent(chosen) <= budget
    best = min(
        lost(measured, every)
        for formats in itertools.product(BITS, repeat=5)
        if spent(every := dict(zip(names, formats, strict=True))) <= budget
    )
    # Greedy may leave less than one step's bits unspent; with more bits it would beat the best.
    more = choose_within(measured, budget + PLAIN_BITS / 5)
    assert lost(measured, more) <= best <= lost(measured, chosen) + 1e-12


def test_more_bits_never_lose_more() -> None:
    measured = maps([f"layers.{i}.down_proj" for i in range(20)])
    errors = [lost(measured, choose_within(measured, b / 4)) for b in range(17, 65)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0  # 16 bits: nothing is touched


def test_fused_maps_share_a_format() -> None:
    names = [f"layers.0.self_attn.{n}_proj" for n in "qkvo"]
    names += [f"layers.0.feed_forward.shared_expert.{n}_proj" for n in ("gate", "up", "down")]
    experts = [
        f"layers.0.feed_forward.experts.{e}.{n}_proj" for e in range(3) for n in ("up", "down")
    ]
    chosen = choose_within(maps(names + experts, seed=4), 5.5)
    assert len({chosen[n] for n in names[:3]}) == 1
    assert len({chosen[n] for n in names[4:6]}) == 1
    assert len({chosen[n] for n in experts}) == 1
    assert len(set(chosen.values())) > 1


def test_a_budget_below_the_least_says_the_least() -> None:
    with pytest.raises(L4Error) as caught:
        choose_within(maps(["a", "b"]), 4)
    assert "4.125" in caught.value.why
    assert "`--budget 4.13`" in caught.value.fix


def test_a_map_that_nothing_divides_stays() -> None:
    measured = maps(["a", "b"])
    measured["c"] = Sensitivity((8, 250), 1.0, {})
    chosen = choose_within(measured, 4.4)
    assert chosen["c"] is None
    assert chosen["a"] is not None


def test_experts_of_a_layer_count_as_one_map() -> None:
    """Sixteen experts that lose as one shared expert does are not sixteen times as important."""
    errors = {G128: 0.01, INT8: 0.0001}
    measured = {
        f"layers.0.feed_forward.experts.{e}.down_proj": Sensitivity((64, 64), 1.0, errors)
        for e in range(16)
    }
    shared = "layers.0.feed_forward.shared_expert.down_proj"
    measured[shared] = Sensitivity((64, 64), 1.0, errors)
    chosen = choose_within(measured, 4.5)
    assert chosen[shared] == INT8
    assert set(chosen.values()) == {INT8, G128}


def test_weights_alone() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found = weight_sensitivity(weight, budget_formats(zero_points=True))
    assert G128 not in found.errors
    zero = WeightFormat("int4", 32, symmetric=False)
    assert found.errors[INT8] < found.errors[zero] < found.errors[G64]
    made = round_weight(weight, G32, searches=True).dequantize()
    assert found.errors[G32] == pytest.approx(float((made - weight).square().sum()))
    assert found.signal == pytest.approx(float(weight.square().sum()))
