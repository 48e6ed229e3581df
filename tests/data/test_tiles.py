"""Tiles made on demand: slices equal those of all tiles at once, and films are decoded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from film_samples import grey, save_film
from PIL import Image

from l4cli.data import video
from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import tiles_of
from l4cli.data.tiles import FilmTiles, PictureTiles, Tiles
from l4cli.data.video import Sampling, frame_tile, open_film

SMALL = PictureGeometry(image_size=16, patch_size=4, max_patches=4)


@pytest.fixture
def film(tmp_path) -> video.Film:
    path = save_film(tmp_path / "a.mp4", (grey(5 * i) for i in range(50)))
    return open_film(path, Sampling(fps=2))


def test_slices_equal_all_tiles_at_once(film) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    tiles = Tiles([PictureTiles(image, SMALL), FilmTiles(film, SMALL)])
    tiles += Tiles([PictureTiles(image, SMALL)])
    of_image = tiles_of(image, SMALL)
    of_film = [frame_tile(frame, SMALL) for _, frame in film.frames()]
    want = torch.from_numpy(np.concatenate([of_image, *of_film, of_image]))
    assert len(tiles) == len(want) == 5 + 10 + 5
    assert torch.equal(tiles[0:20], want)
    for _ in range(30):
        start = int(rng.integers(0, 20))
        stop = int(rng.integers(start + 1, 21))
        assert torch.equal(tiles[start:stop], want[start:stop]), (start, stop)
    for num in (20, 17, 12, 5, 3, 1):
        rest = tiles.last(num)
        assert len(rest) == num
        assert torch.equal(rest[0:num], want[-num:]), num
    assert len(tiles.last(0)) == 0
    assert len(tiles.last(5).sources) == 1


def test_a_film_read_in_order_is_opened_once(film, monkeypatch) -> None:
    opened = []
    frames = video.Film.frames

    def counted(self, start=0):
        opened.append(start)
        return frames(self, start)

    monkeypatch.setattr(video.Film, "frames", counted)
    tiles = Tiles([FilmTiles(film, SMALL)])
    for start in range(0, 10, 2):
        tiles[start : start + 2]
    assert opened == [0]
    tiles[4:6]
    assert opened == [0, 4]
