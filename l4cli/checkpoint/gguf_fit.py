"""What llama.cpp computes differently from a config: found before a file is written.

in: a config; out: `Misfit`s, each with what it does instead and how long it stays right
source: llama.cpp, src/models/llama4.cpp and `llm_graph_input_attn_temp` (0c1e57098): the file
format has no place for these figures, and the program has one set of them built in
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from l4cli.model import TextConfig

CHUNK = 8192  # keys a layer with RoPE sees, in chunks
NOPE_INTERVAL = 4  # every fourth layer is without RoPE and without chunks
FLOOR_SCALE, ATTN_SCALE = 8192, 0.1  # the temperature of layers without RoPE
NO_QK_NORM_EXPERTS = 128  # with so many experts queries and keys are not normed, else they are
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Misfit:
    """One thing that comes out differently there."""

    what: str  # the setting, as it is here
    why: str  # what llama.cpp does instead
    right_tokens: int = 0  # texts of at most so many tokens come out right all the same
    loads: bool = True  # False: it would not open the file, or crash


def misfits(text: TextConfig) -> list[Misfit]:
    """Everything of a config that llama.cpp would get wrong, what it cannot open first."""
    found = [misfit for check in _CHECKS if (misfit := check(text)) is not None]
    wrong = [m for m in found if not m.loads or m.right_tokens < text.max_position_embeddings]
    return sorted(wrong, key=lambda m: (m.loads, m.right_tokens))


def moe_step(text: TextConfig) -> int | None:
    """The step with which every so many layers, and no other, has experts."""
    layers = range(text.num_hidden_layers)
    for step in range(1, text.num_hidden_layers + 2):
        if all(text.is_moe(i) == ((i + 1) % step == 0) for i in layers):
            return step
    return None


def _own_kind(text: TextConfig) -> Misfit | None:
    if text.is_plain:
        return None
    names = [name for name in ("full_rope", "scalable_softmax") if getattr(text, name)]
    why = "no Llama 4 has it, and the file has no tensors and no keys for it"
    return Misfit(" and ".join(f"`{name}`" for name in names), why, loads=False)


def _moe_layers(text: TextConfig) -> Misfit | None:
    if moe_step(text) is not None:
        return None
    experts = [i for i in range(text.num_hidden_layers) if text.is_moe(i)]
    why = "experts stand in every n-th layer there, and it looks for tensors that are not there"
    return Misfit(f"`moe_layers` {experts}", why, loads=False)


def _num_experts(text: TextConfig) -> Misfit | None:
    if text.num_local_experts <= MAX_EXPERTS:
        return None
    why = f"it has room for {MAX_EXPERTS}"
    return Misfit(f"`num_local_experts` {text.num_local_experts}", why, loads=False)


def _nope_layers(text: TextConfig) -> Misfit | None:
    layers = range(text.num_hidden_layers)
    if all(text.uses_rope(i) == _rotates_there(i) for i in layers):
        return None
    without = [i for i in layers if not text.uses_rope(i)]
    why = f"every {NOPE_INTERVAL}th layer is without RoPE there, and only those"
    return Misfit(f"layers without RoPE {without}", why)


def _qk_norm(text: TextConfig) -> Misfit | None:
    does_there = text.num_local_experts != NO_QK_NORM_EXPERTS
    if text.use_qk_norm == does_there or not any(
        text.uses_rope(i) for i in range(text.num_hidden_layers)
    ):
        return None
    verb = "norms" if does_there else "does not norm"
    why = f"with {text.num_local_experts} experts it {verb} queries and keys"
    return Misfit(f"`use_qk_norm` {str(text.use_qk_norm).lower()}", why)


def _rope_scaling(text: TextConfig) -> Misfit | None:
    scaling = text.rope_scaling or {}
    if scaling.get("rope_type") != "yarn":
        return None
    odd = [n for n in ("attention_factor", "beta_fast", "beta_slow") if scaling.get(n) is not None]
    if not odd:
        return None
    return Misfit(f"`rope_scaling` with `{odd[0]}`", "it takes its own value for Llama 4")


def _chunks(text: TextConfig) -> Misfit | None:
    """Chunks of another size, or in other layers; neither shows in texts of one chunk."""
    layers = range(text.num_hidden_layers)
    chunk = text.attention_chunk_size
    if chunk == CHUNK and all(text.is_local(i) == _rotates_there(i) for i in layers):
        return None
    locals_ = [chunk for i in layers if text.is_local(i)]
    right = min(CHUNK, *[c for c in locals_ if c is not None], CHUNK)
    what = "other layers in chunks" if chunk == CHUNK else f"`attention_chunk_size` {chunk}"
    return Misfit(what, f"it cuts the layers with RoPE into chunks of {CHUNK} tokens", right)


def _temperature(text: TextConfig) -> Misfit | None:
    layers = range(text.num_hidden_layers)
    is_on, floor, scale = text.attn_temperature_tuning, text.floor_scale, text.attn_scale
    is_alike = is_on and floor == FLOOR_SCALE and scale == ATTN_SCALE
    if is_alike or all(map(text.uses_rope, layers)):
        return None
    what = "`attn_temperature_tuning` false"
    if text.scalable_softmax:
        what = "`scalable_softmax`"
    elif is_on:
        what = f"`floor_scale` {floor:g} with `attn_scale` {scale:g}"
    # The first token that is scaled is the one whose position, counted from one, is the floor.
    right = int(min(FLOOR_SCALE, floor if is_on and scale else FLOOR_SCALE)) - 1
    why = f"layers without RoPE get {ATTN_SCALE} * ln(floor(position / {FLOOR_SCALE}) + 1) + 1"
    return Misfit(what, why, right)


def _rotates_there(layer_idx: int) -> bool:
    return (layer_idx + 1) % NOPE_INTERVAL != 0


_CHECKS: tuple[Callable[[TextConfig], Misfit | None], ...] = (
    _own_kind,
    _moe_layers,
    _num_experts,
    _nope_layers,
    _qk_norm,
    _rope_scaling,
    _chunks,
    _temperature,
)
