"""Show every linear map of a model the inputs it gets on real text, stage by stage.

in: a checkpoint and rows of text; out: for maps that share their inputs the `Hessian` of these
Between two stages a map may be replaced: what comes after sees what the replacement gives, as in
GPTQ's order within a layer. Experts come one at a time, each with tokens enough: first those that
were routed to it, then those whose scores came closest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l4cli.inference.text_walk import Piece, TextWalk
from l4cli.model.layers import MLP
from l4cli.model.text import DecoderLayer, Experts, MoE
from l4cli.ops.moe import route
from l4cli.ops.swiglu import swiglu
from l4cli.quantization.hessian import Hessian

MIN_TOKENS_PER_INPUT = 2  # what an expert is given at least, for each input of its widest map
_ROWS = 4096  # an expert's tokens at once
_IN_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"feed_forward\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)")
Stage = tuple[list[str], Hessian]  # maps that share their inputs, by their names in the layer


def place_in_layer(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.0.self_attn.q_proj`."""
    found = _IN_LAYER.fullmatch(name)
    assert found is not None, name
    return found[2]


@dataclass(frozen=True)
class Coverage:
    """How many tokens spoke for an expert, and how many of them were not routed to it."""

    layer: int
    expert: int
    num_tokens: int
    num_borrowed: int


