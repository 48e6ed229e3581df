"""Calibration: the inputs each map really gets, seen by hooks on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama4 import random_ids, text_model, vision_model
from torch import Tensor, nn

from l4cli.checkpoint import load_model, plan_quantization, quantize_checkpoint, save_model
from l4cli.inference.calibration import CalibratedQuantizer
from l4cli.inference.calibration_walk import CalibrationWalk
from l4cli.inference.text_walk import TextWalk
from l4cli.ops.batch import Batch, Segments
from l4cli.quantization import RoundingQuantizer, WeightFormat
from l4cli.quantization.hessian import Hessian
from l4cli.text import load_tokenizer

FORMAT = WeightFormat("int4", 16)
PARTS = dict.fromkeys(("attention", "experts", "shared", "dense"), FORMAT)
DENSE = [f"{m}_proj" for m in ("gate", "up", "down")]


def batches(num_rows: int = 6, padded: int = 5) -> list[Batch]:
    """Rows of two documents and some padding, in batches of two rows."""
    found = []
    for seed in range(num_rows // 2):
        ids = random_ids(2 * 40, seed).view(2, 40)
        documents = torch.ones(2, 40, dtype=torch.int32)
        documents[:, 17:] = 2
        documents[1, 40 - padded :] = 0
        positions = torch.arange(40).expand(2, 40).clone()
        positions[:, 17:] -= 17
        weight = torch.zeros(2, 40)
        segments = Segments.from_document_ids(documents, 8)
        found.append(Batch(ids, ids, weight, documents, positions, segments))
    return found


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(tmp_path / "model", text_model())


def save(folder: Path, model: nn.Module) -> Path:
    save_model(model, folder, load_tokenizer("bytes").files())
    return folder


def heard(model: nn.Module, places: list[str], data: list[Batch]) -> dict[str, Hessian]:
    """What hooks on the whole model hear; experts as a plain loop over tokens and choices."""
    hessians: dict[str, Hessian] = {}
    is_real_M = torch.zeros(0)

    def add(name: str, x_MI: Tensor) -> None:
        hessians.setdefault(name, Hessian(x_MI.shape[-1])).add(x_MI)

    def on_linear(name: str):
        return lambda _, given: add(name, given[0].flatten(0, -2)[is_real_M])

    def on_experts(name: str):
        def hear(module, given) -> None:
            x_MD, gate_MA, expert_MA = given
            for m in is_real_M.nonzero().flatten().tolist():
                e = int(expert_MA[m, 0])
                x_D = x_MD[m] * gate_MA[m, 0]
                gate_F, up_F = (x_D @ module.gate_up_proj[e]).chunk(2)
                for proj in ("gate_proj", "up_proj"):
                    add(f"{name}.{e}.{proj}", x_D[None])
                add(f"{name}.{e}.down_proj", (torch.nn.functional.silu(gate_F) * up_F)[None])

        return hear

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(on_experts(name))
        elif name.endswith("_proj"):
            module.register_forward_pre_hook(on_linear(name))
    with torch.no_grad():
        for batch in data:
            is_real_M = batch.document_ids.flatten() != 0
            model.hidden(batch)
    assert set(places) <= set(hessians)
    return hessians


def names_of_layer(model: nn.Module, layer_idx: int) -> list[str]:
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    if not model.model.layers[layer_idx].is_moe:
        return attention + [f"feed_forward.{name}" for name in DENSE]
    names = attention + [f"feed_forward.shared_expert.{name}" for name in DENSE]
    return names + [f"feed_forward.experts.{e}.{name}" for e in range(4) for name in DENSE]


def test_each_map_is_shown_its_inputs(checkpoint) -> None:
    model, data = load_model(checkpoint), batches()
    with TextWalk(checkpoint, data) as walk:
        stages = CalibrationWalk(walk, min_tokens=0)
        ours = {
            f"model.layers.{i}.{place}": hessian
            for i in range(5)
            for places, hessian in stages.layer(i, names_of_layer(model, i))
            for place in places
        }
        head = stages.head()
    used = {each.expert for each in stages.coverage if each.num_tokens}
    expected = heard(model, [], data)
    for name, hessian in expected.items():
        assert ours[name].num_tokens == hessian.num_tokens
        torch.testing.assert_close(ours[name].matrix, hessian.matrix, rtol=1e-4, atol=1e-4)
    unheard = [name for name in ours if name not in expected]
    assert all(ours[name].num_tokens == 0 for name in unheard)
    assert used
    with torch.no_grad():
        h_MD = torch.cat(
            [model.hidden(b).flatten(0, 1)[b.document_ids.flatten() != 0] for b in data]
        )
    torch.testing.assert_close(head.matrix, h_MD.T @ h_MD, rtol=1e-4, atol=1e-3)


def test_experts_with_few_tokens_borrow_the_next_best(checkpoint) -> None:
    data = batches()
    num_real = sum(int((b.document_ids != 0).sum()) for b in data)
    with TextWalk(checkpoint, data) as walk:
        stages = CalibrationWalk(walk, min_tokens=100)
        wanted = [f"feed_forward.experts.{e}.gate_proj" for e in range(4)]
        found = [hessian.num_tokens for _, hessian in stages.layer(1, wanted)]
    alone = {e: 0 for e in range(4)}
    model = load_model(checkpoint)
    scores: list[Tensor] = []
    model.model.layers[1].feed_forward.router.register_forward_hook(
        lambda _, __, out: scores.append(out)
    )
    with torch.no_grad():
        for batch in data:
            model.hidden(batch)
    is_real_M = torch.cat([b.document_ids.flatten() != 0 for b in data])
    scores_ME = torch.cat(scores)[is_real_M]
    for e in scores_ME.argmax(dim=1).tolist():
        alone[e] += 1
    assert found == [max(100, count) for count in alone.values()]
    assert min(alone.values()) < 100
    for each in stages.coverage:
        assert each.num_borrowed == max(0, 100 - alone[each.expert])
    # Those borrowed are the best scored of the others.
    assert num_real == len(scores_ME)
    e = min(alone, key=alone.__getitem__)
    with TextWalk(checkpoint, data) as walk:
        stages = CalibrationWalk(walk, min_tokens=100)
        routed_M = torch.zeros(len(is_real_M), dtype=torch.bool)
        all_ME = torch.cat(scores)
        routed_M[is_real_M] = all_ME[is_real_M].argmax(dim=1) == e
        chosen = stages._tokens_for(all_ME[:, e], routed_M)
    others = [m for m in range(len(is_real_M)) if is_real_M[m] and not routed_M[m]]
    best = sorted(others, key=lambda m: -float(all_ME[m, e]))[: 100 - alone[e]]
    assert sorted(chosen.tolist()) == sorted(routed_M.nonzero().flatten().tolist() + best)


def test_later_stages_see_what_replaced_the_earlier(checkpoint) -> None:
    data = batches(2)
    with TextWalk(checkpoint, data) as walk:
        stages = CalibrationWalk(walk)
        for places, hessian in stages.layer(0, ["self_attn.v_proj", "self_attn.o_proj"]):
            if places == ["self_attn.v_proj"]:
                stages.replace(0, places[0], torch.zeros(16, 32))
            else:
                assert float(hessian.matrix.abs().max()) == 0


@pytest.mark.parametrize("make", [text_model, vision_model])
def test_quantized_states_are_those_of_the_written_checkpoint(tmp_path, make) -> None:
    model, data = make(), batches()
    with torch.no_grad():  # what stays plain is written as bf16: let it lose nothing
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    source = save(tmp_path / "model", model)
    plan = plan_quantization(source, PARTS)
    with TextWalk(source, data) as walk:
        quantizer = CalibratedQuantizer(CalibrationWalk(walk, min_tokens=64))
        quantize_checkpoint(plan, tmp_path / "int4", quantizer)
        ours = walk.hidden_MD.clone()
    with TextWalk(tmp_path / "int4", data, dtype=torch.float32) as walk:
        for i in range(5):
            walk.pass_layer(i)
        torch.testing.assert_close(ours, walk.hidden_MD, rtol=1e-5, atol=1e-4)
    assert set(quantizer.errors) == set(plan.choices)
    report = quantizer.report()
    assert report["calibration_tokens"] == 6 * 40 - 3 * 5
    assert {(each["layer"], each["expert"]) for each in report["coverage"]} == {
        (layer, e) for layer in (1, 3) for e in range(4)
    }


def test_outputs_lose_less_than_by_rounding(tmp_path, checkpoint) -> None:
    data = batches(12)
    plan = plan_quantization(checkpoint, PARTS)
    with TextWalk(checkpoint, data) as walk:
        quantizer = CalibratedQuantizer(CalibrationWalk(walk))
        quantize_checkpoint(plan, tmp_path / "gptq", quantizer)
    quantize_checkpoint(plan, tmp_path / "round", RoundingQuantizer(searches=True))
    model = load_model(checkpoint)

    @torch.no_grad()
    def loss(folder: Path) -> float:
        other = load_model(folder, dtype=torch.float32)
        return sum(float((model.hidden(b) - other.hidden(b)).square().mean()) for b in data)

    assert loss(tmp_path / "gptq") < 0.8 * loss(tmp_path / "round")


def test_states_may_lie_in_a_file(tmp_path, checkpoint) -> None:
    data = batches(2)
    with TextWalk(checkpoint, data, states=tmp_path / "states") as walk:
        assert (tmp_path / "states").stat().st_size == 80 * 32 * 4
        walk.pass_layer(0)
        mapped = walk.hidden_MD.clone()
    assert not (tmp_path / "states").exists()
    with TextWalk(checkpoint, data) as walk:
        walk.pass_layer(0)
        assert torch.equal(walk.hidden_MD, mapped)


def test_one_layer_is_here_at_a_time(checkpoint) -> None:
    with TextWalk(checkpoint, batches(2)) as walk:
        stages = CalibrationWalk(walk)
        for layer_idx in (0, 3):
            wanted = names_of_layer(walk.model, layer_idx)
            for _ in stages.layer(layer_idx, wanted):
                here = {
                    i
                    for i, layer in enumerate(walk.text.layers)
                    if not all(weight.is_meta for weight in layer.parameters())
                }
                assert here == {layer_idx}
        stages.finish()
        assert all(weight.is_meta for weight in walk.text.layers.parameters())
