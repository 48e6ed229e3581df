"""Take rows of text through a model layer by layer: one layer's weights are there at a time.

in: a model without its layers and batches of packed rows; out: the states after each layer
Unlike `layer_major`, which reads one long text with a cache, rows stand by themselves here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4cli.inference.layer_major import hidden_states, open_streamed, resident_layer
from l4cli.model.text import DecoderLayer, LayerInput, TextModel
from l4cli.ops.batch import Batch
from l4cli.ops.moe import Routing


@dataclass(frozen=True)
class Piece:
    """One batch of the text and its place among the states."""

    batch: Batch
    rows: slice
    is_real_M: Tensor  # bool: no padding


class TextWalk:
    """The states of all rows, and how to move them through a layer.

    The weights come from the checkpoint, as stored unless `dtype` says otherwise; `states`:
    `memory`, or a file that is removed afterwards. Used as a context.
    """

    def __init__(
        self,
        checkpoint: Path,
        batches: Sequence[Batch],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        states: str | Path = "memory",
    ) -> None:
        self.checkpoint = checkpoint
        self.model = open_streamed(checkpoint, device, dtype)
        self.text: TextModel = getattr(self.model, "language_model", self.model).model
        self.device = torch.device(device)
        self._stack = ExitStack()
        self._pieces, start = [], 0
        for batch in batches:
            rows = slice(start, start + batch.input_ids.numel())
            self._pieces.append(Piece(batch, rows, batch.document_ids.flatten() != 0))
            start = rows.stop
        self.is_real_M = torch.cat([piece.is_real_M for piece in self._pieces])
        width, kind = self.text.config.hidden_size, self.model.compute_dtype
        self.hidden_MD = self._stack.enter_context(hidden_states(states, start, width, kind))
        self._embed()

    def __enter__(self) -> TextWalk:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def layer(self, layer_idx: int) -> DecoderLayer:
        """A layer; its weights are here within `resident` only."""
        layer = self.text.layers[layer_idx]
        assert isinstance(layer, DecoderLayer)
        return layer

    @property
    def num_layers(self) -> int:
        return len(self.text.layers)

    @property
    def pieces(self) -> list[Piece]:
        return self._pieces

    def states(self, piece: Piece) -> Tensor:
        """The states of a piece where the model computes. shapes: -> h_BTD"""
        shape = piece.batch.input_ids.shape
        return self.hidden_MD[piece.rows].to(self.device).unflatten(0, shape)

    def keep(self, piece: Piece, h_BTD: Tensor) -> None:
        """Put a piece's states back."""
        self.hidden_MD[piece.rows] = h_BTD.flatten(0, 1).to(self.hidden_MD.device)

    def layer_input(
        self, piece: Piece, h_BTD: Tensor, routing: Routing | None = None
    ) -> LayerInput:
        """What a layer takes beside the states."""
        return self.text.layer_input(h_BTD, piece.batch.to(self.device), routing)

    def resident(self, layer_idx: int) -> Any:
        """A context in which a layer has its weights."""
        return resident_layer(self.model, layer_idx, self.checkpoint)

    @torch.no_grad()
    def pass_layer(self, layer_idx: int, routing: Routing | None = None) -> None:
        """Take all rows through one layer."""
        with self.resident(layer_idx):
            for piece in self._pieces:
                h_BTD = self.states(piece)
                layer = self.layer(layer_idx)
                self.keep(piece, layer(h_BTD, self.layer_input(piece, h_BTD, routing)))

    @torch.no_grad()
    def normed(self) -> Iterator[tuple[Piece, Tensor]]:
        """After the last layer: what the head reads, piece by piece. shapes: -> h_MD"""
        for piece in self._pieces:
            yield piece, self.text.norm(self.states(piece)).flatten(0, 1)

    @torch.no_grad()
    def _embed(self) -> None:
        for piece in self._pieces:
            self.keep(piece, self.model.embed(piece.batch.input_ids.to(self.device)))
