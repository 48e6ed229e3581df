"""Pictures and videos that people name: opened, described, in the order they were named.

in: paths; out: `Picture`s and `Video`s ready to be shown; raises L4Error that says which file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from l4cli.data.geometry import PictureGeometry
from l4cli.data.tiles import FilmTiles, PictureTiles, TileSource
from l4cli.data.video import Film
from l4cli.text import num_tiles


@dataclass(frozen=True)
class Picture:
    """A picture the model is about to see."""

    name: str
    image: Image.Image
    grid: tuple[int, int]
    num_tokens: int

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The grid of each block of placeholders."""
        return [self.grid]

    def source(self, geometry: PictureGeometry) -> TileSource:
        """Its tiles, made when they are asked for."""
        return PictureTiles(self.image, geometry)

    def describe(self) -> str:
        """One line: what it is, how it is cut, what it costs."""
        width, height = self.image.size
        rows, cols = self.grid
        tiles = num_tiles(rows, cols)
        cut = "1 tile" if tiles == 1 else f"{tiles} tiles ({rows} x {cols} and an overview)"
        return f"picture `{self.name}`: {width} x {height}, {cut}, {self.num_tokens} tokens"


@dataclass(frozen=True)
class Video:
    """A video the model is about to see, as its sampled frames."""

    name: str
    film: Film
    num_tokens: int

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The grid of each block of placeholders: one tile a frame."""
        return [(1, 1)] * self.film.num_frames

    def source(self, geometry: PictureGeometry) -> TileSource:
        """Its tiles, decoded while they are read."""
        return FilmTiles(self.film, geometry, self.name)

    def describe(self) -> str:
        """One line: what it is, how it is sampled, what it costs."""
        return f"video `{self.name}`: {self.film.describe()}, {self.num_tokens} tokens"


Shown = Picture | Video


def named_in_order(
    words: Sequence[str], images: Sequence[Path], videos: Sequence[Path]
) -> list[tuple[str, Path]]:
    """`image` or `video` with each path, in the order of the command line.

    Options hand over their own values alone, so the order comes from the words; where those tell
    something else (a question that reads `--video`), pictures come first.
    """
    kinds = []
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if name in ("--image", "--video"):
            kinds.append(name[2:])
    if (kinds.count("image"), kinds.count("video")) != (len(images), len(videos)):
        kinds = ["image"] * len(images) + ["video"] * len(videos)
    waiting = {"image": iter(images), "video": iter(videos)}
    return [(kind, next(waiting[kind])) for kind in kinds]
