"""Tiles made when they are asked for: pictures that are at hand, films as they are decoded.

in: pictures and films in the order of their placeholders; out: slices of tiles, like a tensor's
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import grid_of, tiles_of
from l4cli.data.video import Film, frame_tile
from l4cli.errors import L4Error
from l4cli.text import num_tiles


class TileSource(Protocol):
    """Something that has tiles."""

    num_tiles: int

    def tiles(self, start: int, stop: int) -> np.ndarray:
        """Some of them. shapes: -> float32 [stop - start, 3, S, S]"""


class PictureTiles:
    """A picture cut into tiles, its overview last."""

    def __init__(self, image: Image.Image, geometry: PictureGeometry) -> None:
        self.image, self.geometry = image, geometry
        self.num_tiles = num_tiles(*grid_of(*image.size, geometry))

    def tiles(self, start: int, stop: int) -> np.ndarray:
        """Some of the picture's tiles."""
        return tiles_of(self.image, self.geometry)[start:stop]


class FilmTiles:
    """A film, one tile a frame. Read in order it is decoded once, and nothing is kept."""

    def __init__(self, film: Film, geometry: PictureGeometry, name: str = "") -> None:
        self.film, self.geometry, self.name = film, geometry, name
        self.num_tiles = film.num_frames
        self._frames: Iterator[tuple[float, Image.Image]] = iter(())
        self._next = -1  # the number of the frame that `_frames` gives next

    def tiles(self, start: int, stop: int) -> np.ndarray:
        """The tiles of some frames."""
        if start != self._next:
            self._frames = self.film.frames(start)
        self._next = -1  # of no use any more if the decoder fails
        try:
            found = [frame_tile(next(self._frames)[1], self.geometry) for _ in range(start, stop)]
        except L4Error as error:
            what = f"cannot use the video `{self.name}`" if self.name else error.what
            raise L4Error(what, why=error.why, fix=error.fix) from error
        self._next = stop
        if stop == self.num_tiles:
            self._frames, self._next = iter(()), -1  # closes the file
        return np.concatenate(found)


class Tiles:
    """A sequence of tiles from several sources; `tiles[a:b]` is a tensor."""

    def __init__(self, sources: Sequence[TileSource] = (), first: int = 0) -> None:
        self.sources = tuple(sources)
        self.first = first  # how many tiles of the sources do not belong any more

    def __len__(self) -> int:
        return sum(source.num_tiles for source in self.sources) - self.first

    def __add__(self, other: Tiles) -> Tiles:
        assert other.first == 0
        return Tiles([*self.sources, *other.sources], self.first)

    def __getitem__(self, rows: slice) -> Tensor:
        """shapes: -> float32 [tiles, 3, S, S]"""
        start, stop, step = rows.indices(len(self))
        assert step == 1, rows
        assert start < stop, rows
        start, stop = start + self.first, stop + self.first
        parts, begin = [], 0
        for source in self.sources:
            end = begin + source.num_tiles
            if start < end and begin < stop:
                parts.append(source.tiles(max(start, begin) - begin, min(stop, end) - begin))
            begin = end
        return torch.from_numpy(np.concatenate(parts))

    def last(self, num: int) -> Tiles:
        """The last so many; sources that have none among them are let go."""
        assert 0 <= num <= len(self), (num, len(self))
        first = self.first + len(self) - num
        sources = list(self.sources)
        while sources and first >= sources[0].num_tiles:
            first -= sources.pop(0).num_tiles
        return Tiles(sources, first)
