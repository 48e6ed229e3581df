"""Lay a model's weights out for the CPU kernels, one after the other.

in: where weights come from, by module name; out: `Blob`s in the order of use
Quantized weights keep their codes exactly. Of what is stored as values, the embeddings and the head
become int8 with a scale a row, the rest stays as it is or is rounded as asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from l4cli.inference.kernel_file import Blob
from l4cli.model import Llama4Config
from l4cli.model.config import TextConfig
from l4cli.ops.weight_only import (
    GROUP_SIZES,
    Layout,
    is_bf16,
    lay_out,
    lay_out_values,
    layout_of,
)
from l4cli.quantization import QuantizedWeight, WeightFormat, round_weight

ROWS = WeightFormat("int8")  # a scale a row
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Source(Protocol):
    """Where weights come from; names are those of modules of the text half, experts apart."""

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """A weight [O, I], a norm [D] or a table [V, D], as stored."""


class ModelSource:
    """A model in memory."""

    def __init__(self, model: Any) -> None:
        self.text = getattr(model, "language_model", model)

    def read(self, name: str) -> Tensor:
        """See `Source`."""
        head, _, last = name.rpartition(".")
        owner, _, index = head.rpartition(".")
        if index.isdigit() and owner.endswith(".experts"):
            experts = self.text.get_submodule(owner)
            if last == "down_proj":
                return experts.down_proj[int(index)].detach().T
            half = experts.gate_up_proj.shape[2] // 2
            columns = slice(0, half) if last == "gate_proj" else slice(half, None)
            return experts.gate_up_proj[int(index)][:, columns].detach().T
        if last == "softmax_scale":
            return self.text.get_submodule(head).softmax_scale.detach()
        return self.text.get_submodule(name).weight.detach()


Choose = Callable[[str], WeightFormat | None]


def keep(name: str) -> WeightFormat | None:
    """Round nothing."""
    return None


def num_blobs(config: Llama4Config) -> int:
    """How many `blobs` gives."""
    text = config.text
    count = 4
    for i in range(text.num_hidden_layers):
        count += 2 + len(PROJECTIONS) + 1 + _scales(text, i)
        count += 1 + text.num_local_experts if text.is_moe(i) else 0
    return count


def blobs(
    source: Source, config: Llama4Config, choose: Choose = keep, *, is_exact: bool = False
) -> Iterator[Blob]:
    """All blobs. `is_exact`: embeddings and head stay as they are, too."""
    text = config.text
    table = source.read("model.embed_tokens")
    assert isinstance(table, Tensor)
    if is_exact:
        yield Blob.of("embed", table.float())
        yield Blob.of("embed_scale", torch.ones(len(table)))
    else:
        rounded = round_rows(table)
        yield Blob.of("embed", rounded.codes)
        yield Blob.of("embed_scale", rounded.scale.float())
    for i in range(text.num_hidden_layers):
        yield from _layer(source, text, i, choose)
    yield Blob.of("norm", _values(source, "model.norm"))
    yield _weights("head", source, ["lm_head"], choose if is_exact else lambda name: ROWS)


def round_rows(weight: Tensor) -> QuantizedWeight:
    """Int8 with an exact scale a row: nothing else reads it."""
    step = max(1, (1 << 24) // weight.shape[1])
    codes, scales = [], []
    for rows in weight.split(step):
        values = rows.float()
        scale = values.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        codes.append((values / scale).round_().to(torch.int8))
        scales.append(scale)
    return QuantizedWeight(ROWS, torch.cat(codes), torch.cat(scales))


def _scales(text: TextConfig, layer_idx: int) -> bool:
    return text.scalable_softmax and not text.uses_rope(layer_idx)


def _layer(source: Source, text: TextConfig, i: int, choose: Choose) -> Iterator[Blob]:
    name = f"model.layers.{i}"
    yield Blob.of(f"{i}.input_norm", _values(source, f"{name}.input_layernorm"))
    yield Blob.of(f"{i}.post_norm", _values(source, f"{name}.post_attention_layernorm"))
    for proj in PROJECTIONS:
        yield _weights(f"{i}.{proj}", source, [f"{name}.self_attn.{proj}"], choose)
    if _scales(text, i):
        yield Blob.of(f"{i}.softmax_scale", _values(source, f"{name}.self_attn.softmax_scale"))
    mlp = f"{name}.feed_forward"
    if not text.is_moe(i):
        yield _weights(f"{i}.mlp", source, [f"{mlp}.{proj}" for proj in MLP], choose)
        return
    yield Blob.of(f"{i}.router", _values(source, f"{mlp}.router"))
    shared = f"{mlp}.shared_expert"
    yield _weights(f"{i}.mlp", source, [f"{shared}.{proj}" for proj in MLP], choose)
    for e in range(text.num_local_experts):
        names = [f"{mlp}.experts.{e}.{proj}" for proj in MLP]
        yield _weights(f"{i}.experts.{e}", source, names, choose)


def _values(source: Source, name: str) -> Tensor:
    found = source.read(name)
    assert isinstance(found, Tensor), name
    return found.float()


def _weights(name: str, source: Source, modules: list[str], choose: Choose) -> Blob:
    """Some weights in one blob."""
    parts: list[tuple[Layout | None, Tensor]] = []
    for module in modules:
        found = source.read(module)
        format = choose(module)
        if isinstance(found, Tensor) and format is not None:
            found = round_rows(found) if format == ROWS else round_weight(found, format)
        parts.append(laid_out(found))
    return Blob(name, parts)


def laid_out(weight: Tensor | QuantizedWeight) -> tuple[Layout, Tensor]:
    """A weight in the kernels' order, as near to what is stored as there is a kernel for."""
    if isinstance(weight, QuantizedWeight) and weight.format.name == "fp8":
        weight = weight.dequantize(torch.bfloat16)
    if isinstance(weight, QuantizedWeight):
        kind, scale, zero = _as_kernels_have_it(weight)
        return layout_of(kind, weight.codes, scale, zero), lay_out(kind, weight.codes, scale, zero)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    kind = "fp32" if weight.dtype == torch.float32 else "bf16"
    return Layout(kind, *weight.shape), lay_out_values(weight)


def _as_kernels_have_it(weight: QuantizedWeight) -> tuple[str, Tensor, Tensor | None]:
    """The same values in a kind and groups that have a kernel, where there are such.

    out: kind, scale and zero of the same codes
    """
    kind, scale, zero = weight.format.name, weight.scale, weight.zero
    length = weight.shape[1] // scale.shape[1]  # of a group
    is_by_row = scale.shape[1] == 1
    if length in GROUP_SIZES or (kind == "int8" and is_by_row):
        return kind, scale, zero
    fitting = [size for size in GROUP_SIZES if length % size == 0]
    if kind == "int4" and is_by_row and zero is None and not (fitting and is_bf16(scale)):
        return "int8", scale, None  # whose rows have their scale in fp32
    if not fitting:
        return kind, scale, zero  # `lay_out` says what is wrong
    # A long group is several that have the same scale.
    count = length // fitting[-1]
    zero = None if zero is None else zero.repeat_interleave(count, 1)
    return kind, scale.repeat_interleave(count, 1), zero
