"""One frame of the token stream: a batch of documents with their pictures, masks and labels.

in: numpy arrays and encoded media; out: the same as named tensors, and back, checked
source: DESIGN.md section 2

Tensors: `tokens` U32 [n], `offsets` I64 [documents+1]; where any document has them `loss_mask`
U8 [n]; `media` U8 [bytes], `media_offsets` I64 [m+1], `media_positions` I64 [m], `media_tiles`
I32 [m,2]; `label.NAME` I32 [documents] (-1: no value), whose values stand in the metadata.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from l4cli.data.geometry import PictureGeometry

Labels = dict[str, tuple[np.ndarray, list[str]]]


def _no_positions() -> np.ndarray:
    return np.zeros(0, np.int64)


def _no_tiles() -> np.ndarray:
    return np.zeros((0, 2), np.int32)


@dataclass
class Frame:
    """A batch of documents; `is_open`: the last one goes on as the next frame's first."""

    tokens: np.ndarray  # uint32 [n]
    offsets: np.ndarray  # int64 [documents+1], from 0 to n
    loss_mask: np.ndarray | None = None  # uint8 [n]; 1: this token counts as a target
    media: list[bytes] = field(default_factory=list)  # encoded, as they were found
    media_positions: np.ndarray = field(default_factory=_no_positions)  # int64 [m]
    media_tiles: np.ndarray = field(default_factory=_no_tiles)  # int32 [m,2]: rows, cols
    labels: Labels = field(default_factory=dict)  # name -> codes int32 [documents], values
    is_open: bool = False

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def to_tensors(self) -> dict[str, np.ndarray]:
        """The frame's arrays by the names they have on disk."""
        tensors = {"tokens": self.tokens, "offsets": self.offsets}
        if self.loss_mask is not None:
            tensors["loss_mask"] = self.loss_mask
        if self.media:
            ends = np.cumsum([len(item) for item in self.media])
            tensors["media"] = np.frombuffer(b"".join(self.media), np.uint8)
            tensors["media_offsets"] = np.concatenate([[0], ends]).astype(np.int64)
            tensors["media_positions"] = self.media_positions
            tensors["media_tiles"] = self.media_tiles
        for name, (codes, _) in self.labels.items():
            tensors[f"label.{name}"] = codes
        return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], label_values: Mapping[str, list[str]], is_open: bool
    ) -> Frame:
        """Put a frame together from named tensors; raises ValueError saying what does not fit."""
        for name in ("tokens", "offsets"):
            if name not in tensors:
                raise ValueError(f"`{name}` is missing")
        labels: Labels = {}
        for name, values in label_values.items():
            if f"label.{name}" not in tensors:
                raise ValueError(f"label `{name}` has values but no codes")
            labels[name] = (tensors[f"label.{name}"], values)
        return cls(
            tokens=tensors["tokens"],
            offsets=tensors["offsets"],
            loss_mask=tensors.get("loss_mask"),
            media=_media_of(tensors),
            media_positions=tensors.get("media_positions", _no_positions()),
            media_tiles=tensors.get("media_tiles", _no_tiles()),
            labels=labels,
            is_open=is_open,
        )

    def problem(self, vocab_size: int, geometry: PictureGeometry) -> str | None:
        """Say what is wrong with the frame, if anything; the same test for writer and reader."""
        tokens, offsets = self.tokens, self.offsets
        if tokens.dtype != np.uint32 or tokens.ndim != 1:
            return "`tokens` is not a list of U32"
        if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 1:
            return "`offsets` is not a list of I64"
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
            return f"`offsets` do not rise from 0 to {len(tokens)}"
        if len(tokens) and int(tokens.max()) >= vocab_size:
            return f"token id {int(tokens.max())} is not below the vocabulary size {vocab_size}"
        mask = self.loss_mask
        if mask is not None and (mask.dtype != np.uint8 or mask.shape != tokens.shape):
            return "`loss_mask` does not fit `tokens`"
        for name, (codes, values) in self.labels.items():
            if codes.dtype != np.int32 or codes.shape != (self.num_documents,):
                return f"label `{name}` does not fit the documents"
            if len(codes) and not -1 <= int(codes.min()) <= int(codes.max()) < len(values):
                return f"label `{name}` has codes without a value"
        return self._media_problem(geometry)

    def _media_problem(self, geometry: PictureGeometry) -> str | None:
        positions, tiles_M2, num = self.media_positions, self.media_tiles, len(self.media)
        if positions.dtype != np.int64 or positions.shape != (num,):
            return f"`media_positions` does not fit {num} media"
        if tiles_M2.dtype != np.int32 or tiles_M2.shape != (num, 2):
            return f"`media_tiles` does not fit {num} media"
        if num == 0:
            return None
        counts = tiles_M2.astype(np.int64).prod(axis=1)
        if int(tiles_M2.min()) < 1 or int(counts.max()) > geometry.max_patches:
            return f"`media_tiles` has grids outside 1 to {geometry.max_patches} tiles"
        counts += counts > 1  # the global tile
        if int(positions.min()) < 0 or (np.diff(positions) <= 0).any():
            return "`media_positions` do not rise"
        ends = positions + counts * geometry.tokens_per_tile
        documents = np.searchsorted(self.offsets, positions, side="right") - 1
        limits = self.offsets[np.minimum(documents + 1, self.num_documents)]
        if (ends > limits).any() or (ends[:-1] > positions[1:]).any():
            return "a picture's placeholders reach past its document or into the next picture"
        return None


def _media_of(tensors: Mapping[str, np.ndarray]) -> list[bytes]:
    if "media" not in tensors:
        return []
    media, offsets = tensors["media"], tensors.get("media_offsets")
    if offsets is None or offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 1:
        raise ValueError("`media_offsets` is not a list of I64")
    if media.dtype != np.uint8 or media.ndim != 1:
        raise ValueError("`media` is not a list of U8")
    if offsets[0] != 0 or offsets[-1] != len(media) or (np.diff(offsets) < 0).any():
        raise ValueError(f"`media_offsets` do not rise from 0 to {len(media)}")
    return [media[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
