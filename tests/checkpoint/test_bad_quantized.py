"""Quantized folders that cannot be read, and what is said about each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_folders import edit, edit_config, quantize

from l4cli.checkpoint import (
    describe_checkpoint,
    load_config,
    load_model,
    open_weights,
    read_quantized,
)
from l4cli.errors import L4Error
from l4cli.quantization import WeightFormat

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(hf_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "q"
    return quantize(hf_text, folder, WeightFormat("int4", 32, symmetric=False))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "q"))


def refused(folder: Path) -> L4Error:
    with pytest.raises(L4Error) as caught:
        load_model(folder)
    assert "quantized checkpoint" in caught.value.what
    return caught.value


def scheme(**weights: Any) -> dict[str, Any]:
    """A config as compressed-tensors writes it, with other weights."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", **weights}
    layout = weights.pop("layout", "pack-quantized")
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "`modelopt`"),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": []}, "`fbgemm_fp8`"),
        ({"quant_method": "gptq", "bits": 4}, "`gptq`"),
        ("awq", "`awq`"),
        (scheme(layout="nvfp4-pack-quantized"), "`nvfp4-pack-quantized`"),
        (scheme(num_bits=3), "3 bits"),
        (scheme(num_bits=4, type="float"), "4 bits (float)"),
        (scheme(actorder="group"), "`actorder`"),
        (scheme(num_bits=8, symmetric=False), "zero points"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "codes"),
    ],
    ids=str,
)
def test_other_methods_and_formats(config: Any, why: str, folder: Path) -> None:
    """Refused by the config alone; what can be said of it still is."""
    edit_config(folder, quantization_config=config)
    assert why in refused(folder).why
    with pytest.raises(L4Error):
        load_config(folder)
    assert describe_checkpoint(folder)["quantization"]


def change(name: str, edited: Callable[[torch.Tensor], torch.Tensor] | None) -> Any:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        if edited is None:
            del tensors[name]
        else:
            tensors[name] = edited(tensors[name]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("leaf", "edited", "why"),
    [
        ("weight_scale", None, "no `weight_scale`"),
        ("weight_scale", lambda t: t * float("nan"), "NaN"),
        ("weight_scale", lambda t: t[:-1], "63x2 scales"),
        ("weight_scale", lambda t: t.repeat(1, 2)[:, :3], "64x3 scales"),
        ("weight_scale", lambda t: t[:, :1], "64x1 scales for its groups of 32"),
        ("weight_scale", lambda t: t.to(torch.int32), "NaN"),
        ("weight_zero_point", lambda t: t[:, :1], "zero points"),
        ("weight_shape", lambda t: t + 8, "says it is [72, 72]"),
        ("weight_shape", lambda t: t - torch.tensor([0, 2]), "[64, 62] has 64x2 scales"),
        ("weight_packed", lambda t: t[:, :-1], "words"),
        ("weight_packed", lambda t: t.unsqueeze(0), "linear maps"),
    ],
)
def test_tensors_that_contradict_each_other(leaf: str, edited: Any, why: str, folder: Path) -> None:
    edit(folder, change(f"{Q_PROJ}.{leaf}", edited))
    error = refused(folder)
    assert why in error.why
    assert Q_PROJ in error.why


def test_a_shape_that_only_the_model_contradicts(hf_text: Path, tmp_path: Path) -> None:
    """62 inputs take as many words as 64, and one scale a row fits both."""
    folder = quantize(hf_text, tmp_path / "q", WeightFormat("int8"))
    edit(folder, change(f"{Q_PROJ}.weight_shape", lambda t: t - torch.tensor([0, 2])))
    assert "says it is [64, 62], the model needs [64, 64]" in refused(folder).why


def test_codes_of_another_model(folder: Path) -> None:
    """Shapes that agree with each other, and not with the config."""
    edit_config(folder, num_attention_heads=8)
    with pytest.raises(L4Error, match="needs"):
        load_model(folder)


def test_codes_without_a_config(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    assert "nothing says what that stands for" in refused(folder).why


def test_fp8_without_a_config(hf_text: Path, tmp_path: Path) -> None:
    """Values of fp8 codes alone would load, and be wrong by their scales."""
    folder = quantize(hf_text, tmp_path / "q", WeightFormat("fp8"))
    edit_config(folder, quantization_config=None)
    assert "F8_E4M3" in refused(folder).why


def test_scales_of_activations_and_caches_are_passed_over(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "q"))
    more = {
        f"{Q_PROJ}.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    edit(folder, lambda tensors: tensors.update(more))
    expected, found = load_model(whole).state_dict(), load_model(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_scale_for_all(hf_text: Path, tmp_path: Path) -> None:
    """Published fp8 may have a single scale a tensor."""
    folder = quantize(hf_text, tmp_path / "q", WeightFormat("fp8"))
    edit(folder, change(f"{Q_PROJ}.weight_scale", lambda t: t.float().amax().reshape(1)))
    weight = read_quantized(open_weights(folder), Q_PROJ)
    assert weight.scale.shape == (64, 1)
    assert torch.equal(weight.dequantize(), weight.codes.float() * weight.scale[0, 0])
