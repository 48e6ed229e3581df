"""Give each linear map the format that serves most, within so many bits a weight.

in: of each map its size, and what its outputs (or weights) lose in each format; out: choices
Maps that other programs fuse get one format: q, k and v; gate and up; all experts of a layer.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from l4cli.errors import L4Error
from l4cli.quantization.formats import WeightFormat
from l4cli.quantization.rounding import divides, round_weight

PLAIN_BITS = 16.0  # of a weight that stays bf16
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")
_FUSED = re.compile(r"(.*\.)(?:[qkv]_proj|(?:gate|up)_proj)")


@dataclass(frozen=True)
class Sensitivity:
    """What one map loses: squared errors by format, beside the square of what is right."""

    shape: tuple[int, int]
    signal: float
    errors: Mapping[WeightFormat, float]  # formats that divide it


@dataclass
class Offer:
    """A format for maps that share one; None: they stay as they are."""

    format: WeightFormat | None
    num_bits: float = 0.0
    error: float = 0.0


@dataclass
class Unit:
    """Maps that get the same format."""

    names: list[str] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)


def budget_formats(zero_points: bool) -> tuple[WeightFormat, ...]:
    """What a budget chooses among, beside bf16."""
    groups = [WeightFormat("int4", size) for size in (128, 64, 32)]
    if zero_points:
        groups += [WeightFormat("int4", size, symmetric=False) for size in (128, 64, 32)]
    return (*groups, WeightFormat("int8"))


def weight_sensitivity(weight_OI: Tensor, formats: Sequence[WeightFormat]) -> Sensitivity:
    """Without data: what the weights themselves lose."""
    weight_OI = weight_OI.float()
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    errors = {}
    for format in formats:
        if divides(format, shape[1]):
            values = round_weight(weight_OI, format, searches=True).dequantize()
            errors[format] = float((values - weight_OI).square().sum())
    return Sensitivity(shape, float(weight_OI.square().sum()), errors)


def choose_within(
    measured: Mapping[str, Sensitivity], bits_per_weight: float
) -> dict[str, WeightFormat | None]:
    """The formats of least error whose bits are at most the budget's: greedy, dearest gain first.

    Starting from the fewest bits, the step that saves most error a bit is taken as long as it
    fits. raises: L4Error with the least possible number of bits a weight
    """
    units = _units(measured)
    num_weights = sum(each.shape[0] * each.shape[1] for each in measured.values())
    left = bits_per_weight * num_weights - sum(unit.offers[0].num_bits for unit in units)
    if left < 0:
        least = bits_per_weight - left / num_weights
        what = f"cannot keep to {bits_per_weight:g} bits per weight"
        fix = f"write `--budget {math.ceil(least * 100) / 100:g}` or more"
        why = f"with every map in its smallest format it is {least:.3f}"
        raise L4Error(what, why=why, fix=fix)
    at = [0] * len(units)
    steps = [(-_gain(unit, 0), i) for i, unit in enumerate(units) if len(unit.offers) > 1]
    heapq.heapify(steps)
    while steps:
        _, i = heapq.heappop(steps)
        offers = units[i].offers
        cost = offers[at[i] + 1].num_bits - offers[at[i]].num_bits
        if cost > left:
            continue  # what comes after it costs more still; smaller units may fit
        left -= cost
        at[i] += 1
        if at[i] + 1 < len(offers):
            heapq.heappush(steps, (-_gain(units[i], at[i]), i))
    return {
        name: unit.offers[place].format
        for unit, place in zip(units, at, strict=True)
        for name in unit.names
    }


def _gain(unit: Unit, place: int) -> float:
    """Error saved a bit by the next offer."""
    return _slope(unit.offers[place], unit.offers[place + 1])


def _units(measured: Mapping[str, Sensitivity]) -> list[Unit]:
    """Units with their offers on the lower hull of bits and errors, fewest bits first."""
    units: dict[str, Unit] = {}
    for name in measured:
        units.setdefault(_unit_of(name), Unit()).names.append(name)
    signals: dict[str, float] = {}
    for name, each in measured.items():
        signals[_kind_of(name)] = signals.get(_kind_of(name), 0.0) + each.signal
    for unit in units.values():
        parts = [measured[name] for name in unit.names]
        scales = [1 / (signals[_kind_of(name)] or 1.0) for name in unit.names]
        shared = [f for f in parts[0].errors if all(f in part.errors for part in parts)]
        offers = [Offer(None, sum(_size(part) * PLAIN_BITS for part in parts))]
        for format in shared:
            bits = sum(_size(part) * format.bits_per_weight(part.shape[1]) for part in parts)
            errors = (part.errors[format] * s for part, s in zip(parts, scales, strict=True))
            offers.append(Offer(format, bits, sum(errors)))
        unit.offers = _hull(offers)
    return list(units.values())


def _hull(offers: Iterable[Offer]) -> list[Offer]:
    """Offers that save more error a bit than any dearer one, by rising bits."""
    hull: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.num_bits, o.error)):
        if hull and offer.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], offer):
            hull.pop()
        hull.append(offer)
    return hull


def _slope(here: Offer, following: Offer) -> float:
    return (here.error - following.error) / (following.num_bits - here.num_bits)


def _unit_of(name: str) -> str:
    """What shares a format with a map."""
    if found := _EXPERT.fullmatch(name):
        return found[1]
    found = _FUSED.fullmatch(name)
    return f"{found[1]}fused" if found else name


def _kind_of(name: str) -> str:
    """What counts as one map: the experts of a layer do, as a token meets one of them."""
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}.{found[2]}" if found else name


def _size(each: Sensitivity) -> int:
    return each.shape[0] * each.shape[1]
