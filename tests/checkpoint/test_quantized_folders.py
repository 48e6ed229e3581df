"""Quantized folders both ways, with transformers and compressed-tensors as the oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from quantized_folders import (
    from_transformers,
    logits,
    picture_input,
    publish,
    quantize,
    text_input,
    unfused,
)
from safetensors.torch import load_file

from l4cli.checkpoint import (
    describe_checkpoint,
    load_model,
    open_weights,
    quantized_names,
    read_quantized,
    verify_manifest,
)
from l4cli.quantization import WeightFormat, round_weight

pytest.importorskip("compressed_tensors")
pytest.importorskip("transformers")

INT4 = WeightFormat("int4", 32)
FORMATS = [
    INT4,
    WeightFormat("int8"),
    WeightFormat("int8", 32),
    WeightFormat("fp8"),
]
MIXED = {
    "attention": WeightFormat("int8"),
    "experts": INT4,
    "shared": WeightFormat("fp8"),
    "dense": WeightFormat("int4", 64),
    "lm-head": WeightFormat("int8", 32),
    "vision": WeightFormat("int8", 16),
}


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_transformers_opens_it_with_our_logits(
    format: WeightFormat, hf_text: Path, tmp_path: Path
) -> None:
    folder = quantize(hf_text, tmp_path / "q", format)
    theirs, ours = (
        from_transformers(folder, "Llama4ForCausalLM"),
        load_model(folder, dtype=torch.float32),
    )
    ids = text_input()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-4, rtol=0)
    # What was lost is there to see: a folder that kept its weights would pass otherwise.
    assert (logits(ours, ids) - logits(load_model(hf_text), ids)).abs().max() > 1e-2


@pytest.mark.parametrize("formats", [INT4, MIXED], ids=["int4", "mixed"])
def test_pictures_in_shards(formats: Any, hf_pictures: Path, tmp_path: Path) -> None:
    folder = quantize(hf_pictures, tmp_path / "q", formats, max_shard_bytes=150_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    theirs = from_transformers(folder, "Llama4ForConditionalGeneration")
    ids, pixels = picture_input()
    ours = logits(load_model(folder, dtype=torch.float32), ids, pixels)
    torch.testing.assert_close(ours, logits(theirs, ids, pixels), atol=1e-4, rtol=0)
    assert not verify_manifest(folder)


def test_blocks_of_fp8(tmp_path: Path) -> None:
    """128 x 128 blocks, ragged ones at the edge of 192 outputs."""
    wide = {"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256}
    model = oracle.text_oracle(**wide, head_dim=48, interleave_moe_layer_step=2)
    model.save_pretrained(tmp_path / "source")
    folder = quantize(tmp_path / "source", tmp_path / "q", WeightFormat("fp8", block=(128, 128)))
    stored = open_weights(folder)
    assert read_quantized(stored, "model.layers.0.self_attn.q_proj").scale.shape == (2, 1)
    # 192 inputs are no whole blocks.
    assert "model.layers.0.self_attn.o_proj" not in quantized_names(stored)
    ids = text_input()
    theirs = logits(from_transformers(folder, "Llama4ForCausalLM"), ids)
    ours = logits(load_model(folder, dtype=torch.float32), ids)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("searches", [False, True])
def test_every_tensor_is_what_it_should_be(
    searches: bool, hf_pictures: Path, tmp_path: Path
) -> None:
    """Codes are those of each unfused weight alone; the rest bf16, norms and routers as before."""
    folder = quantize(hf_pictures, tmp_path / "q", INT4, searches=searches)
    stored, model = open_weights(folder), load_model(folder, dtype=torch.float32)
    loaded = unfused(model.state_dict())
    names = set(quantized_names(stored))
    for key, weight in unfused(load_model(hf_pictures).state_dict()).items():
        name = key.removesuffix(".weight")
        is_map = any(word in key for word in ("language_model.model.layers", "lm_head"))
        is_map = is_map and "norm" not in key and "router" not in key and "lm_head" not in key
        assert (name in names) == is_map, key
        if is_map:
            expected = round_weight(weight, INT4, searches=searches)
            found = read_quantized(stored, name)
            assert found.format == INT4
            assert torch.equal(found.codes, expected.codes), key
            assert torch.equal(found.scale, expected.scale), key
            assert torch.equal(loaded[key], expected.dequantize()), key
        else:
            is_exact = weight.ndim == 1 or "router" in key
            expected_values = weight if is_exact else weight.bfloat16().float()
            assert torch.equal(loaded[key], expected_values), key


def test_the_config_is_that_of_published_checkpoints(hf_pictures: Path, tmp_path: Path) -> None:
    config = json.loads((quantize(hf_pictures, tmp_path / "q", INT4) / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"
    assert quantization["quantization_status"] == "compressed"
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == 32
    assert group["input_activations"] is None
    patterns = " ".join(quantization["ignore"])
    assert all(word in patterns for word in ("vision_model", "projector", "lm_head", "router"))
    keys = load_file(tmp_path / "q/model.safetensors")
    expert = "language_model.model.layers.1.feed_forward.experts.3.down_proj"
    assert keys[f"{expert}.weight_packed"].shape == (64, 96 // 8)
    assert keys[f"{expert}.weight_scale"].dtype == torch.bfloat16
    assert keys[f"{expert}.weight_shape"].tolist() == [64, 96]


def test_as_stored_is_bf16(hf_text: Path, tmp_path: Path) -> None:
    folder = quantize(hf_text, tmp_path / "q", INT4)
    model, exact = load_model(folder), load_model(folder, dtype=torch.float32)
    assert model.compute_dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], exact.state_dict()[name].bfloat16())


def test_what_no_group_divides_stays_and_is_listed(tmp_path: Path, hf_text: Path) -> None:
    """128 divides the dense MLP's down_proj alone."""
    folder = quantize(hf_text, tmp_path / "q", WeightFormat("int4", 128))
    assert quantized_names(open_weights(folder)) == [
        f"model.layers.{i}.feed_forward.down_proj" for i in (0, 2, 4)
    ]
    left = json.loads((folder / "quantize.json").read_text())["left"]
    assert "no whole groups of int4 g128" in left["model.layers.1.feed_forward.experts.0.up_proj"]
    ids = text_input()
    theirs = logits(from_transformers(folder, "Llama4ForCausalLM"), ids)
    ours = logits(load_model(folder, dtype=torch.float32), ids)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_unfused_input_gives_the_same_folder(hf_text: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(hf_text, tmp_path / "u", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = unfused(load_file(hf_text / "model.safetensors"))
    save_file(tensors, tmp_path / "u/model.safetensors", metadata={"format": "pt"})
    fused = load_file(quantize(hf_text, tmp_path / "a", INT4) / "model.safetensors")
    again = load_file(quantize(tmp_path / "u", tmp_path / "b", INT4) / "model.safetensors")
    assert fused.keys() == again.keys()
    assert all(torch.equal(fused[key], again[key]) for key in fused)


def scheme(**weights: Any) -> dict[str, Any]:
    return {"dynamic": False, "type": "int", "symmetric": True, **weights}


PUBLISHED = {
    "w4a16": ("pack-quantized", scheme(num_bits=4, strategy="group", group_size=16)),
    "w8a16": ("pack-quantized", scheme(num_bits=8, strategy="channel")),
    "w8a8": ("int-quantized", scheme(num_bits=8, strategy="channel")),
    "fp8": ("float-quantized", scheme(num_bits=8, strategy="channel", type="float")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_reads_what_the_library_writes(name: str, hf_pictures: Path, tmp_path: Path) -> None:
    folder = published(hf_pictures, tmp_path / "p", *PUBLISHED[name])
    theirs = from_transformers(folder, "Llama4ForConditionalGeneration")
    ids, pixels = picture_input()
    ours = load_model(folder, dtype=torch.float32)
    expected = logits(theirs, ids, pixels)
    torch.testing.assert_close(logits(ours, ids, pixels), expected, atol=1e-4, rtol=0)
    # The text half alone, as a text model.
    text = load_model(folder, dtype=torch.float32, config=text_config(folder))
    found = logits(text, ids[:, :2])
    torch.testing.assert_close(found, logits(theirs, ids[:, :2]), atol=1e-4, rtol=0)


def published(source: Path, out: Path, layout: str, weights: dict[str, Any]) -> Path:
    """Experts and shared experts only, the rest ignored by patterns and by name, scales in fp32."""
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": [
            *("re:.*lm_head", "re:.*self_attn.*", "re:.*router.*", "re:.*vision_model.*"),
            "multi_modal_projector.linear_1",
        ],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    if layout == "int-quantized":
        config["config_groups"]["group_0"]["input_activations"] = scheme(
            num_bits=8, strategy="token", dynamic=True
        )
    pattern = r"language_model.*feed_forward\.(shared_expert|experts\.\d+)\.\w+_proj"
    return publish(source, out, config, pattern)


@pytest.mark.parametrize("by_library", [False, True])
def test_zero_points(by_library: bool, hf_pictures: Path, tmp_path: Path) -> None:
    """Their decompress gives our values. (transformers 5.23 itself opens no packed zero points.)"""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    if by_library:
        weights = scheme(num_bits=4, strategy="group", group_size=16, symmetric=False)
        folder = published(hf_pictures, tmp_path / "q", "pack-quantized", weights)
    else:
        format = WeightFormat("int4", 32, symmetric=False)
        folder = quantize(hf_pictures, tmp_path / "q", format, searches=True)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    of_group = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(folder / "model.safetensors")
    ours = unfused(load_model(folder, dtype=torch.float32).state_dict())
    names = quantized_names(open_weights(folder))
    assert len(names) == (75 if by_library else 95)
    for name in names:
        state = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(name + ".")}
        assert "weight_zero_point" in state
        state["weight_scale"] = state["weight_scale"].float()
        theirs = compressor.decompress(state, of_group)["weight"]
        assert torch.equal(ours[f"{name}.weight"], theirs), name


def text_config(folder: Path) -> Any:
    from l4cli.checkpoint import load_config

    config = load_config(folder)
    config.vision = None
    return config


def test_info_says_the_format(hf_pictures: Path, tmp_path: Path) -> None:
    folder = quantize(hf_pictures, tmp_path / "q", MIXED)
    facts = describe_checkpoint(folder)
    for text in ("compressed-tensors", "int4 g32", "int8", "fp8", "int8 g16"):
        assert text in facts["quantization"]
    assert facts["num_stored_values"] == sum(p.numel() for p in load_model(folder).parameters())
    report = json.loads((folder / "quantize.json").read_text())
    assert facts["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert facts["weights_bytes"] == report["size_bytes"] < size
    assert set(MIXED) - {"dense"} <= {p for layer in report["layers"] for p in layer["parts"]}
