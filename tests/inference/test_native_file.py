"""The file of laid out weights: made from plain and quantized checkpoints, noticed when stale."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_engine import picture_prompt
from tiny_llama4 import full_logits, random_ids, text_model, vision_model

import src_kernels.cpu as kernels
from l4cli.checkpoint import (
    load_config,
    load_model,
    plan_quantization,
    quantize_checkpoint,
    save_model,
    verify_manifest,
)
from l4cli.checkpoint.headers import read_header
from l4cli.checkpoint.manifest import KERNELS
from l4cli.data.geometry import PictureGeometry
from l4cli.errors import L4Error
from l4cli.inference import Engine, Request, kernel_blobs
from l4cli.inference.kernel_file import PAGE, is_current, open_file
from l4cli.inference.native import NativeModel, instructions, why_not
from l4cli.inference.native_loading import (
    _without_file,
    find_native,
    make_file,
    native_from_model,
    native_from_plain,
    open_native,
)
from l4cli.ops.weight_only import dequantize
from l4cli.quantization import QuantizedWeight, RoundingQuantizer, WeightFormat

INT4 = WeightFormat("int4", 32)
FORMATS = {
    "int4": INT4,
    "int4 zp": WeightFormat("int4", 32, symmetric=False),
    "int8": WeightFormat("int8"),
    "int8 groups": WeightFormat("int8", 32),
    "fp8": WeightFormat("fp8"),
}


@pytest.fixture(autouse=True)
def _needs_the_library():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


def saved(model, folder: Path) -> Path:
    geometry = None
    if model.config.vision is not None:
        geometry = PictureGeometry(image_size=16, patch_size=4, pixel_shuffle_ratio=0.5)
    save_model(model, folder, {}, geometry)
    return folder


def quantized(model, folder: Path, format: WeightFormat = INT4) -> Path:
    """A quantized checkpoint; maps of 48 inputs have no groups of 32 and stay as they are."""
    source = saved(model, folder.with_name("source"))
    parts = dict.fromkeys(("attention", "experts", "shared", "dense"), format)
    quantize_checkpoint(plan_quantization(source, parts), folder, RoundingQuantizer())
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_checkpoint_answers_as_its_values_do(name, tmp_path):
    folder = quantized(text_model(), tmp_path / "model", FORMATS[name])
    native = find_native(folder, load_config(folder))
    assert not isinstance(native, str), native
    exact = load_model(folder, dtype=torch.float32)
    ids = random_ids(40)
    expected = full_logits(exact, ids)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    found = Engine(native).score(ids)
    # Inputs are rounded to int8 by 32, keys to bf16, the head to int8 by row: about 1e-2 each.
    assert float((found - expected).abs().mean()) < 0.04
    # Neither side's rounding depends on how many tokens are read at once.
    alone = [Engine(native).prefill(ids[:n]).logits_V for n in (9, 23)]
    cache = Engine(native).prefill(ids[:9])
    torch.testing.assert_close(cache.logits_V, alone[0])
    Engine(native).prefill(ids[9:23], cache=cache, chunk_size=1)
    torch.testing.assert_close(cache.logits_V, alone[1], atol=0.1, rtol=0.1)


def test_codes_are_kept_exactly(tmp_path):
    folder = quantized(text_model(), tmp_path / "model")
    native = find_native(folder, load_config(folder))
    assert not isinstance(native, str), native
    values = load_model(folder, dtype=torch.float32).state_dict()
    for name, key in (("0.q_proj", "self_attn.q_proj"), ("2.o_proj", "self_attn.o_proj")):
        ((layout, packed),) = native.weights.weight_bytes(name)
        assert layout.kind == "int4"
        stored = values[f"model.layers.{name[0]}.{key}.weight"]
        assert torch.equal(dequantize(packed, layout), stored)
    gate, up, down = native.weights.weight_bytes("3.experts.2")
    fused = values["model.layers.3.feed_forward.experts.gate_up_proj"][2]
    assert torch.equal(torch.cat([dequantize(packed, how) for how, packed in (gate, up)]), fused.T)
    stored = values["model.layers.3.feed_forward.experts.down_proj"][2]
    assert torch.equal(dequantize(down[1], down[0]), stored.T)
    assert (gate[0].kind, down[0].kind) == ("int4", "bf16")


def test_the_file_is_safetensors_in_pages(tmp_path):
    folder = saved(text_model(), tmp_path / "model")
    make_file(folder)
    with safe_open(folder / KERNELS, "pt") as file:
        assert "3.experts.0" in file.keys()  # noqa: SIM118
        assert file.metadata()["format"] == "l4-kernels-1"
    size = 8 + int.from_bytes((folder / KERNELS).read_bytes()[:8], "little")
    assert size % PAGE == 0
    assert all(entry.start % PAGE == 0 for entry in read_header(folder / KERNELS).tensors.values())
    assert verify_manifest(folder) == []
    config = load_config(folder)
    found = [Engine(m).prefill(random_ids(20)).logits_V for m in both_ways(folder, config)]
    assert torch.equal(*found)


def both_ways(folder: Path, config):
    """Read into memory, and mapped with experts asked for when they are chosen."""
    for is_mapped in (False, True):
        weights = open_file(folder / KERNELS, is_mapped=is_mapped)
        yield NativeModel(weights, config, is_prefetched=is_mapped)


def test_a_stale_file_is_made_anew(tmp_path):
    folder = quantized(text_model(seed=0), tmp_path / "model")
    config = load_config(folder)
    first = find_native(folder, config)
    assert not isinstance(first, str)
    assert is_current(folder / KERNELS, config, folder)
    stamp = (folder / KERNELS).stat().st_mtime_ns
    assert not isinstance(find_native(folder, config), str)
    assert (folder / KERNELS).stat().st_mtime_ns == stamp
    other = quantized(text_model(seed=1), tmp_path / "others" / "model")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    assert not is_current(folder / KERNELS, config, folder)
    second = find_native(folder, config)
    assert not isinstance(second, str)
    assert second.model_id == Engine(load_model(folder)).model_id != first.model_id


def test_a_file_that_is_none(tmp_path):
    folder = quantized(text_model(), tmp_path / "model")
    config = load_config(folder)
    make_file(folder)
    whole = (folder / KERNELS).read_bytes()
    (folder / KERNELS).write_bytes(whole[:-PAGE])
    assert not is_current(folder / KERNELS, config, folder)
    with pytest.raises(L4Error):
        open_native(folder, config)
    (folder / KERNELS).write_bytes(b"none")
    assert not isinstance(find_native(folder, config), str)
    assert (folder / KERNELS).read_bytes() == whole


def test_writing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = saved(text_model(), tmp_path / "model")

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_blobs, "lay_out_values", broken)
    with pytest.raises(L4Error, match="cannot write"):
        make_file(folder)
    assert not list((folder / "l4").glob("*kernels*"))


def test_plain_weights_are_torchs(tmp_path):
    folder = saved(text_model(), tmp_path / "model")
    assert find_native(folder, load_config(folder)) == "its weights are not quantized"
    make_file(folder)
    native = find_native(folder, load_config(folder))
    assert not isinstance(native, str)
    expected = full_logits(load_model(folder), random_ids(30))[-1]
    found = Engine(native).prefill(random_ids(30)).logits_V
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0.1)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_plain_weights_in_memory(dtype, allowed, tmp_path):
    if instructions() == "portable":
        pytest.skip("they are torch's without vector instructions")
    folder = saved(vision_model(), tmp_path / "model")
    model = load_model(folder, dtype=dtype)
    size = sum(weight.nbytes for weight in model.language_model.parameters())
    native = native_from_plain(model)
    assert not isinstance(native, str), native
    assert not (folder / KERNELS).exists()
    # What is laid out is not kept twice.
    assert all(weight.is_meta for weight in model.language_model.parameters())
    assert native.weights.size_bytes < 4 * size + 2**20
    ids, pixels = picture_prompt()
    expected = full_logits(load_model(folder, dtype=torch.float32), ids, pixels)[-1]
    found = Engine(native).prefill(ids, pixels).logits_V
    torch.testing.assert_close(found, expected, atol=allowed, rtol=allowed)


def test_what_stays_in_torch(monkeypatch):
    isa = kernels.load().l4_cpu_isa()
    kernels.load().l4_cpu_use_isa(b"portable")
    try:
        assert "vector instructions" in str(native_from_plain(text_model()))
    finally:
        kernels.load().l4_cpu_use_isa(isa)
    if isa == b"portable":
        return
    half = text_model()
    half.compute_dtype = torch.float16
    assert native_from_plain(half) == "it computes neither in fp32 nor in bf16"
    monkeypatch.setattr("l4cli.inference.native_loading.MOST_PLAIN_BYTES", 1 << 10)
    assert "l4 quantize" in str(native_from_plain(text_model()))


def with_scales(folder: Path, change) -> Path:
    """Change the scales of all codes in a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensors[name] = change(tensor)
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_scales_that_no_kernel_has_are_left_to_others(tmp_path):
    folder = quantized(text_model(), tmp_path / "model")
    with_scales(folder, lambda scale: (scale.float() * 1.001).half())
    config = load_config(folder)
    assert "scales of groups in bf16" in str(find_native(folder, config))
    assert not list((folder / "l4").glob("*kernels*"))
    native = native_from_plain(load_model(folder))  # as `l4 chat` goes on
    if isinstance(native, str):
        pytest.skip(native)
    ids = random_ids(20)
    expected = full_logits(load_model(folder, dtype=torch.float32), ids)[-1]
    torch.testing.assert_close(Engine(native).prefill(ids).logits_V, expected, atol=0.15, rtol=0.1)


