"""A model in codes gives what the same model with widened weights gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import picture_prompt
from tiny_llama4 import full_logits, random_ids, text_model, vision_model

from l4cli.checkpoint import (
    load_config,
    load_model,
    open_weights,
    plan_quantization,
    quantize_checkpoint,
    save_model,
)
from l4cli.commands import needle_model
from l4cli.commands.chat_model import coded_plan
from l4cli.data.geometry import PictureGeometry
from l4cli.errors import L4Error
from l4cli.inference import Engine, Request
from l4cli.inference.coded import (
    FEW_ROWS,
    CodedExperts,
    CodedLinear,
    load_coded,
    load_planned,
    plan_coded,
)
from l4cli.ops.batch import Batch
from l4cli.ops.int4_experts import PackedInt4, dequantized, dequantized_map, pack
from l4cli.quantization import RoundingQuantizer, WeightFormat
from l4cli.quantization.packing import unpack_codes

SIZES = {"hidden_size": 128, "intermediate_size": 64, "intermediate_size_mlp": 192, "head_dim": 32}
INT4, WIDE = WeightFormat("int4", 32), WeightFormat("int4", 64)
ZEROS, INT8 = WeightFormat("int4", 32, symmetric=False), WeightFormat("int8")
PARTS = ("attention", "experts", "shared", "dense")
RECIPES = {
    "groups of 32": dict.fromkeys(PARTS, INT4),
    "groups of 64": dict.fromkeys(PARTS, WIDE),
    "zero points": dict.fromkeys(PARTS, ZEROS),
    "int8 experts": {**dict.fromkeys(PARTS, INT4), "experts": INT8},
    "int8 attention, bf16 dense": {"attention": INT8, "experts": INT4, "shared": WIDE},
    "head and router": {**dict.fromkeys(PARTS, INT4), "lm-head": INT4, "router": INT4},
}


def quantized(model, folder: Path, parts, change=lambda choices: None) -> Path:
    geometry = None
    if model.config.vision is not None:
        geometry = PictureGeometry(image_size=16, patch_size=4, pixel_shuffle_ratio=0.5)
    save_model(model, folder / "plain", {}, geometry)
    plan = plan_quantization(folder / "plain", parts)
    change(plan.choices)
    quantize_checkpoint(plan, folder / "codes", RoundingQuantizer())
    return folder / "codes"


def kinds(model) -> dict[str, int]:
    """How many modules are in codes."""
    modules = list(model.modules())
    return {
        cls.__name__: sum(isinstance(m, cls) for m in modules)
        for cls in (CodedLinear, CodedExperts)
    }


@torch.inference_mode()
def decoded(model, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of every position from `first` on, read one by one after a prefill."""
    cache = Engine(model).prefill(ids[:first])
    rows = [cache.logits_V]
    for i in range(first, len(ids)):
        batch = Batch.continuing(ids[None, i : i + 1], torch.tensor([[i]]))
        rows.append(model.lm_head(model.hidden(batch, cache)[0, -1]).float())
        cache.tokens.append(int(ids[i]))
    return torch.stack(rows)


def assert_alike(coded, exact, num_ids: int = FEW_ROWS + 9) -> None:
    """Many tokens at once, few at once, and one by one through a cache."""
    ids = random_ids(num_ids)
    expected = full_logits(exact, ids)
    torch.testing.assert_close(full_logits(coded, ids), expected, atol=1e-4, rtol=1e-4)
    few = full_logits(coded, ids[:20])
    torch.testing.assert_close(few, expected[:20], atol=1e-4, rtol=1e-4)
    for first in (len(ids) - 5, 2):
        found = decoded(coded, ids[: first + 5], first)
        wanted = expected[first - 1 : first + 5]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_it_answers_as_the_widened_values_do(name, top_k, tmp_path):
    folder = quantized(text_model(num_experts_per_tok=top_k, **SIZES), tmp_path, RECIPES[name])
    coded = load_coded(folder, "cpu", torch.float32)
    assert not isinstance(coded, str), coded
    assert coded.compute_dtype == torch.float32
    # Five layers of four maps in attention; two MoE layers with a shared expert, three dense.
    linears = {"int8 experts": 35, "int8 attention, bf16 dense": 6, "head and router": 36}
    experts = 0 if name == "int8 experts" else 2
    assert kinds(coded) == {"CodedLinear": linears.get(name, 35), "CodedExperts": experts}
    assert not any(parameter.is_meta for parameter in coded.parameters())
    assert_alike(coded, load_model(folder, dtype=torch.float32))


def test_maps_of_a_layer_need_not_be_alike(tmp_path):
    """Experts in groups of 32 and 64, with and without zero points; one whose down map is int8."""

    def change(choices):
        choices["model.layers.1.feed_forward.experts.0.up_proj"] = ZEROS
        choices["model.layers.1.feed_forward.experts.2.gate_proj"] = WIDE
        choices["model.layers.1.feed_forward.experts.3.down_proj"] = ZEROS
        choices["model.layers.3.feed_forward.experts.1.down_proj"] = INT8

    folder = quantized(text_model(**SIZES), tmp_path, dict.fromkeys(PARTS, WIDE), change)
    plan = plan_coded(folder)
    assert not isinstance(plan, str)
    assert list(plan.experts) == ["model.layers.1.feed_forward.experts"]
    assert (plan.num_quantized, plan.num_coded) == (35 + 24, 35 + 12)
    assert plan.groups["model.layers.1.feed_forward.experts.gate_up_proj"] == 32
    assert_alike(
        load_planned(plan, torch.device("cpu"), torch.float32),
        load_model(folder, dtype=torch.float32),
    )


