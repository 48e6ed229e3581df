"""The text decoder: embedding to final norm.

in: embeddings h [B, T, D] and what every layer shares; out: h [B, T, D]
source: HF Llama4TextModel, Llama4TextAttention, Llama4TextMoe
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l4cli.model.config import RopeOptions, TextConfig
from l4cli.model.layers import MLP, Embedding, Linear, RMSNorm
from l4cli.ops.attention import AttentionPlans, segment_attention
from l4cli.ops.batch import Batch
from l4cli.ops.fp8 import fp8_routed_experts
from l4cli.ops.moe import Routing, route, routed_experts
from l4cli.ops.rope import (
    attention_factor,
    inverse_frequencies,
    rotate,
    rotate_unit,
    rotation,
)


class Cache(Protocol):
    """Keys and values of what was read before; decides what is kept and how it is attended."""

    def attend(self, layer_idx: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Append k and v, then attend with q: the newest tokens' or none. shapes: -> out as q"""


@dataclass
class LayerInput:
    """What all layers of one forward pass share."""

    turn_BTH: Tensor  # complex64 [B, T, H / 2]
    full_turn_BTH: Tensor  # of layers that rotate and attend in full; mostly the same
    log_length_BT: Tensor | None  # ln of how many keys a full layer's query sees
    temperature_BT: Tensor | None
    plans: AttentionPlans | None  # None with a cache
    cache: Cache | None
    routing: Routing | None


class Attention(nn.Module):
    """Grouped-query attention, rotated and chunked or neither."""

    def __init__(self, config: TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.uses_rope, self.is_local = config.uses_rope(layer_idx), config.is_local(layer_idx)
        use_qk_norm = config.rope_of(layer_idx).use_qk_norm
        self.qk_norm_eps = config.rms_norm_eps if use_qk_norm else None
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_width, bias=False)  # [N*H, D]
        self.k_proj = Linear(config.hidden_size, kv_width, bias=False)  # [K*H, D]
        self.v_proj = Linear(config.hidden_size, kv_width, bias=False)  # [K*H, D]
        self.o_proj = Linear(q_width, config.hidden_size, bias=False)  # [D, N*H]
        self.softmax_scale = None
        if config.scalable_softmax and not self.uses_rope:
            self.softmax_scale = nn.Parameter(torch.empty(config.num_attention_heads))  # [N]

    def forward(self, x_BTD: Tensor, shared: LayerInput, num_needed: int | None = None) -> Tensor:
        """Of all positions keys and values are kept; the last `num_needed` ask, or all."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, num_needed)
        first = k_BTKH.shape[1] - q_BTNH.shape[1]
        turn_BTH = shared.turn_BTH if self.is_local else shared.full_turn_BTH
        if self.uses_rope and self.qk_norm_eps is not None:
            q_BTNH = rotate_unit(q_BTNH, turn_BTH[:, first:], self.qk_norm_eps)
            k_BTKH = rotate_unit(k_BTKH, turn_BTH, self.qk_norm_eps)
        elif self.uses_rope:
            q_BTNH, k_BTKH = rotate(q_BTNH, turn_BTH[:, first:]), rotate(k_BTKH, turn_BTH)
        elif self.softmax_scale is not None:
            assert shared.log_length_BT is not None
            scale_BTN = shared.log_length_BT[:, first:].unsqueeze(-1) * self.softmax_scale
            q_BTNH = (q_BTNH * scale_BTN.unsqueeze(-1)).to(x_BTD.dtype)
        elif shared.temperature_BT is not None:
            q_BTNH = (q_BTNH * shared.temperature_BT[:, first:, None, None]).to(x_BTD.dtype)
        if shared.cache is not None:
            out_BTNH = shared.cache.attend(self.layer_idx, q_BTNH, k_BTKH, v_BTKH)
        else:
            assert shared.plans is not None
            plan = shared.plans.local if self.is_local else shared.plans.document
            out_BTNH = segment_attention(q_BTNH, k_BTKH, v_BTKH, plan)
        return self.o_proj(out_BTNH.flatten(-2))

    def _project(self, x_BTD: Tensor, num_needed: int | None = None) -> tuple[Tensor, ...]:
        """Queries, keys and values by head."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if torch.is_grad_enabled():
            # One product instead of three, and one for x's gradient, pay for copying the weights.
            weight = torch.cat([p.weight.to(x_BTD.dtype) for p in projections])
            widths = [p.out_features for p in projections]
            parts = list(F.linear(x_BTD, weight).split(widths, dim=-1))
        else:
            newest_BTD = _newest(x_BTD, num_needed)
            parts = [self.q_proj(newest_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)]
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)


