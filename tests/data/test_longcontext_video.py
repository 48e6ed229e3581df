"""Films and albums with a needle: found again by looking at the decoded pixels."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from l4cli.data.geometry import PictureGeometry
from l4cli.data.longcontext import video
from l4cli.data.longcontext.video import (
    COLOURS,
    AlbumPlan,
    FilmPlan,
    make_video_sample,
    number_picture,
    write_film,
)
from l4cli.data.media import open_picture, tiles_of
from l4cli.data.video import Sampling, sample_frames
from l4cli.errors import L4Error, UsageError

SMALL = PictureGeometry(image_size=64, patch_size=8)


def sample_of(task: str, num_frames: int, *depths: float, seed: int = 0, fps: float = 1.0):
    rng = np.random.default_rng(seed)
    return make_video_sample(task, num_frames=num_frames, depths=depths, fps=fps, side=64, rng=rng)


def number_on(pixels: np.ndarray) -> str | None:
    """The number whose drawing a frame is nearest to, if it is near any."""
    away = {}
    for value in range(10, 100):
        drawn = np.asarray(number_picture(str(value), pixels.shape[0]), np.int64)
        away[str(value)] = np.abs(drawn - pixels).mean()
    nearest = min(away, key=away.__getitem__)
    return nearest if away[nearest] < 8 else None


def colour_of(pixels: np.ndarray) -> str | None:
    """The name of the colour that fills a frame."""
    for name, colour in COLOURS.items():
        if np.abs(pixels.astype(np.int64) - colour).max() <= 12:
            return name
    return None


@pytest.mark.parametrize("fps", [1.0, 0.3, 2.5, 0.0123])
@pytest.mark.parametrize(("task", "find"), [("video", number_on), ("video-colour", colour_of)])
def test_the_needle_is_where_it_should_be(tmp_path, task, find, fps) -> None:
    for depth, place in ((0, 0), (50, 4), (100, 8)):
        sample = sample_of(task, 9, depth, seed=depth, fps=fps)
        plan, (question,) = sample.shown, sample.questions
        assert isinstance(plan, FilmPlan)
        assert plan.places == (place,)
        write_film(plan, tmp_path / "a.mov")
        frames = list(sample_frames(tmp_path / "a.mov", float(plan.rate)))
        found = [find(np.asarray(image)) for _, image in frames]
        assert found == [question.answers[0] if i == place else None for i in range(9)]
        write_film(plan, tmp_path / "b.mov", is_whole=False)
        frames = list(sample_frames(tmp_path / "b.mov", float(plan.rate)))
        assert [find(np.asarray(image)) for _, image in frames] == [None] * 9


def test_films_go_the_real_way(tmp_path) -> None:
    """The source's tiles are those of the file that lies in the folder."""
    sample = sample_of("video", 7, 50)
    source = sample.shown.source(tmp_path, SMALL, is_whole=True)
    (path,) = tmp_path.iterdir()
    want = [tiles_of(image, SMALL) for _, image in sample_frames(path, 1.0)]
    assert source.num_tiles == 7
    tiles = source.tiles(0, 7)
    assert np.abs(tiles - np.concatenate(want)).mean() < 4 / 127.5  # a JPEG between them
    bright = (tiles > 0.9).mean(axis=(1, 2, 3))
    assert int(bright.argmax()) == 3


def test_pictures_have_their_numbers() -> None:
    sample = sample_of("pictures", 5, 0, 50, 100)
    album = sample.shown
    assert isinstance(album, AlbumPlan)
    asked = [question.prompt for question in sample.questions]
    assert asked == [f"Which number is in picture {i}?\n" for i in (1, 3, 5)]
    for question, place in zip(sample.questions, album.places, strict=True):
        ink = np.asarray(open_picture(album.picture(place))).min(axis=2) < 200
        assert number_on(255 - 255 * np.repeat(ink[..., None], 3, 2)) == question.answers[0]
        blank = np.asarray(open_picture(album.picture(place, is_whole=False)))
        assert (blank == 255).all()
    source = album.source(Path(), SMALL, is_whole=True)
    want = np.concatenate([tiles_of(open_picture(album.picture(i)), SMALL) for i in range(1, 4)])
    assert np.array_equal(source.tiles(1, 4), want)


def test_samples_follow_from_the_random_state() -> None:
    first, again = (sample_of("video", 50, 30, seed=3) for _ in range(2))
    assert first == again
    values = {sample_of("video", 50, 30, seed=seed).questions[0].answers[0] for seed in range(40)}
    assert len(values) > 20
    with pytest.raises(UsageError, match="nothing to find"):
        sample_of("video", 1, 0)
    rng = np.random.default_rng(0)
    other = make_video_sample(
        "pictures", num_frames=4, depths=(100,), fps=1, side=64, rng=rng, question="No. {picture}?"
    )
    assert other.questions[0].prompt == "No. 4?\n"


def test_the_first_codec_there_is(tmp_path, monkeypatch) -> None:
    sample = sample_of("video", 4, 100)
    for codec in ("mpeg4", "mjpeg"):
        monkeypatch.setattr(video, "CODECS", ("no such codec", codec))
        write_film(sample.shown, tmp_path / "a.mov")
        frames = list(sample_frames(tmp_path / "a.mov", 1.0))
        found = [number_on(np.asarray(image)) for _, image in frames]
        assert found == [None, None, None, sample.questions[0].answers[0]]
    monkeypatch.setattr(video, "CODECS", ("no such codec",))
    with pytest.raises(L4Error, match="cannot write videos"):
        write_film(sample.shown, tmp_path / "a.mov")


def test_memory_does_not_grow_with_the_film(tmp_path) -> None:
    """Written and read, a film of ten times the length takes no more."""

    def peak_after(num_frames: int) -> int:
        rng = np.random.default_rng(0)
        sample = make_video_sample(
            "video", num_frames=num_frames, depths=(50,), fps=1, side=128, rng=rng
        )
        source = sample.shown.source(tmp_path, SMALL, is_whole=True)
        for start in range(0, num_frames, 20):
            source.tiles(start, start + 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    short = peak_after(100)
    # Its pictures alone would be 90 MiB.
    assert peak_after(1000) - short < 12 << 10


def test_sampling_of_a_film_needs_no_limit(tmp_path) -> None:
    sample = sample_of("video", 200, 100)
    source = sample.shown.source(tmp_path, SMALL, is_whole=True)
    assert source.num_tiles == 200 > Sampling().max_frames