def test_a_scale_for_a_whole_row(tmp_path):
    folder = quantized(text_model(**SIZES), tmp_path, dict.fromkeys(PARTS, WeightFormat("int4")))
    coded = load_coded(folder, "cpu", torch.float32)
    assert kinds(coded) == {"CodedLinear": 35, "CodedExperts": 2}
    assert coded.model.layers[0].self_attn.q_proj.packed.group_size == 128
    assert coded.model.layers[1].feed_forward.experts.down.group_size == 64
    assert_alike(coded, load_model(folder, dtype=torch.float32))


def test_generation_in_bf16_and_many_requests(tmp_path):
    """As it runs by default: norms and routers as stored, everything else in bf16."""
    folder = quantized(text_model(**SIZES), tmp_path, dict.fromkeys(PARTS, INT4))
    coded, exact = load_coded(folder, "cpu"), load_model(folder)
    assert coded.compute_dtype == exact.compute_dtype == torch.bfloat16
    for name, parameter in coded.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name))
        assert parameter.dtype == exact.get_parameter(name).dtype
    requests = [Request(random_ids(n), max_new_tokens=6) for n in (1, 9, FEW_ROWS + 7)]
    answers = [
        [(event.request, event.token) for event in Engine(model).generate(requests)]
        for model in (coded, exact)
    ]
    assert answers[0] == answers[1]


def test_pictures(tmp_path):
    folder = quantized(vision_model(), tmp_path, {"attention": INT4, "vision": INT4})
    coded, exact = load_coded(folder, "cpu", torch.float32), load_model(folder, dtype=torch.float32)
    assert kinds(coded)["CodedLinear"] > 20
    assert any(isinstance(m, CodedLinear) and m.bias is not None for m in coded.modules())
    ids, pixels = picture_prompt()
    torch.testing.assert_close(
        Engine(coded).prefill(ids, pixels).logits_V,
        Engine(exact).prefill(ids, pixels).logits_V,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_one_map_widened_is_that_of_all(has_zero, scale_dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (3, 100, 128), generator=generator).to(torch.int8)
    scale = torch.rand(3, 100, 2, generator=generator).to(scale_dtype)
    zero = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8)
    packed = pack(codes, scale, zero if has_zero else None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = dequantized(packed, dtype)
        for expert in range(3):
            assert torch.equal(dequantized_map(packed, expert, dtype), whole[expert].T)


def test_the_size_is_that_of_the_tensors(tmp_path):
    """Counted from headers before anything is read, and room for the largest map."""
    folder = quantized(text_model(**SIZES), tmp_path, RECIPES["zero points"])
    plan = plan_coded(folder)
    model = load_planned(plan, torch.device("cpu"))
    held = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        for packed in vars(module).values():
            if isinstance(packed, PackedInt4):
                held += packed.codes.nbytes + packed.scale.nbytes + packed.zero.nbytes
    largest = 192 * 128  # of the dense layers; an expert's gate and up are 128 x 128
    assert plan.size_bytes == held + 6 * largest
    assert held < 1.2 * open_weights(folder).size_bytes


def test_why_not(tmp_path, capsys):
    folder = quantized(text_model(**SIZES), tmp_path, dict.fromkeys(PARTS, INT8))
    assert "none of its maps is int4" in load_coded(folder, "cpu")
    config = load_model(folder).config
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert coded_plan(folder, config, cuda, "auto") is None
    assert "widened to bf16: none of its maps is int4" in capsys.readouterr().err
    assert coded_plan(folder, config, cpu, "auto") is None
    assert coded_plan(tmp_path / "plain", config, cuda, "auto") is None
    assert capsys.readouterr().err == ""
    assert coded_plan(folder, config, cuda, "fp32") is None
    assert "widened to fp32, as `--dtype` says" in capsys.readouterr().err


def test_what_runs_is_said(tmp_path, capsys):
    folder = quantized(text_model(**SIZES), tmp_path, RECIPES["int8 experts"])
    config = load_model(folder).config
    plan = coded_plan(folder, config, torch.device("cuda"), "auto")
    assert plan.num_coded == 35
    said = capsys.readouterr().err
    assert "35 int4 maps are computed from their codes (" in said
    assert "; 24 maps in other formats are widened to bf16" in said


def test_codes_out_of_range(tmp_path):
    """Stored one by one they could be anything: packing would spill them into their neighbours."""
    folder = quantized(text_model(**SIZES), tmp_path, {"attention": INT4})
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj"
    codes = unpack_codes(tensors.pop(f"{name}.weight_packed"), 4, 128)
    for worst in (-8, 8):
        codes[3, 5] = worst
        save_file({**tensors, f"{name}.weight": codes}, path)
        if worst == -8:
            coded, exact = load_coded(folder, "cpu", torch.float32), load_model(folder)
            weight = exact.get_parameter(f"{name}.weight")
            packed = coded.get_submodule(name).packed
            assert torch.equal(dequantized_map(packed, 0, torch.bfloat16), weight)
        else:
            with pytest.raises(L4Error, match="cannot load quantized checkpoint") as error:
                load_coded(folder, "cpu")
            assert name in error.value.why


def test_the_needle_test_goes_the_same_way(tmp_path):
    folder = quantized(text_model(**SIZES), tmp_path, RECIPES["groups of 32"])
    config = load_config(folder)

    def planned(device="cuda", dtype="auto", **options):
        place = torch.device(device)
        return needle_model.TestedModel(folder, config, None, place, dtype, **options).coded

    assert planned().num_coded == 59
    assert planned().config is config  # `--set` may have changed it
    assert planned(layer_major=True) is None
    assert planned(dtype="fp32") is None
    assert planned("cpu") is None
