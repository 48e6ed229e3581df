"""A model's weights as the C++ decoder reads them: structures that point into a `KernelFile`.

in: a `KernelFile`, a config; out: `Structures`, which must live as long as the decoder is called
"""

from __future__ import annotations

import ctypes

import src_kernels.cpu as kernels
from l4cli.inference.kernel_file import KernelFile
from l4cli.model import TextConfig
from l4cli.ops.weight_only import KINDS, Layout
from src_kernels.cpu import engine as native


class Structures:
    """A `native.Model` and all it points to."""

    def __init__(self, weights: KernelFile, text: TextConfig, is_prefetched: bool) -> None:
        self.weights = weights
        self.layers = (native.Layer * text.num_hidden_layers)()
        self.kept: list[ctypes.Array[kernels.Weight]] = []
        for i in range(text.num_hidden_layers):
            self._describe_layer(text, i)
        self.model = native.Model(
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            text.num_hidden_layers,
            text.num_local_experts,
            text.num_experts_per_tok,
            text.intermediate_size,
            text.intermediate_size_mlp,
            text.rms_norm_eps,
            is_prefetched,
            self.layers,
            weights.place("norm"),
        )

    def _describe_layer(self, text: TextConfig, i: int) -> None:
        weights, layer = self.weights, self.layers[i]
        for letter in "qkvo":
            setattr(layer, letter, described_weights(weights, f"{i}.{letter}_proj")[0][0])
        layer.input_norm = weights.place(f"{i}.input_norm")
        layer.post_norm = weights.place(f"{i}.post_norm")
        layer.uses_rope = text.uses_rope(i)
        layer.turn = 0 if text.is_local(i) else 1
        layer.unit_norm = text.rope_of(i).use_qk_norm
        if text.scalable_softmax and not text.uses_rope(i):
            layer.softmax_scale = weights.place(f"{i}.softmax_scale")
        layer.gate, layer.up, layer.down = (w for w, _ in described_weights(weights, f"{i}.mlp"))
        layer.is_moe = text.is_moe(i)
        if text.is_moe(i):
            layer.router = weights.place(f"{i}.router")
            experts = (kernels.Weight * (3 * text.num_local_experts))()
            for e in range(text.num_local_experts):
                for j, (weight, _) in enumerate(described_weights(weights, f"{i}.experts.{e}")):
                    experts[3 * e + j] = weight
            self.kept.append(experts)
            layer.experts = experts


def described_weights(file: KernelFile, name: str) -> list[tuple[kernels.Weight, int]]:
    """The weights of a blob as C reads them, and the form of rows each wants."""
    return [(_weight(layout, address), _form(layout)) for layout, address in file.weights(name)]


def _weight(layout: Layout, address: int) -> kernels.Weight:
    shape = (layout.num_outputs, layout.num_inputs)
    return kernels.Weight(
        address, KINDS[layout.kind], *shape, layout.group_size, int(layout.has_zero)
    )


def _form(layout: Layout) -> int:
    forms = {"fp32": kernels.AS_FP32, "bf16": kernels.AS_BF16}
    return forms.get(layout.kind, kernels.AS_INT8)
