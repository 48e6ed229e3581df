"""What a config says of each linear map, asked in the library's way and in ours."""

from __future__ import annotations

import random

import pytest
import torch

from l4cli.checkpoint.compressed_tensors import weights_of, write_config
from l4cli.quantization import WeightFormat
from l4cli.quantization.parts import layer_of, part_of

matching = pytest.importorskip("compressed_tensors.utils.match")

FORMATS = [
    None,
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, symmetric=False),
    WeightFormat("int8"),
    WeightFormat("fp8", block=(128, 128)),
]


def names(has_vision: bool) -> list[str]:
    """Five layers, dense and sparse ones in turn, 11 experts."""
    found = []
    for i in range(5):
        layer = f"model.layers.{i}"
        found += [f"{layer}.self_attn.{p}_proj" for p in "qkvo"]
        feed = f"{layer}.feed_forward"
        owners = [feed]
        if i % 2:
            owners = [f"{feed}.shared_expert", *(f"{feed}.experts.{e}" for e in range(11))]
            found.append(f"{feed}.router")
        found += [f"{owner}.{p}_proj" for owner in owners for p in ("gate", "up", "down")]
    found.append("lm_head")
    if not has_vision:
        return found
    vision = [f"vision_model.model.layers.{j}.self_attn.{p}_proj" for j in range(2) for p in "qkvo"]
    vision += ["vision_model.vision_adapter.mlp.fc1", "multi_modal_projector.linear_1"]
    return [*(f"language_model.{name}" for name in found), *vision]


def by_library(config: dict, name: str) -> dict | None:
    """The weights of the group that compressed-tensors chooses, None for what it ignores."""
    module = torch.nn.Linear(1, 1)
    if matching.is_match(name, module, config["ignore"]):
        return None
    groups = {t: g["weights"] for g in config["config_groups"].values() for t in g["targets"]}
    return groups[matching.match_targets(name, module, groups)[0]]


def says(weights: dict, format: WeightFormat) -> bool:
    block = weights["block_structure"]
    return (weights["num_bits"], weights["type"], weights["symmetric"]) == (
        format.bits,
        "float" if format.name == "fp8" else "int",
        format.symmetric,
    ) and (weights["group_size"], block and tuple(block)) == (format.group_size, format.block)


@pytest.mark.parametrize("has_vision", [False, True])
@pytest.mark.parametrize("grain", ["part", "layer", "map"])
@pytest.mark.parametrize("seed", range(5))
def test_every_map_is_found_with_its_format(has_vision: bool, grain: str, seed: int) -> None:
    """Formats drawn for whole parts, for parts of a layer, or for each map by itself."""
    drawn: dict[object, WeightFormat | None] = {}
    generator = random.Random(seed)
    formats = {}
    for name in names(has_vision):
        place = (part_of(name), *([layer_of(name)] if grain == "layer" else []))
        key = name if grain == "map" else place
        formats[name] = drawn.setdefault(key, generator.choice(FORMATS))
    formats[names(has_vision)[0]] = FORMATS[1]  # something is quantized
    config = write_config(formats)
    for name, format in formats.items():
        found = by_library(config, name)
        if format is None:
            assert found is None, name
        else:
            assert found is not None, name
            assert says(found, format), name
            assert weights_of(config, name) == found, name


def test_a_budget_by_layers_needs_few_words() -> None:
    """A pattern for a part of a layer, not one for each of its experts."""
    formats = {name: FORMATS[3 if layer_of(name) == 1 else 1] for name in names(False)}
    config = write_config(formats)
    first, second = config["config_groups"].values()
    assert first["targets"] == ["Linear"]
    assert sorted(second["targets"]) == [
        "re:.*layers[.]1[.].*experts.*",
        "re:.*layers[.]1[.].*router.*",
        "re:.*layers[.]1[.].*self_attn.*",
        "re:.*layers[.]1[.].*shared_expert.*",
    ]
