"""A student cut from a teacher: what was not needed leaves no trace, and what cannot be is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l4cli.checkpoint import plan_quantization, quantize_checkpoint, save_model
from l4cli.checkpoint.parameters import ParameterReader
from l4cli.errors import UsageError
from l4cli.model import Llama4Config, TextConfig, VisionConfig, build_model
from l4cli.ops.batch import Batch
from l4cli.quantization import RoundingQuantizer, WeightFormat
from l4cli.training.cut_choice import Neurons, choose_heads, group_experts, strongest
from l4cli.training.cut_plan import CutOptions, plan_cut
from l4cli.training.residual_basis import principal_basis, state_moments
from l4cli.training.student_cut import ModelWeights, cut_weights

IDS = torch.randint(3, 64, (2, 21), generator=torch.Generator().manual_seed(7))


def config_of(vision: VisionConfig | None = None, **keys: Any) -> Llama4Config:
    text = TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        intermediate_size_mlp=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-12,  # so that zero channels can be cut without a trace
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return Llama4Config(text=dataclasses.replace(text, **keys), vision=vision)


def tiny_vision(**keys: Any) -> VisionConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    dims = ("vision_output_dim", "projector_input_dim", "projector_output_dim")
    return VisionConfig(**{**sizes, **dict.fromkeys(dims, 24), **keys})


def teacher_of(config: Llama4Config) -> Any:
    """Norm weights other than one, so that a cut that forgets them is seen."""
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return model


def cut(teacher: Any, config: Llama4Config, **options: Any) -> Any:
    student = build_model(config, seed=5)
    plan = plan_cut(teacher.config, config, CutOptions(**options))
    cut_weights(student, ModelWeights(teacher), plan)
    return student


def logits(model: Any, pixels: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        ids = IDS if pixels is None else torch.where(IDS == 9, 8, IDS)
        if pixels is not None:
            ids[0, :4] = 9
        out: Tensor = model(ids) if pixels is None else model(ids, pixels)
    return out


def assert_alike(student: Any, teacher: Any) -> None:
    assert torch.isfinite(logits(teacher)).all()
    assert torch.allclose(logits(student), logits(teacher), rtol=1e-4, atol=1e-6)


def test_the_same_shape_is_a_copy() -> None:
    for experts in ("merge", "drop"):
        teacher = teacher_of(config_of(scalable_softmax=True, attn_temperature_tuning=False))
        student = cut(teacher, teacher.config, experts=experts)
        for name, weight in teacher.named_parameters():
            assert torch.equal(student.get_parameter(name), weight), name
        assert torch.equal(logits(student), logits(teacher))


def test_the_same_shape_with_vision_is_a_copy_and_without_it_drops_it() -> None:
    teacher = teacher_of(dataclasses.replace(config_of(tiny_vision()), image_token_index=9))
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    student = cut(teacher, teacher.config)
    assert torch.equal(logits(student, pixels), logits(teacher, pixels))
    assert torch.equal(logits(cut(teacher, config_of())), logits(teacher))


@torch.no_grad()
def silence_channels(teacher: Any, gone: Tensor) -> None:
    """No part of the model writes these channels or reads them."""
    text = getattr(teacher, "language_model", teacher)
    for name, weight in text.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[gone] = 0
        elif name.endswith("experts.down_proj"):
            weight[:, :, gone] = 0
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight[:, gone] = 0
    if text is not teacher:
        teacher.multi_modal_projector["linear_1"].weight[gone] = 0


def test_channels_that_are_zero_leave_no_trace() -> None:
    config = dataclasses.replace(config_of(tiny_vision()), image_token_index=9)
    teacher = teacher_of(config)
    kept = torch.randperm(32, generator=torch.Generator().manual_seed(2))[:20]
    gone = torch.ones(32, dtype=torch.bool).index_fill(0, kept, False)
    silence_channels(teacher, gone)
    narrow = dataclasses.replace(config, text=dataclasses.replace(config.text, hidden_size=20))
    student = cut(teacher, narrow)
    assert_alike(student, teacher)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(logits(student, pixels), logits(teacher, pixels), rtol=1e-4, atol=1e-6)


def test_directions_that_no_state_has_leave_no_trace() -> None:
    """States that lie in a plane askew to all channels: only the states themselves show it."""
    teacher = teacher_of(config_of())
    basis_DX = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(2))).Q
    within_DD = basis_DX @ basis_DX.T
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.copy_(within_DD @ weight)
            elif name.endswith(("embed_tokens.weight", "experts.down_proj")):
                weight.copy_(weight @ within_DD)
    document_ids = torch.ones(IDS.shape, dtype=torch.int32)
    document_ids[:, 17:] = 0
    batch = dataclasses.replace(Batch.from_tokens(IDS, None, 8), document_ids=document_ids)
    moments_DD = state_moments(teacher, [batch, batch])
    assert moments_DD.trace().item() == pytest.approx(1)
    assert torch.allclose(within_DD @ moments_DD, moments_DD, atol=1e-6)
    narrow = config_of(hidden_size=20)
    plan = plan_cut(teacher.config, narrow, CutOptions())
    student = build_model(narrow, seed=5)
    cut_weights(student, ModelWeights(teacher), plan, moments_DD)
    assert_alike(student, teacher)
    assert_alike(cut(teacher, narrow), teacher)  # the weights say it as well
    cut_weights(student, ModelWeights(teacher), plan, torch.eye(32))
    with pytest.raises(AssertionError):  # and no other plane will do
        assert_alike(student, teacher)


def test_moments_of_states_against_a_plain_loop() -> None:
    teacher = teacher_of(config_of(num_hidden_layers=1))
    document_ids = torch.ones(IDS.shape, dtype=torch.int32)
    document_ids[1, 9:] = 0
    batch = dataclasses.replace(Batch.from_tokens(IDS, None, 8), document_ids=document_ids)
    states = []
    with torch.no_grad():
        h_BTD = teacher.embed(IDS)
        shared = teacher.model.layer_input(h_BTD, batch)
        layer = teacher.model.layers[0]
        states.append(h_BTD)
        h_BTD = h_BTD + layer.self_attn(layer.input_layernorm(h_BTD), shared)
        states.append(h_BTD)
        states.append(layer(states[0], shared))
    total_DD, count = torch.zeros(32, 32), 0
    for h_BTD in states:
        for row, num_tokens in ((0, IDS.shape[1]), (1, 9)):
            for t in range(num_tokens):
                h_D = h_BTD[row, t] / h_BTD[row, t].norm()
                total_DD += torch.outer(h_D, h_D)
                count += 1
    assert torch.allclose(state_moments(teacher, [batch]), total_DD / count, atol=1e-6)
    basis_DX = principal_basis(total_DD, 3)
    assert torch.allclose(basis_DX.T @ basis_DX, torch.eye(3), atol=1e-6)
    kept = (basis_DX.T @ total_DD @ basis_DX).trace().item()
    assert kept == pytest.approx(torch.linalg.eigvalsh(total_DD)[-3:].sum().item(), rel=1e-5)


@torch.no_grad()
def test_neurons_that_write_nothing_leave_no_trace() -> None:
    teacher = teacher_of(config_of())
    generator = torch.Generator().manual_seed(2)
    for layer in teacher.model.layers:
        if not layer.is_moe:
            layer.feed_forward.down_proj.weight[:, torch.randperm(48, generator=generator)[:18]] = 0
            continue
        moe = layer.feed_forward
        moe.shared_expert.up_proj.weight[torch.randperm(16, generator=generator)[:5]] = 0
        for expert in moe.experts.down_proj:
            expert[torch.randperm(16, generator=generator)[:5]] = 0
    assert_alike(cut(teacher, config_of(intermediate_size=11, intermediate_size_mlp=30)), teacher)


@torch.no_grad()
def test_heads_that_write_nothing_leave_no_trace() -> None:
    scaled = {"scalable_softmax": True, "attn_temperature_tuning": False}
    wide = config_of(num_attention_heads=6, num_key_value_heads=3, **scaled)
    teacher = teacher_of(wide)
    for i, layer in enumerate(teacher.model.layers):
        attention = layer.self_attn
        if attention.softmax_scale is not None:
            attention.softmax_scale.copy_(torch.rand(6))
        heads = attention.o_proj.weight.unflatten(1, (6, 8))
        heads[:, 2 * (i % 3) : 2 * (i % 3) + 2] = 0  # one group whole
        attention.v_proj.weight.unflatten(0, (3, 8))[i % 3] *= 100  # heard by nobody
    fewer = dataclasses.replace(wide.text, num_attention_heads=4, num_key_value_heads=2)
    assert_alike(cut(teacher, Llama4Config(text=fewer, vision=None)), teacher)
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.unflatten(1, (3, 2, 8))[:, :, 1] = 0  # and half of each
    one_each = dataclasses.replace(wide.text, num_attention_heads=3, num_key_value_heads=3)
    assert_alike(cut(teacher, Llama4Config(text=one_each, vision=None)), teacher)


@torch.no_grad()
def test_layers_that_write_nothing_leave_no_trace() -> None:
    teacher = teacher_of(config_of())
    for i in (1, 2):
        layer = teacher.model.layers[i]
        layer.self_attn.o_proj.weight.zero_()
        if layer.is_moe:
            layer.feed_forward.shared_expert.down_proj.weight.zero_()
            layer.feed_forward.experts.down_proj.zero_()
        else:
            layer.feed_forward.down_proj.weight.zero_()
    shallow = config_of(num_hidden_layers=2, no_rope_layer_interval=2)
    student = cut(teacher, shallow)  # ends to ends: layers 0 and 3
    assert_alike(student, teacher)
    assert torch.equal(logits(cut(teacher, shallow, layers=(0, 3))), logits(student))
    with pytest.raises(AssertionError):
        assert_alike(cut(teacher, shallow, layers=(0, 1)), teacher)


@torch.no_grad()
def make_alike(moe: nn.Module, groups: list[list[int]]) -> None:
    """The experts of each group, and their rows of the router, are the same."""
    for group in groups:
        for other in group[1:]:
            moe.router.weight[other] = moe.router.weight[group[0]]
            moe.experts.gate_up_proj[other] = moe.experts.gate_up_proj[group[0]]
            moe.experts.down_proj[other] = moe.experts.down_proj[group[0]]


def test_merging_experts_that_are_the_same_changes_nothing() -> None:
    teacher = teacher_of(config_of(num_local_experts=6))
    make_alike(teacher.model.layers[1].feed_forward, [[0, 4], [1, 2], [3, 5]])
    make_alike(teacher.model.layers[3].feed_forward, [[0, 1], [2, 5], [3, 4]])
    assert_alike(cut(teacher, config_of(num_local_experts=3), experts="merge"), teacher)


@torch.no_grad()
def test_experts_that_no_token_chooses_and_that_write_little_are_dropped() -> None:
    teacher = teacher_of(config_of())
    # One channel is always far above zero, and the router's rows decide by it.
    teacher.model.embed_tokens.weight[:, 0] = 30
    for layer, (bad, worse) in zip(teacher.model.layers[1::2], [(0, 2), (1, 3)], strict=True):
        moe = layer.feed_forward
        moe.router.weight[[bad, worse], 0] = -20
        moe.experts.down_proj[[bad, worse]] *= 1e-3
    assert_alike(cut(teacher, config_of(num_local_experts=2), experts="drop"), teacher)


@torch.no_grad()
@pytest.mark.parametrize("experts", ["merge", "drop"])
def test_a_dense_layer_takes_the_shared_expert_first(experts: str) -> None:
    teacher = teacher_of(config_of())
    for layer in teacher.model.layers[1::2]:
        layer.feed_forward.experts.down_proj.zero_()
    dense = config_of(moe_layers=[])
    student = cut(teacher, dense, experts=experts)
    assert_alike(student, teacher)
    shared = teacher.model.layers[1].feed_forward.shared_expert
    mlp = student.model.layers[1].feed_forward
    assert torch.equal(mlp.gate_proj.weight[:16], shared.gate_proj.weight)
    assert torch.equal(mlp.down_proj.weight[:, :16], shared.down_proj.weight)


@torch.no_grad()
def test_a_dense_layer_is_the_experts_average_where_they_agree() -> None:
    """Experts that are the same behind a router that knows nothing are a dense layer already."""
    teacher = teacher_of(config_of())
    for layer in teacher.model.layers[1::2]:
        make_alike(layer.feed_forward, [[0, 1, 2, 3]])
        layer.feed_forward.router.weight.zero_()
    narrow = config_of(moe_layers=[])
    assert_alike(cut(teacher, narrow, experts="merge"), teacher)  # 16 shared, 16 routed, 16 silent
    # Every neuron of every expert, each a quarter as loud.
    wide = config_of(moe_layers=[], intermediate_size_mlp=16 + 4 * 16, num_hidden_layers=1)
    student = cut(teacher, wide, layers=(1,), experts="drop")
    x_BTD = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(4))
    shared = teacher.model.layer_input(x_BTD, Batch.from_tokens(IDS[:1, :5], None, 8))
    theirs = teacher.model.layers[1].feed_forward(x_BTD, shared)
    ours = student.model.layers[0].feed_forward(x_BTD)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_neurons_without_a_teacher_are_silent_and_learn() -> None:
    teacher = teacher_of(config_of())
    student = cut(teacher, config_of(moe_layers=[], intermediate_size_mlp=48), experts="merge")
    mlp = student.model.layers[1].feed_forward
    start = build_model(student.config, seed=5).model.layers[1].feed_forward
    assert torch.equal(mlp.gate_proj.weight[32:], start.gate_proj.weight[32:])
    assert not mlp.down_proj.weight[:, 32:].any()
    assert mlp.down_proj.weight[:, :32].all()
    student(IDS).square().mean().backward()
    for name, weight in student.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name
    assert mlp.down_proj.weight.grad[:, 32:].any(dim=0).all()


def test_tokens_the_teacher_does_not_know_keep_their_start() -> None:
    teacher = teacher_of(config_of())
    student = cut(teacher, config_of(vocab_size=80))
    start = build_model(student.config, seed=5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = student.get_parameter(name)
        assert torch.equal(weight[:64], teacher.get_parameter(name))
        assert torch.equal(weight[64:], start.get_parameter(name)[64:])
    fewer = cut(teacher, config_of(vocab_size=48))
    assert torch.equal(fewer.lm_head.weight, teacher.lm_head.weight[:48])


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "no_rope_layer_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "intermediate_size": 12,
    "intermediate_size_mlp": 32,
}


class ByExpert(ParameterReader):
    """All experts of a layer at once are more than there may be room for."""

    def part(self, name: str, expert: int | None = None) -> Tensor:
        assert (expert is not None) == (len(self.shapes[name]) == 3), name
        return super().part(name, expert)


@pytest.mark.parametrize("experts", ["merge", "drop"])
@pytest.mark.parametrize("moe_layers", [None, []])
def test_a_teacher_on_disk_gives_what_one_in_memory_gives(
    tmp_path: Path, experts: str, moe_layers: list[int] | None
) -> None:
    teacher = teacher_of(config_of(tiny_vision()))
    save_model(teacher, tmp_path / "teacher", {})
    config = config_of(tiny_vision(), **SMALL, moe_layers=moe_layers)
    student = cut(teacher, config, experts=experts)
    reader = ByExpert(tmp_path / "teacher")
    again = build_model(config, seed=5)
    cut_weights(again, reader, plan_cut(reader.config, config, CutOptions(experts=experts)))
    for name, weight in student.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name
    assert torch.isfinite(logits(student)).all()


def test_a_teacher_in_codes_is_read_as_what_they_stand_for(tmp_path: Path) -> None:
    save_model(teacher_of(config_of()), tmp_path / "teacher", {})
    formats = dict.fromkeys(("attention", "experts", "shared", "dense"), WeightFormat("int8", None))
    plan = plan_quantization(tmp_path / "teacher", formats)
    quantize_checkpoint(plan, tmp_path / "codes", RoundingQuantizer())
    reader = ParameterReader(tmp_path / "codes")
    student = build_model(reader.config, seed=5)
    cut_weights(student, reader, plan_cut(reader.config, reader.config, CutOptions()))
    from l4cli.checkpoint import load_model

    loaded = load_model(tmp_path / "codes", dtype=torch.float32)
    assert torch.equal(logits(student), logits(loaded))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"hidden_size": 40}, {}, "the student's `hidden_size` is 40, the teacher has only 32"),
    ({"num_hidden_layers": 5}, {}, "`num_hidden_layers` is 5, the teacher has only 4"),
    ({"num_attention_heads": 6}, {}, "`num_attention_heads` is 6"),
    ({"num_key_value_heads": 4}, {}, "`num_key_value_heads` is 4"),
    ({"num_key_value_heads": 1}, {}, "4 query heads to a key/value head, the teacher only 2"),
    ({"head_dim": 4}, {}, "`head_dim` is 4, the teacher's 8"),
    ({"num_local_experts": 8}, {}, "`num_local_experts` is 8"),
    ({"num_experts_per_tok": 2}, {}, "`num_experts_per_tok` is 2"),
    ({"intermediate_size": 20}, {}, "`intermediate_size` is 20"),
    ({"intermediate_size_mlp": 50}, {}, "`intermediate_size_mlp` is 50"),
    ({"moe_layers": [0, 1, 2]}, {}, "layer 0 of the student has experts, and layer 0"),
    ({}, {"layers": (0, 1)}, "2 layers are named (`0,1`), the student has 4"),
    ({}, {"layers": (0, 1, 2, 4)}, "layer 4 is none of the teacher's"),
    ({}, {"layers": (-1, 1, 2, 3)}, "layer -1 is none of the teacher's"),
    ({}, {"layers": (0, 2, 1, 3)}, "the layers `0,2,1,3` do not rise"),
    ({}, {"layers": (0, 1, 1, 3)}, "do not rise"),
    ({}, {"experts": "average"}, "`average` is no way to have fewer experts"),
    ({"num_hidden_layers": 2}, {"layers": (0, 2)}, "layer 1 of the student has experts, and layer"),
]


@pytest.mark.parametrize(("keys", "options", "why"), REFUSED)
def test_what_cannot_be_cut_is_refused(
    keys: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_cut(config_of(), config_of(**keys), CutOptions(**options))
    assert why in caught.value.why, caught.value.why
    assert caught.value.fix


def test_vision_is_copied_whole_or_not_at_all() -> None:
    sighted = config_of(tiny_vision())
    with pytest.raises(UsageError, match="sees pictures, and the teacher does not"):
        plan_cut(config_of(), sighted, CutOptions())
    with pytest.raises(UsageError, match="`num_hidden_layers` 2, the teacher's 1"):
        plan_cut(sighted, config_of(tiny_vision(num_hidden_layers=2)), CutOptions())


def chosen(teacher: dict[str, Any], student: dict[str, Any]) -> tuple[int, ...]:
    return plan_cut(config_of(**teacher), config_of(**student), CutOptions()).layers


def test_layers_are_spread_evenly_and_keep_their_kinds() -> None:
    dense = {"moe_layers": []}
    all_rope = {**dense, "no_rope_layer_interval": 100}
    deep, shallow = {"num_hidden_layers": 9}, {"num_hidden_layers": 5}
    assert chosen({**all_rope, **deep}, {**all_rope, **shallow}) == (0, 2, 4, 6, 8)
    deep = {"num_hidden_layers": 10}
    assert chosen({**all_rope, **deep}, {**all_rope, "num_hidden_layers": 2}) == (0, 9)
    # Layers without positions are 3, 7, 11, and the student's only one is its fourth of five.
    deep = {"num_hidden_layers": 12}
    assert chosen({**dense, **deep}, {**dense, **shallow}) == (0, 2, 5, 7, 10)
    # Layers with experts are the odd ones; positions as before, and now the ends are alike.
    assert chosen(deep, {"num_hidden_layers": 4}) == (0, 5, 8, 11)
    # From every second to every layer with experts: only from those that have some.
    assert chosen(deep, {"num_hidden_layers": 6, "interleave_moe_layer_step": 1}) == (
        (1, 3, 5, 7, 9, 11)
    )


def test_the_report_says_what_is_cut() -> None:
    options = CutOptions(experts="merge")
    plan = plan_cut(config_of(tiny_vision()), config_of(**SMALL, vocab_size=80), options)
    assert plan.report() == [
        "layers 2 of 4: 0 <- 0, 1 <- 3",
        "width 24 of 32: the principal directions",
        "heads 2 of 4, key/value heads 1 of 2 by importance",
        "experts 4 -> 2 merged",
        "expert width 12 of 16 by importance",
        "dense width 32 of 48 by importance",
        "vision dropped",
        "vocabulary: 16 rows keep their random start",
    ]
    dense = config_of(moe_layers=[], intermediate_size_mlp=40, num_hidden_layers=2)
    assert plan_cut(config_of(), dense, CutOptions((0, 3), "merge")).report() == [
        "layers 2 of 4: 0 <- 0, 1 <- 3",
        "dense width 40 of 48 by importance",
        "experts -> dense width 40: the shared expert, then their average, "
        "then 8 neurons that start silent",
        "layer 1 uses RoPE, layer 3 of the teacher none",
    ]
    assert plan_cut(config_of(), config_of(), CutOptions()).report() == [
        "layers 4 of 4: 0 <- 0, 1 <- 1, 2 <- 2, 3 <- 3"
    ]


def test_choices_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    v_KHD = torch.randn(3, 4, 10, generator=generator)
    o_NHD = torch.randn(6, 4, 10, generator=generator)
    writes = [(o_NHD[n].T @ v_KHD[n // 2]).square().sum().item() for n in range(6)]
    pairs = [writes[2 * k] + writes[2 * k + 1] for k in range(3)]
    kv = sorted(sorted(range(3), key=lambda k: -pairs[k])[:2])
    heads = [max((2 * k, 2 * k + 1), key=lambda n: writes[n]) for k in kv]
    found, found_kv = choose_heads(v_KHD, o_NHD, 2, 2)
    assert (found.tolist(), found_kv.tolist()) == (heads, kv)
    parts = [torch.randn(5, 10, generator=generator) for _ in range(3)]
    norm_D = torch.rand(10, generator=generator)
    strength_F = Neurons(*parts).strength(norm_D)
    for j in range(5):
        gate, up, down = (part[j] for part in parts)
        wanted = (gate * norm_D).norm() * (up * norm_D).norm() * down.norm()
        assert strength_F[j].item() == pytest.approx(wanted.item(), rel=1e-6)
    assert strongest(torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0]), 2).tolist() == [1, 2]


def test_experts_are_grouped_by_their_routers_rows() -> None:
    angles = torch.tensor([0.0, 1.5, 0.1, 3.0, 1.4, 3.2, 0.2]).unsqueeze(1)
    rows_ED = torch.cat([angles.cos(), angles.sin()], dim=1) * torch.rand(7, 1)
    assert group_experts(rows_ED[:6], 3) == [[0, 2], [1, 4], [3, 5]]
    assert group_experts(rows_ED, 7) == [[e] for e in range(7)]
    groups = group_experts(rows_ED, 3)
    assert sorted(e for group in groups for e in group) == list(range(7))
    assert sorted(map(len, groups)) == [2, 2, 3]