class CalibrationWalk:
    """Walks the layers in order; `min_tokens`: what an expert is given at least."""

    def __init__(self, walk: TextWalk, min_tokens: int | None = None) -> None:
        config = walk.text.config
        widest = max(config.hidden_size, config.intermediate_size)
        self.walk = walk
        self.min_tokens = MIN_TOKENS_PER_INPUT * widest if min_tokens is None else min_tokens
        self.coverage: list[Coverage] = []
        self._layer_idx = 0  # the next

    @torch.no_grad()
    def layer(self, layer_idx: int, wanted: Collection[str]) -> Iterator[Stage]:
        """Go through a layer; give the inputs of the maps in `wanted`, names within the layer.

        Layers between the last one and this one are passed. The states are those after the layer
        when the iteration ends.
        """
        for skipped in range(self._layer_idx, layer_idx):
            self.walk.pass_layer(skipped)
        self._layer_idx = layer_idx + 1
        with self.walk.resident(layer_idx):
            layer = self.walk.layer(layer_idx)
            yield from self._attention(layer, wanted)
            self._add_attention(layer)
            if isinstance(layer.feed_forward, MoE):
                yield from self._moe(layer, layer_idx, wanted)
            else:
                yield from self._mlp(layer, layer.feed_forward, "feed_forward", wanted)
            self._add_feed_forward(layer)

    def finish(self) -> None:
        """Pass the layers that are left."""
        for skipped in range(self._layer_idx, self.walk.num_layers):
            self.walk.pass_layer(skipped)
        self._layer_idx = self.walk.num_layers

    @torch.no_grad()
    def head(self) -> Hessian:
        """The inputs of the head, after the last layer."""
        self.finish()
        hessian = self._hessian(self.walk.text.config.hidden_size)
        for piece, h_MD in self.walk.normed():
            hessian.add(h_MD[piece.is_real_M])
        return hessian

    def weight(self, layer_idx: int, place: str) -> Tensor:
        """A map of the layer that is here. shapes: -> [O, I]"""
        layer = self.walk.layer(layer_idx)
        found = _EXPERT.fullmatch(place)
        if found is None:
            return layer.get_parameter(f"{place}.weight").detach()
        assert isinstance(layer.feed_forward, MoE)
        return _part_of_expert(layer.feed_forward.experts, int(found[1]), found[2]).detach()

    def replace(self, layer_idx: int, place: str, weight_OI: Tensor) -> None:
        """Let a map of the layer that is here have other values."""
        self.weight(layer_idx, place).copy_(weight_OI)

    # Stages

    def _attention(self, layer: DecoderLayer, wanted: Collection[str]) -> Iterator[Stage]:
        names = [f"self_attn.{name}_proj" for name in "qkv"]
        if here := [name for name in names if name in wanted]:
            hessian = self._hessian(layer.self_attn.q_proj.in_features)
            for piece in self.walk.pieces:
                x_BTD = layer.input_layernorm(self.walk.states(piece))
                hessian.add(x_BTD.flatten(0, 1)[piece.is_real_M])
            yield here, hessian
        if "self_attn.o_proj" in wanted:
            hessian = self._hessian(layer.self_attn.o_proj.in_features)
            for piece in self.walk.pieces:
                with _listening(layer.self_attn.o_proj, hessian, piece):
                    self._attend(layer, piece)
            yield ["self_attn.o_proj"], hessian

    def _attend(self, layer: DecoderLayer, piece: Piece) -> tuple[Tensor, Tensor]:
        h_BTD = self.walk.states(piece)
        x_BTD = layer.input_layernorm(h_BTD)
        return h_BTD, layer.self_attn(x_BTD, self.walk.layer_input(piece, h_BTD))

    def _add_attention(self, layer: DecoderLayer) -> None:
        for piece in self.walk.pieces:
            h_BTD, added_BTD = self._attend(layer, piece)
            self.walk.keep(piece, h_BTD + added_BTD)

    def _add_feed_forward(self, layer: DecoderLayer) -> None:
        for piece in self.walk.pieces:
            h_BTD = self.walk.states(piece)
            x_BTD = layer.post_attention_layernorm(h_BTD)
            if isinstance(layer.feed_forward, MoE):
                added_BTD = layer.feed_forward(x_BTD, self.walk.layer_input(piece, h_BTD))
            else:
                added_BTD = layer.feed_forward(x_BTD)
            self.walk.keep(piece, h_BTD + added_BTD)

    def _mlp(
        self, layer: DecoderLayer, mlp: MLP, prefix: str, wanted: Collection[str]
    ) -> Iterator[Stage]:
        """A dense feed-forward or a shared expert; the router sees the same inputs."""
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj", "feed_forward.router"]
        if here := [name for name in names if name in wanted]:
            hessian = self._hessian(mlp.gate_proj.in_features)
            for piece in self.walk.pieces:
                hessian.add(self._normed(layer, piece)[piece.is_real_M])
            yield here, hessian
        if f"{prefix}.down_proj" in wanted:
            hessian = self._hessian(mlp.down_proj.in_features)
            for piece in self.walk.pieces:
                x_MD = self._normed(layer, piece)[piece.is_real_M]
                hessian.add(swiglu(mlp.gate_proj(x_MD), mlp.up_proj(x_MD)))
            yield [f"{prefix}.down_proj"], hessian

    def _normed(self, layer: DecoderLayer, piece: Piece) -> Tensor:
        return layer.post_attention_layernorm(self.walk.states(piece)).flatten(0, 1)

    def _moe(self, layer: DecoderLayer, layer_idx: int, wanted: Collection[str]) -> Iterator[Stage]:
        moe = layer.feed_forward
        assert isinstance(moe, MoE)
        yield from self._mlp(layer, moe.shared_expert, "feed_forward.shared_expert", wanted)
        logits_ME = torch.cat(
            [moe.router(self._normed(layer, piece).float()).cpu() for piece in self.walk.pieces]
        )
        _, expert_MA = route(logits_ME, moe.num_experts_per_tok)
        for e in range(logits_ME.shape[1]):
            places = [f"feed_forward.experts.{e}.{name}_proj" for name in ("gate", "up", "down")]
            if not any(place in wanted for place in places):
                continue
            is_routed_M = (expert_MA == e).any(dim=-1) & self.walk.is_real_M
            chosen_R = self._tokens_for(logits_ME[:, e], is_routed_M)
            num_borrowed = int((~is_routed_M[chosen_R]).sum())
            self.coverage.append(Coverage(layer_idx, e, len(chosen_R), num_borrowed))
            gate_R = logits_ME[chosen_R, e].sigmoid()
            yield from self._expert(layer, e, chosen_R, gate_R, wanted)

    def _tokens_for(self, logits_M: Tensor, is_routed_M: Tensor) -> Tensor:
        """The tokens routed to an expert and, if they are few, those it scored next best."""
        routed_R = is_routed_M.nonzero().flatten()
        num_missing = min(self.min_tokens, int(self.walk.is_real_M.sum())) - len(routed_R)
        if num_missing <= 0:
            return routed_R
        is_other_M = self.walk.is_real_M & ~is_routed_M
        scores_M = logits_M.masked_fill(~is_other_M, float("-inf"))
        return torch.cat([routed_R, scores_M.topk(num_missing).indices]).sort().values

    def _expert(
        self,
        layer: DecoderLayer,
        expert: int,
        chosen_R: Tensor,
        gate_R: Tensor,
        wanted: Collection[str],
    ) -> Iterator[Stage]:
        assert isinstance(layer.feed_forward, MoE)
        experts, prefix = layer.feed_forward.experts, f"feed_forward.experts.{expert}"
        num_inputs, num_inner = experts.down_proj.shape[2], experts.down_proj.shape[1]
        here = [name for name in (f"{prefix}.gate_proj", f"{prefix}.up_proj") if name in wanted]
        if here:
            hessian = self._hessian(num_inputs)
            for x_RD in self._expert_inputs(layer, chosen_R, gate_R):
                hessian.add(x_RD)
            yield here, hessian
        if f"{prefix}.down_proj" in wanted:
            hessian = self._hessian(num_inner)
            w_in_DF = experts.gate_up_proj[expert]
            for x_RD in self._expert_inputs(layer, chosen_R, gate_R):
                hessian.add(swiglu(*(x_RD @ w_in_DF.to(x_RD.dtype)).chunk(2, dim=-1)))
            yield [f"{prefix}.down_proj"], hessian

    def _expert_inputs(
        self, layer: DecoderLayer, chosen_R: Tensor, gate_R: Tensor
    ) -> Iterator[Tensor]:
        """An expert's tokens, each scaled by its gate as the model does."""
        for some, gates in zip(chosen_R.split(_ROWS), gate_R.split(_ROWS), strict=True):
            h_RD = self.walk.hidden_MD[some].to(self.walk.device)
            x_RD = layer.post_attention_layernorm(h_RD)
            yield x_RD * gates.to(x_RD.device, x_RD.dtype).unsqueeze(-1)

    def _hessian(self, num_inputs: int) -> Hessian:
        return Hessian(num_inputs, self.walk.device)


@contextmanager
def _listening(module: nn.Module, hessian: Hessian, piece: Piece) -> Iterator[None]:
    """Count what a module is given."""

    def hear(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        hessian.add(given[0].flatten(0, 1)[piece.is_real_M])

    handle = module.register_forward_pre_hook(hear)
    try:
        yield
    finally:
        handle.remove()


def _part_of_expert(experts: Experts, expert: int, name: str) -> Tensor:
    """A view of one map of one expert, as in nn.Linear. shapes: -> [O, I]"""
    if name == "down_proj":
        return experts.down_proj[expert].T
    half = experts.gate_up_proj.shape[2] // 2
    columns = slice(0, half) if name == "gate_proj" else slice(half, None)
    return experts.gate_up_proj[expert][:, columns].T
