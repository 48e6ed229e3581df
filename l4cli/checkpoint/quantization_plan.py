"""What becomes of each tensor of a checkpoint that is to be quantized, from headers alone.

in: a plain folder and a format for each part; out: `QuantizationPlan`
source: facts on quantized Llama 4 checkpoints
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from l4cli.checkpoint.coded_tensors import coded_specs
from l4cli.checkpoint.compressed_tensors import config_text
from l4cli.checkpoint.hf_keys import Piece
from l4cli.checkpoint.linear_maps import LinearMap, linear_maps
from l4cli.checkpoint.reader import DTYPES, load_config, matched_pieces
from l4cli.checkpoint.stored import StoredWeights, open_weights, resolve_checkpoint
from l4cli.checkpoint.tensor_file import Spec, spec_bytes
from l4cli.errors import L4Error
from l4cli.model import Llama4Config
from l4cli.quantization import WeightFormat, divides


@dataclass(frozen=True)
class QuantizationPlan:
    """What becomes of each tensor. `choices` may be changed before the work starts."""

    stored: StoredWeights
    config: Llama4Config
    maps: list[LinearMap]  # in the order of the layers, those outside the decoder last
    others: list[Piece]  # norms, biases, embeddings
    choices: dict[str, WeightFormat]  # by module name; a map that is not here stays as it is
    left: dict[str, str]  # maps that were to be quantized -> why they are not

    def layers(self) -> list[tuple[int | None, list[LinearMap]]]:
        """Each decoder layer's maps in order; under None, last, all others."""
        layers: dict[int | None, list[LinearMap]] = {}
        for each in self.maps:
            layers.setdefault(each.layer_idx, []).append(each)
        return list(layers.items())

    def specs(self) -> dict[str, Spec]:
        """The tensors of the new folder."""
        specs = {piece.name: self._plain_spec(piece.key, piece.shape) for piece in self.others}
        for each in self.maps:
            specs |= self.map_specs(each)
        return specs

    def map_specs(self, each: LinearMap) -> dict[str, Spec]:
        """The tensors of one map."""
        format = self.choices.get(each.name)
        if format is None:
            return {f"{each.name}.weight": self._plain_spec(each.key, each.shape, each.part)}
        return coded_specs(each.name, format, each.shape)

    def format_text(self, each: LinearMap) -> str:
        """How a map is stored, in a word or two."""
        format = self.choices.get(each.name)
        if format is not None:
            return str(format)
        ((_, (dtype, _)),) = self.map_specs(each).items()
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]

    @property
    def num_parameters(self) -> int:
        return self.stored.num_parameters

    @property
    def num_quantized(self) -> int:
        """Weights that become codes."""
        return sum(m.shape[0] * m.shape[1] for m in self.maps if m.name in self.choices)

    @property
    def size_bytes(self) -> int:
        """Of the new folder's tensors."""
        return sum(map(spec_bytes, self.specs().values()))

    @property
    def bits_per_weight(self) -> float:
        """Everything stored, over everything there is: also what stays as it is."""
        return 8 * self.size_bytes / self.num_parameters

    @property
    def bits_per_quantized_weight(self) -> float:
        """Codes, scales and zero points over the weights they stand for."""
        chosen = [each for each in self.maps if each.name in self.choices]
        size = sum(spec_bytes(spec) for each in chosen for spec in self.map_specs(each).values())
        return 8 * size / self.num_quantized

    def _plain_spec(self, key: str, shape: tuple[int, ...], part: str = "") -> Spec:
        """Matrices become bf16; norms, biases and routers stay as exact as they are."""
        dtype = DTYPES[self.stored.tensors[key].dtype]
        is_narrowed = dtype.itemsize > 2 and len(shape) > 1 and part != "router"
        return (torch.bfloat16 if is_narrowed else dtype), shape


def plan_quantization(
    path: Path | str, formats: Mapping[str, WeightFormat | None]
) -> QuantizationPlan:
    """Decide by headers alone; `formats` by part (`quantization.parts`), absent parts stay.

    raises: L4Error when the checkpoint is quantized already, or nothing in it can be
    """
    folder = resolve_checkpoint(path)
    config = load_config(folder, allow_quantized=True)
    stored = open_weights(folder)
    if stored.quantization:
        why = f"it is quantized already: {config_text(stored.quantization)}"
        fix = "pass the bf16 or fp32 checkpoint it was made from"
        raise L4Error(f"cannot quantize `{folder}`", why=why, fix=fix)
    pieces = matched_pieces(config, folder)
    maps = [each for piece in pieces for each in linear_maps(piece)]
    others = [piece for piece in pieces if not linear_maps(piece)]
    maps.sort(key=_place)
    choices, left = {}, {}
    for each in maps:
        format = formats.get(each.part)
        if format is not None and divides(format, each.shape[1]):
            choices[each.name] = format
        elif format is not None:
            left[each.name] = f"its {each.shape[1]} inputs are no whole groups of {format}"
    if not choices:
        raise _nothing(folder, left)
    return QuantizationPlan(stored, config, maps, others, choices, left)


def _nothing(folder: Path, left: Mapping[str, str]) -> L4Error:
    what = f"cannot quantize `{folder}`"
    if not left:
        why = "every part is left as it is"
        return L4Error(what, why=why, fix="choose a format for a part, as in `--experts int4`")
    name, reason = next(iter(left.items()))
    why = f"no linear map can be: `{name}`: {reason}"
    return L4Error(what, why=why, fix="choose a smaller `--group-size`, or another format")


def _place(each: LinearMap) -> tuple[float, str, int, str]:
    """Layer by layer, expert by expert."""
    layer = each.layer_idx
    head, _, tail = each.name.partition(".experts.")
    expert, _, proj = tail.partition(".")
    if not tail:
        return (float("inf") if layer is None else layer, each.name, -1, "")
    return (float("inf") if layer is None else layer, head, int(expert), proj)