class Experts(nn.Module):
    """The routed experts' weights, right-multiplied: [in, out], gate columns before up."""

    in_fp8 = False  # their products; set from outside, for training

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, hidden, width = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * width))  # [E, D, 2F]
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))  # [E, F, D]

    def forward(self, x_MD: Tensor, gate_MA: Tensor, expert_MA: Tensor) -> Tensor:
        run = fp8_routed_experts if self.in_fp8 else routed_experts
        return run(x_MD, gate_MA, expert_MA, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """A shared expert for every token and the top routed ones for each."""

    def __init__(self, config: TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_experts_per_tok = layer_idx, config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, bias=False)  # [E, D]
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, shared: LayerInput) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        # In fp32 whatever the compute dtype: bf16 merges close scores and flips the choice.
        logits_ME = self.router(x_MD.float())
        bias_E = None if shared.routing is None else shared.routing.bias(self.layer_idx)
        gate_MA, expert_MA = route(logits_ME, self.num_experts_per_tok, bias_E)
        if shared.routing is not None:
            rows = x_BTD.shape[:2]
            shared.routing.record(
                self.layer_idx, logits_ME.unflatten(0, rows), expert_MA.unflatten(0, rows)
            )
        # First: where experts are copied in from the host, they are on their way meanwhile.
        shared_BTD = self.shared_expert(x_BTD)
        return shared_BTD + self.experts(x_MD, gate_MA, expert_MA).view_as(x_BTD)


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward, each on a normed copy and added back."""

    def __init__(self, config: TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe(layer_idx)
        self.feed_forward = (
            MoE(config, layer_idx)
            if self.is_moe
            else MLP(config.hidden_size, config.intermediate_size_mlp)
        )

    def forward(self, h_BTD: Tensor, shared: LayerInput, num_needed: int | None = None) -> Tensor:
        x_BTD = self.input_layernorm(h_BTD)
        h_BTD = _newest(h_BTD, num_needed) + self.self_attn(x_BTD, shared, num_needed)
        if h_BTD.shape[1] == 0:
            return h_BTD
        x_BTD = self.post_attention_layernorm(h_BTD)
        if self.is_moe:
            return h_BTD + self.feed_forward(x_BTD, shared)
        return h_BTD + self.feed_forward(x_BTD)


class TextModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)  # [V, D]
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.frequencies: list[tuple[Tensor, float]] | None = None  # made at first use

    def forward(
        self,
        h_BTD: Tensor,
        batch: Batch,
        cache: Cache | None = None,
        routing: Routing | None = None,
        checkpoint_layers: bool = False,
        num_needed: int | None = None,
        outputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Run the layers over embeddings. shapes: h [B, T, D] -> same, or its last `num_needed`

        The last layer is spared positions that nobody asks for; their keys and values are kept.
        `outputs` gets what each layer it has a key for gives out, before the last norm.
        """
        shared = self._shared_input(h_BTD, batch, cache, routing)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if num_needed is not None and i == last:
                h_BTD = layer(h_BTD, shared, num_needed)
            elif checkpoint_layers and h_BTD.requires_grad:
                # Nothing in a layer is random, and passes on other threads share the generator.
                h_BTD = checkpoint(
                    layer, h_BTD, shared, use_reentrant=False, preserve_rng_state=False
                )
            else:
                h_BTD = layer(h_BTD, shared)
            if outputs is not None and i in outputs:
                outputs[i] = h_BTD
        return self.norm(h_BTD)

    def run_layer(
        self,
        layer_idx: int,
        h_BTD: Tensor,
        batch: Batch,
        cache: Cache,
        num_needed: int | None = None,
    ) -> Tensor:
        """One layer alone, for who takes a text through layer by layer."""
        shared = self._shared_input(h_BTD, batch, cache, None)
        return self.layers[layer_idx](h_BTD, shared, num_needed)

    def layer_input(
        self, h_BTD: Tensor, batch: Batch, routing: Routing | None = None
    ) -> LayerInput:
        """What a layer takes beside the states, for who runs a layer's parts one by one."""
        return self._shared_input(h_BTD, batch, None, routing)

    def _shared_input(
        self, h_BTD: Tensor, batch: Batch, cache: Cache | None, routing: Routing | None
    ) -> LayerInput:
        config = self.config
        plans = None
        if cache is None:
            assert batch.segments is not None, "without a cache a batch names its segments"
            num_positions = batch.input_ids.numel()
            plans = AttentionPlans.from_segments(batch.segments, num_positions, h_BTD.device)
        turns = [
            rotation(batch.position_ids, inverse, length)
            for inverse, length in self._frequencies(h_BTD.device)
        ]
        temperature_BT, log_length_BT = query_scales(config, batch.position_ids)
        return LayerInput(turns[0], turns[-1], log_length_BT, temperature_BT, plans, cache, routing)

    def _frequencies(self, device: torch.device) -> list[tuple[Tensor, float]]:
        """Angles and length of the turn: one for all layers, or local ones and then full ones."""
        if self.frequencies is None or self.frequencies[0][0].device != device:
            config = self.config
            layers = [i for i in range(config.num_hidden_layers) if config.uses_rope(i)]
            kinds = [RopeOptions(config.rope_theta, config.rope_scaling, config.use_qk_norm)]
            kinds += [r for r in map(config.rope_of, layers) if r != kinds[0]][:1]
            found = []
            for rope in kinds:
                inverse = inverse_frequencies(config.head_dim, rope.theta, rope.scaling)
                # A norm after the turn cancels its length, as in transformers.
                length = 1.0 if rope.use_qk_norm else attention_factor(rope.scaling)
                found.append((inverse.to(device), length))
            # Whole at once: passes on other threads read it.
            self.frequencies = found
        return self.frequencies


def _newest(x_BTD: Tensor, num_needed: int | None) -> Tensor:
    return x_BTD if num_needed is None else x_BTD[:, x_BTD.shape[1] - num_needed :]


def query_scales(
    config: TextConfig, position_ids_BT: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What NoPE layers' queries are multiplied with: a temperature, and ln of how many keys.

    1 + attn_scale * ln(1 + floor((p + 1) / floor_scale)); ln(p + 1), where the model has them
    """
    temperature_BT = log_length_BT = None
    if config.attn_temperature_tuning:
        step_BT = ((position_ids_BT.float() + 1) / config.floor_scale).floor()
        temperature_BT = 1 + config.attn_scale * step_BT.log1p()
    if config.scalable_softmax:
        log_length_BT = (position_ids_BT + 1).float().log()
    return temperature_BT, log_length_BT
