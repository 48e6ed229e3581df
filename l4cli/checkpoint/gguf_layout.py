"""Which tensors a GGUF file of a Llama 4 has, and which parameter fills each.

in: a config's parameters, a precision; out: `GgufTensor`s with their places in the file's data
source: llama.cpp, `llama_model_llama4::load_arch_tensors`: names and shapes
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from l4cli.quantization.ggml_blocks import KINDS, fits, row_bytes

ALIGNMENT = 32
ROPE_FACTORS = "rope_freqs.weight"  # what llama3's scaling divides each pair's turn by
_TOP = {
    "model.embed_tokens.weight": "token_embd",
    "model.norm.weight": "output_norm",
    "lm_head.weight": "output",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "post_attention_layernorm.weight": "ffn_norm",
    "feed_forward.router.weight": "ffn_gate_inp",
    "feed_forward.gate_proj.weight": "ffn_gate",
    "feed_forward.up_proj.weight": "ffn_up",
    "feed_forward.down_proj.weight": "ffn_down",
    "feed_forward.shared_expert.gate_proj.weight": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj.weight": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj.weight": "ffn_down_shexp",
    "feed_forward.experts.down_proj": "ffn_down_exps",
}
_GATE_UP = "feed_forward.experts.gate_up_proj"
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: rows that are stored one after the other, outermost dimension first."""

    name: str
    parameter: str  # whose values; empty for a computed one
    shape: tuple[int, ...]
    kind: str
    start: int  # within the file's data
    columns: tuple[int, int] | None = None  # of a fused expert [in, out], to be transposed

    @property
    def part_bytes(self) -> int:
        """Bytes of the whole, or of one expert."""
        num_rows = 1 if len(self.shape) == 1 else self.shape[-2]
        return num_rows * row_bytes(self.kind, self.shape[-1])

    @property
    def num_parts(self) -> int:
        """Experts, or one."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def size_bytes(self) -> int:
        return self.part_bytes * self.num_parts


def gguf_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    kind: str,
    num_rope_factors: int = 0,
    kept: Collection[str] = (),
) -> list[GgufTensor]:
    """Lay out a text model's parameters; `kept`: those that are not rounded to blocks.

    raises: KeyError for a parameter that has no name there
    """
    assert kind in KINDS
    tensors: list[GgufTensor] = []
    position = 0

    def add(
        name: str, parameter: str, shape: tuple[int, ...], columns: tuple[int, int] | None
    ) -> None:
        nonlocal position
        own = _kind_of(name, shape, "bf16" if parameter in kept else kind, kind)
        tensor = GgufTensor(name, parameter, shape, own, position, columns)
        tensors.append(tensor)
        position += -(-tensor.size_bytes // ALIGNMENT) * ALIGNMENT

    if num_rope_factors:
        add(ROPE_FACTORS, "", (num_rope_factors,), None)
    for parameter, shape in shapes.items():
        for name, there, columns in _names(parameter, shape):
            add(name, parameter, there, columns)
    return tensors


def _names(
    parameter: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, int] | None]]:
    """The names, shapes and columns a parameter has there; gate and up are tensors of their own."""
    in_layer = _LAYER_NAME.fullmatch(parameter)
    if in_layer is None:
        yield f"{_TOP[parameter]}.weight", shape, None
        return
    block, rest = f"blk.{in_layer[1]}", in_layer[2]
    if rest == _GATE_UP:
        experts, width, both = shape
        half = both // 2
        for name, start in (("ffn_gate_exps", 0), ("ffn_up_exps", half)):
            yield f"{block}.{name}.weight", (experts, half, width), (start, start + half)
    elif len(shape) == 3:
        experts, rows, columns = shape
        there = (experts, columns, rows)
        yield f"{block}.{_LAYER[rest]}.weight", there, (0, columns)
    else:
        yield f"{block}.{_LAYER[rest]}.weight", shape, None


def _kind_of(name: str, shape: tuple[int, ...], kind: str, others: str) -> str:
    """Norms and routers in fp32; what no block divides in bf16; the head no worse than 8 bits.

    A router's rounding changes which expert is chosen, so nobody rounds it.
    """
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "f32"
    if name == "output.weight" and others in ("q8_0", "q4_0"):
        kind = "q8_0"
    return kind if fits(kind, shape[-1]) else "bf16"
