"""A checkpoint's parameters one at a time, so that memory holds one matrix and not a model.

in: a folder, plain or quantized; out: names, shapes, and values: whole, or of one expert
source: the same matching as `load_weights`
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from l4cli.checkpoint.hf_keys import Piece
from l4cli.checkpoint.quantized import is_quantized, module_of, read_format, read_quantized
from l4cli.checkpoint.reader import DTYPES, LastRead, load_config, matched_pieces
from l4cli.checkpoint.stored import StoredWeights, open_weights, resolve_checkpoint
from l4cli.model import Llama4Config, build_model
from l4cli.quantization import QuantizedWeight, WeightFormat

Columns = tuple[int, int]  # of a fused expert [in, out]


class ParameterReader:
    """Everything headers can tell is checked when it is made."""

    def __init__(self, path: Path | str) -> None:
        self.folder = resolve_checkpoint(path)
        self.config: Llama4Config = load_config(self.folder)
        self.stored: StoredWeights = open_weights(self.folder)
        parameters = build_model(self.config, "meta").named_parameters()
        self.shapes = {name: tuple(p.shape) for name, p in parameters}
        self._pieces: dict[str, list[Piece]] = {name: [] for name in self.shapes}
        for piece in matched_pieces(self.config, self.folder):
            self._pieces[piece.name].append(piece)
        self._read = LastRead(self.stored)

    def dtype(self, name: str) -> torch.dtype:
        """What a parameter is stored in; codes stand for bf16."""
        if self.is_coded(name):
            return torch.bfloat16
        return DTYPES[self.stored.tensors[self._pieces[name][0].key].dtype]

    def is_coded(self, name: str) -> bool:
        """Whether a parameter is stored in codes."""
        return is_quantized(self.stored, module_of(self._pieces[name][0].key))

    def formats(self) -> set[WeightFormat]:
        """The formats of all quantized weights, by headers."""
        modules = [module_of(p.key) for pieces in self._pieces.values() for p in pieces]
        coded = [module for module in modules if is_quantized(self.stored, module)]
        return {read_format(self.stored, module) for module in coded}

    def parts(self, name: str) -> Iterator[Tensor]:
        """A parameter in parts that follow one another in memory: whole, or fused [in, out] by
        expert."""
        shape = self.shapes[name]
        for expert in [None] if len(shape) < 3 else range(shape[0]):
            yield self.part(name, expert)

    def part(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter's values: whole, or of a fused one an expert's [in, out]."""
        key = self._pieces[name][0].key
        if expert is None:
            return self._values(key)
        if self._pieces[name][0].expert is None:
            return self._read(key, expert)
        half = self.shapes[name][2] // 2
        if name.endswith("gate_up_proj"):
            both = [(0, half), (half, 2 * half)]
            maps = [_plain(self.linear(name, expert, columns)) for columns in both]
            return torch.cat([each.T for each in maps], dim=1)
        return _plain(self.linear(name, expert, (0, 2 * half))).T

    def linear(
        self, name: str, expert: int | None = None, columns: Columns = (0, 0)
    ) -> Tensor | QuantizedWeight:
        """A linear map's weight [out, in], in codes where it is stored in codes.

        Of a fused parameter: one expert's, those columns. raises: L4Error for what is not finite
        """
        pieces = self._pieces[name]
        if expert is not None and pieces[0].expert is None:
            start, end = columns
            return self._read(pieces[0].key, expert)[:, start:end].T
        own = [p for p in pieces if p.expert == expert and p.columns == columns]
        (piece,) = own if expert is not None else pieces
        if is_quantized(self.stored, module_of(piece.key)):
            return read_quantized(self.stored, module_of(piece.key))
        return self._read(piece.key)

    def _values(self, key: str) -> Tensor:
        if is_quantized(self.stored, module_of(key)):
            return read_quantized(self.stored, module_of(key)).dequantize()
        return self._read(key)


def _plain(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