@pytest.mark.parametrize(
    ("kind", "group_size", "has_zero", "dtype", "laid_out_as"),
    [
        ("int4", 256, False, torch.bfloat16, ("int4", 128)),
        ("int4", 256, True, torch.bfloat16, ("int4", 128)),
        ("int4", 96, True, torch.bfloat16, ("int4", 32)),
        ("int4", 768, False, torch.bfloat16, ("int4", 128)),
        ("int4", 768, False, torch.float16, ("int8", 0)),
        ("int8", 192, False, torch.bfloat16, ("int8", 64)),
        ("int8", 768, False, torch.float32, ("int8", 0)),
    ],
)
def test_other_groups_are_laid_out_exactly(kind, group_size, has_zero, dtype, laid_out_as):
    make = torch.Generator().manual_seed(0)
    top = 8 if kind == "int4" else 128
    codes = torch.randint(-top, top, (20, 768), generator=make).to(torch.int8)
    scale = torch.rand(20, 768 // group_size, generator=make).to(dtype)
    zero = torch.randint(-8, 8, scale.shape, generator=make).to(torch.int8) if has_zero else None
    format = WeightFormat(kind, group_size, symmetric=not has_zero)
    weight = QuantizedWeight(format, codes, scale, zero)
    layout, packed = kernel_blobs.laid_out(weight)
    assert (layout.kind, layout.group_size) == laid_out_as
    assert torch.equal(dequantize(packed, layout), weight.dequantize())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    folder = quantized(text_model(), tmp_path / "model")
    config = load_config(folder)
    expected = Engine(find_native(folder, config)).prefill(random_ids(9)).logits_V
    shutil.rmtree(folder / "l4")
    if os.geteuid() == 0:  # who may write anywhere
        native = _without_file(folder, config)
    else:
        folder.chmod(0o555)
        native = find_native(folder, config)
        folder.chmod(0o755)
    assert not isinstance(native, str)
    assert not (folder / KERNELS).exists()
    assert torch.equal(Engine(native).prefill(random_ids(9)).logits_V, expected)


def test_pictures_of_a_quantized_checkpoint(tmp_path):
    folder = quantized(vision_model(), tmp_path / "model")
    native = find_native(folder, load_config(folder))
    assert not isinstance(native, str)
    exact = load_model(folder, dtype=torch.float32)
    ids, pixels = picture_prompt()
    with torch.inference_mode():
        expected = exact(ids[None], pixels)[0].log_softmax(-1)[:-1]
    expected = expected.gather(1, ids[1:, None])[:, 0]
    found = Engine(native).score(ids, pixels)
    assert float((found - expected).abs().mean()) < 0.04
    shapes = [p.is_meta for n, p in native.vision.named_parameters() if "vision" not in n]
    assert all(shapes[1:])  # the text half has no weights in torch


def test_rounding_a_model_in_memory():
    model = text_model(intermediate_size=64)
    native = native_from_model(model, lambda name: INT4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                rounded = [kernel_blobs.round_weight(w, INT4).dequantize() for w in _maps(weight)]
                weight.copy_(_joined(weight, rounded))
    ids = random_ids(30)
    expected = Engine(model).score(ids)
    assert float((Engine(native).score(ids) - expected).abs().mean()) < 0.04
    tokens = [e.token for e in Engine(native).generate([Request(ids, max_new_tokens=4)])]
    assert len(tokens) == 4


def _maps(weight):
    return [weight] if weight.ndim == 2 else list(weight.transpose(1, 2))


def _joined(weight, parts):
    return parts[0] if weight.ndim == 2 else torch.stack(parts).transpose(1, 2)


def test_metadata_say_what_it_was_made_from(tmp_path):
    folder = saved(text_model(), tmp_path / "model")
    make_file(folder)
    metadata = read_header(folder / KERNELS).metadata
    assert metadata["model_id"] == Engine(load_model(folder)).model_id
    layouts = json.loads(metadata["layouts"])
    assert layouts["head"][0]["kind"] == "int8"
    assert layouts["0.q_proj"][0]["kind"] == "fp32"
