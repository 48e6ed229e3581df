"""A student's first weights, cut from its teacher: fewer layers, experts, neurons, heads, channels.

in: a student with its random start, a teacher in memory or on disk (read one matrix at a time, of
experts one expert), a `CutPlan`; out: the student's parameters, in place

The same shape is a copy, bit for bit. A narrower residual stream has one basis for everything that
writes it or reads it; weights of norms are folded into the maps behind them, and what is left there
undoes that a mean square is over fewer channels: the student computes what the teacher would with
the other directions zeroed. Heads, neurons and experts are chosen layer by layer before that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from l4cli.model import Llama4ForCausalLM, Llama4ForConditionalGeneration
from l4cli.training.cut_choice import (
    Neurons,
    add,
    choose_heads,
    group_experts,
    join,
    strongest,
)
from l4cli.training.cut_plan import DROP, CutPlan
from l4cli.training.residual_basis import both_moments, principal_basis, unit_moments

_TEXT = "language_model."
_ROWS = 8192  # of a vocabulary, in fp32 at a time
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
    moments_DD: Tensor | None = None,
) -> None:
    """Fill a student's parameters from a teacher's; what the teacher has none for stays.

    `moments_DD`: `state_moments` of the teacher, for a narrower student; without them its
    directions come from the weights.

    The model holds its random start already: it stays in rows of tokens that the teacher does not
    know, and in neurons that it has none for (those write zero at first).
    """
    assert model.config == plan.student
    cutter = _Cutter(model, teacher, plan, moments_DD)
    cutter.cut_vision()
    for i, source in enumerate(plan.layers):
        cutter.cut_layer(i, source)
    cutter.cut_ends()


class _Cutter:
    """Carries where the values are and the basis that is kept of the residual stream."""

    def __init__(
        self,
        model: nn.Module,
        teacher: TeacherWeights,
        plan: CutPlan,
        moments_DD: Tensor | None,
    ) -> None:
        self.plan, self._teacher = plan, teacher
        self.ours, self.theirs = plan.student.text, plan.teacher.text
        self._parameters = dict(model.named_parameters())
        self._has_vision = (plan.student.vision is not None, plan.teacher.vision is not None)
        self._basis_DX: Tensor | None = None
        if self.ours.hidden_size < self.theirs.hidden_size:
            moments_DD = self._weight_moments() if moments_DD is None else moments_DD
            self._basis_DX = principal_basis(moments_DD, self.ours.hidden_size)

    def cut_vision(self) -> None:
        """The tower whole, and the projector onto the basis."""
        if not self._has_vision[0]:
            return
        for name, parameter in self._parameters.items():
            if name.startswith("vision_model."):
                parameter.copy_(self._teacher.part(name))
            elif name.startswith("multi_modal_projector."):
                parameter.copy_(self._onto_basis(self._teacher.part(name).T).T)

    def cut_ends(self) -> None:
        """Embedding, final norm and head: rows of tokens both have."""
        rows = min(self.ours.vocab_size, self.theirs.vocab_size)
        norm_D = self._cut_norm("model.norm.weight", "model.norm.weight")
        for name, fold_D in (("model.embed_tokens.weight", None), ("lm_head.weight", norm_D)):
            own_VX, weight_VD = self._own(name)[:rows], self._whole(name)[:rows]
            for part_VX, part_VD in zip(own_VX.split(_ROWS), weight_VD.split(_ROWS), strict=True):
                part_VX.copy_(self._onto_basis(part_VD, fold_D))

    def cut_layer(self, i: int, source: int) -> None:
        """One layer of the student from one of the teacher."""
        to, at = f"model.layers.{i}.", f"model.layers.{source}."
        norm_D = self._cut_norm(f"{to}input_layernorm.weight", f"{at}input_layernorm.weight")
        heads = self._cut_attention(f"{to}self_attn.", f"{at}self_attn.", norm_D)
        texts = ((self.ours, i), (self.theirs, source))
        if all(text.scalable_softmax and not text.uses_rope(layer) for text, layer in texts):
            scale_N = self._whole(f"{at}self_attn.softmax_scale")
            self._own(f"{to}self_attn.softmax_scale").copy_(scale_N[heads])
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

    def _onto_basis(self, weight_XD: Tensor, norm_D: Tensor | None = None) -> Tensor:
        """What of each row lies in the kept directions, the weights of its norm folded in."""
        if self._basis_DX is None:
            return weight_XD
        weight_XD = weight_XD.float()
        return (weight_XD if norm_D is None else weight_XD * norm_D) @ self._basis_DX

    def _cut_norm(self, to: str, at: str) -> Tensor:
        """Fill a norm. shapes: -> the teacher's weights [D], fp32"""
        norm_D = self._whole(at).float()
        if self._basis_DX is None:
            self._own(to).copy_(norm_D)
        else:
            self._own(to).fill_(math.sqrt(self.theirs.hidden_size / self.ours.hidden_size))
        return norm_D

    def _weight_moments(self) -> Tensor:
        """What the embedding and the kept layers write, as those and the head would read it.

        Of a sparse layer its shared expert alone; each matrix counts the same.
        """
        written_DD = unit_moments(self._whole("model.embed_tokens.weight"))
        read_DD = self._read_moments(["lm_head.weight"], "model.norm.weight")
        for source in self.plan.layers:
            at = f"model.layers.{source}."
            mlp = f"{at}feed_forward." + "shared_expert." * self.theirs.is_moe(source)
            for name in (f"{at}self_attn.o_proj.weight", f"{mlp}down_proj.weight"):
                written_DD += unit_moments(self._whole(name).T)
            read = [f"{at}self_attn.{leaf}_proj.weight" for leaf in "qkv"]
            read_DD += self._read_moments(read, f"{at}input_layernorm.weight")
            read = [f"{mlp}{leaf}_proj.weight" for leaf in ("gate", "up")]
            read_DD += self._read_moments(read, f"{at}post_attention_layernorm.weight")
        return both_moments(written_DD, read_DD)

    def _read_moments(self, names: list[str], norm: str) -> Tensor:
        weights = [self._whole(name) for name in names]
        weight_XD = weights[0] if len(weights) == 1 else torch.cat(weights)
        return unit_moments(weight_XD, self._whole(norm).float())

    def _cut_attention(self, to: str, at: str, norm_D: Tensor) -> Tensor:
        """Fill the projections. shapes: -> the teacher's query heads that were kept"""
        by_head = (-1, self.ours.head_dim)
        v_KHD = self._whole(f"{at}v_proj.weight").unflatten(0, by_head)
        o_NHD = self._whole(f"{at}o_proj.weight").T.unflatten(0, by_head)
        heads, kv_heads = choose_heads(
            v_KHD.float() * norm_D,
            o_NHD.float(),
            self.ours.num_attention_heads,
            self.ours.num_key_value_heads,
        )
        o_XD = self._onto_basis(o_NHD[heads].flatten(0, 1))
        self._own(f"{to}o_proj.weight").copy_(o_XD.T)
        for leaf, kept in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weight_NHD = self._whole(f"{at}{leaf}_proj.weight").unflatten(0, by_head)
            weight_XD = self._onto_basis(weight_NHD[kept].flatten(0, 1), norm_D)
            self._own(f"{to}{leaf}_proj.weight").copy_(weight_XD)
        return heads

    def _mlp(self, at: str) -> Neurons:
        return Neurons(
            self._whole(f"{at}gate_proj.weight").float(),
            self._whole(f"{at}up_proj.weight").float(),
            self._whole(f"{at}down_proj.weight").float().T,
        )

    def _routed(self, at: str, expert: int) -> Neurons:
        gate_DF, up_DF = self._expert(f"{at}experts.gate_up_proj", expert).chunk(2, dim=1)
        return Neurons(gate_DF.T, up_DF.T, self._expert(f"{at}experts.down_proj", expert))

    def _all_routed(self, at: str) -> Iterator[Neurons]:
        return (self._routed(at, expert) for expert in range(self.theirs.num_local_experts))

    def _best(self, neurons: Neurons, norm_D: Tensor, count: int) -> Neurons:
        """The strongest neurons, on the basis."""
        return self._narrow(neurons.take(strongest(neurons.strength(norm_D), count)), norm_D)

    def _narrow(self, neurons: Neurons, norm_D: Tensor) -> Neurons:
        return Neurons(
            self._onto_basis(neurons.gate_FD, norm_D),
            self._onto_basis(neurons.up_FD, norm_D),
            self._onto_basis(neurons.down_FD),
        )

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
        neurons = self._best(neurons, norm_D, width)
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
            return self._best(average, norm_D, count)
        strength_EF = torch.stack([part.strength(norm_D) for part in self._all_routed(at)])
        chosen = strongest(strength_EF.flatten(), count)
        width = strength_EF.shape[1]
        parts = [
            self._routed(at, expert).take(chosen[chosen // width == expert] % width)
            for expert in (chosen // width).unique().tolist()
        ]
        return self._narrow(join(parts), norm_D).scaled(_MEAN_GATE, top_k / num_experts)

    def _average(self, at: str, experts: list[int]) -> Neurons:
        """One expert in memory beside the sum; one alone stays as it is, bit for bit."""
        total = self._routed(at, experts[0])
        for expert in experts[1:]:
            total = add(total, self._routed(at, expert))
        share = 1 / len(experts)
        return total if len(experts) == 1 else total.scaled(share, share)

    def _cut_experts(self, to: str, at: str, norm_D: Tensor) -> None:
        width = self.ours.intermediate_size
        shared = self._mlp(f"{at}shared_expert.")
        self._fill_mlp(f"{to}shared_expert.", self._best(shared, norm_D, width))
        router_ED = self._whole(f"{at}router.weight").float()
        groups = self._groups(at, router_ED * norm_D, norm_D)
        gate_up_EDF = self._own(f"{to}experts.gate_up_proj")
        down_EFD = self._own(f"{to}experts.down_proj")
        for e, group in enumerate(groups):
            row_D = router_ED[group].mean(0)
            self._own(f"{to}router.weight")[e].copy_(self._onto_basis(row_D, norm_D))
            expert = self._best(self._average(at, group), norm_D, width)
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
