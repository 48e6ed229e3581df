"""A student's first weights, cut from its teacher: fewer layers, experts, neurons, heads, channels.

in: a student with its random start, a teacher in memory or on disk (read one matrix at a time, of
experts one expert), a `CutPlan`; out: the student's parameters, in place

The same shape is a copy, bit for bit. Kept channels are one set for the whole residual stream.
What is cut beside them is chosen layer by layer, after its channels are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from l4cli.model import Llama4ForCausalLM, Llama4ForConditionalGeneration
from l4cli.training.cut_choice import (
    Neurons,
    add,
    channel_energy,
    channel_importance,
    choose_heads,
    group_experts,
    join,
    norm_scale,
    strongest,
)
from l4cli.training.cut_plan import DROP, CutPlan

_TEXT = "language_model."
# A routed expert reads its input times sigmoid(router); in a dense layer there is no router, and a
# score of zero, halfway between chosen for and chosen against, stands for all of them.
_MEAN_GATE = 0.5


class TeacherWeights(Protocol):
    """A teacher's values by name, as `ParameterReader` gives them."""

    def part(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter: whole, or of a fused one an expert's [in, out]."""


class ModelWeights:
    """A teacher that is in memory, as it stands."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    def part(self, name: str, expert: int | None = None) -> Tensor:
        weight = self._parameters[name].detach()
        return (weight if expert is None else weight[expert]).cpu()


@torch.no_grad()
def cut_weights(
    model: Llama4ForCausalLM | Llama4ForConditionalGeneration,
    teacher: TeacherWeights,
    plan: CutPlan,
) -> None:
    """Fill a student's parameters from a teacher's; what the teacher has none for stays.

    The model holds its random start already: it stays in rows of tokens that the teacher does not
    know, and in neurons that it has none for (those write zero at first).
    """
    assert model.config == plan.student
    cutter = _Cutter(model, teacher, plan)
    cutter.cut_vision()
    for i, source in enumerate(plan.layers):
        cutter.cut_layer(i, source)
    cutter.cut_ends()


class _Cutter:
    """Carries which channels are kept, and how strong they are, from the embedding to the head."""

    def __init__(self, model: nn.Module, teacher: TeacherWeights, plan: CutPlan) -> None:
        self.plan, self._teacher = plan, teacher
        self.ours, self.theirs = plan.student.text, plan.teacher.text
        self._parameters = dict(model.named_parameters())
        self._has_vision = (plan.student.vision is not None, plan.teacher.vision is not None)
        embed_VD = self._whole("model.embed_tokens.weight")
        energy_D = channel_energy(embed_VD)
        head_D = channel_energy(self._whole("lm_head.weight"))
        norm_D = self._whole("model.norm.weight").float()
        self._channels = strongest(
            channel_importance(energy_D, head_D * norm_D.square()), self.ours.hidden_size
        )
        self._norm_scale = norm_scale(energy_D, self._channels)

    def cut_vision(self) -> None:
        """The tower whole, and the rows of the projector that write kept channels."""
        if not self._has_vision[0]:
            return
        for name, parameter in self._parameters.items():
            if name.startswith("vision_model."):
                parameter.copy_(self._teacher.part(name))
            elif name.startswith("multi_modal_projector."):
                parameter.copy_(self._teacher.part(name)[self._channels])

    def cut_ends(self) -> None:
        """Embedding, final norm and head: rows of tokens both have."""
        rows = min(self.ours.vocab_size, self.theirs.vocab_size)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            self._own(name)[:rows].copy_(self._whole(name)[:rows, self._channels])
        self._cut_norm("model.norm.weight", "model.norm.weight")

    def cut_layer(self, i: int, source: int) -> None:
        """One layer of the student from one of the teacher."""
        to, at = f"model.layers.{i}.", f"model.layers.{source}."
        norm_D = self._cut_norm(f"{to}input_layernorm.weight", f"{at}input_layernorm.weight")
        self._cut_attention(f"{to}self_attn.", f"{at}self_attn.", norm_D)
        name = "post_attention_layernorm.weight"
        norm_D = self._cut_norm(to + name, at + name)
        to, at = f"{to}feed_forward.", f"{at}feed_forward."
        if self.ours.is_moe(i):
            self._cut_experts(to, at, norm_D)
        else:
            self._cut_dense(to, at, norm_D, self.theirs.is_moe(source))

    def _own(self, name: str) -> Tensor:
        return self._parameters[(_TEXT if self._has_vision[0] else "") + name].data

    def _whole(self, name: str) -> Tensor:
        return self._teacher.part((_TEXT if self._has_vision[1] else "") + name)

    def _expert(self, name: str, expert: int) -> Tensor:
        return self._teacher.part((_TEXT if self._has_vision[1] else "") + name, expert).float()

    def _reading(self, name: str) -> Tensor:
        """A map from the residual stream [out, D], kept channels only."""
        return self._whole(name)[:, self._channels].float()

    def _writing(self, name: str) -> Tensor:
        """A map to the residual stream [D, in], kept channels only."""
        return self._whole(name)[self._channels].float()

    def _cut_norm(self, to: str, at: str) -> Tensor:
        norm_D = self._whole(at)[self._channels].float() * self._norm_scale
        self._own(to).copy_(norm_D)
        return norm_D

    def _cut_attention(self, to: str, at: str, norm_D: Tensor) -> None:
        head_dim = self.ours.head_dim
        v_KHD = self._reading(f"{at}v_proj.weight").unflatten(0, (-1, head_dim))
        o_DNH = self._writing(f"{at}o_proj.weight").unflatten(1, (-1, head_dim))
        heads, kv_heads = choose_heads(
            v_KHD * norm_D,
            o_DNH.permute(1, 2, 0),
            self.ours.num_attention_heads,
            self.ours.num_key_value_heads,
        )
        self._own(f"{to}v_proj.weight").copy_(v_KHD[kv_heads].flatten(0, 1))
        self._own(f"{to}o_proj.weight").copy_(o_DNH[:, heads].flatten(1, 2))
        q_NHD = self._reading(f"{at}q_proj.weight").unflatten(0, (-1, head_dim))
        self._own(f"{to}q_proj.weight").copy_(q_NHD[heads].flatten(0, 1))
        k_KHD = self._reading(f"{at}k_proj.weight").unflatten(0, (-1, head_dim))
        self._own(f"{to}k_proj.weight").copy_(k_KHD[kv_heads].flatten(0, 1))
        self._cut_softmax_scale(f"{to}softmax_scale", f"{at}softmax_scale", heads)

    def _cut_softmax_scale(self, to: str, at: str, heads: Tensor) -> None:
        source = int(at.split(".")[2])
        has_one = self.theirs.scalable_softmax and not self.theirs.uses_rope(source)
        target = int(to.split(".")[2])
        if has_one and self.ours.scalable_softmax and not self.ours.uses_rope(target):
            self._own(to).copy_(self._whole(at)[heads])

    def _mlp(self, at: str) -> Neurons:
        return Neurons(
            self._reading(f"{at}gate_proj.weight"),
            self._reading(f"{at}up_proj.weight"),
            self._writing(f"{at}down_proj.weight").T,
        )

    def _routed(self, at: str, expert: int) -> Neurons:
        fused_DF = self._expert(f"{at}experts.gate_up_proj", expert)[self._channels]
        gate_DF, up_DF = fused_DF.chunk(2, dim=1)
        down_FD = self._expert(f"{at}experts.down_proj", expert)[:, self._channels]
        return Neurons(gate_DF.T, up_DF.T, down_FD)

    def _all_routed(self, at: str) -> Iterator[Neurons]:
        return (self._routed(at, expert) for expert in range(self.theirs.num_local_experts))

    def _fill_mlp(self, to: str, neurons: Neurons) -> None:
        """Fill the first neurons; others keep what they read and write nothing."""
        count = len(neurons.gate_FD)
        self._own(f"{to}gate_proj.weight")[:count].copy_(neurons.gate_FD)
        self._own(f"{to}up_proj.weight")[:count].copy_(neurons.up_FD)
        down_DF = self._own(f"{to}down_proj.weight")
        down_DF[:, :count].copy_(neurons.down_FD.T)
        down_DF[:, count:].zero_()

    def _cut_dense(self, to: str, at: str, norm_D: Tensor, is_moe: bool) -> None:
        width = self.ours.intermediate_size_mlp
        neurons = self._mlp(f"{at}shared_expert." if is_moe else at)
        neurons = neurons.take(strongest(neurons.strength(norm_D), width))
        spare = width - len(neurons.gate_FD)
        if is_moe and spare:
            neurons = join([neurons, self._routed_as_dense(at, norm_D, spare)])
        self._fill_mlp(to, neurons)

    def _routed_as_dense(self, at: str, norm_D: Tensor, count: int) -> Neurons:
        """Routed experts without their router: what a token gets of them on the average.

        Merged: the average expert, as often as a token has experts. Dropped: the strongest
        neurons of all, each writing as often as its expert is chosen.
        """
        top_k, num_experts = self.theirs.num_experts_per_tok, self.theirs.num_local_experts
        if self.plan.experts != DROP:
            average = self._average(at, list(range(num_experts))).scaled(_MEAN_GATE, top_k)
            return average.take(strongest(average.strength(norm_D), count))
        strength_EF = torch.stack([part.strength(norm_D) for part in self._all_routed(at)])
        chosen = strongest(strength_EF.flatten(), count)
        width = strength_EF.shape[1]
        parts = [
            self._routed(at, expert).take(chosen[chosen // width == expert] % width)
            for expert in (chosen // width).unique().tolist()
        ]
        return join(parts).scaled(_MEAN_GATE, top_k / num_experts)

    def _average(self, at: str, experts: list[int]) -> Neurons:
        """One expert in memory beside the sum; one alone stays as it is, bit for bit."""
        total = self._routed(at, experts[0])
        for expert in experts[1:]:
            total = add(total, self._routed(at, expert))
        share = 1 / len(experts)
        return total if len(experts) == 1 else total.scaled(share, share)

    def _cut_experts(self, to: str, at: str, norm_D: Tensor) -> None:
        shared = self._mlp(f"{at}shared_expert.")
        width = self.ours.intermediate_size
        shared = shared.take(strongest(shared.strength(norm_D), width))
        self._fill_mlp(f"{to}shared_expert.", shared)
        router_ED = self._reading(f"{at}router.weight")
        groups = self._groups(at, router_ED * norm_D, norm_D)
        gate_up_EDF = self._own(f"{to}experts.gate_up_proj")
        down_EFD = self._own(f"{to}experts.down_proj")
        for e, group in enumerate(groups):
            self._own(f"{to}router.weight")[e].copy_(router_ED[group].mean(0))
            expert = self._average(at, group)
            expert = expert.take(strongest(expert.strength(norm_D), width))
            gate_up_EDF[e].copy_(torch.cat([expert.gate_FD, expert.up_FD]).T)
            down_EFD[e].copy_(expert.down_FD)

    def _groups(self, at: str, rows_ED: Tensor, norm_D: Tensor) -> list[list[int]]:
        """Which of the teacher's experts make each of the student's."""
        count, num_experts = self.ours.num_local_experts, self.theirs.num_local_experts
        if count == num_experts:
            return [[expert] for expert in range(num_experts)]
        if self.plan.experts != DROP:
            return group_experts(rows_ED, count)
        written_E = torch.stack([part.strength(norm_D).sum() for part in self._all_routed(at)])
        # A longer row wins more often, and with more weight.
        return [[int(e)] for e in strongest(written_E * rows_ED.norm(dim=1), count)]
