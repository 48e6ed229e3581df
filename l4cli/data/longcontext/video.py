"""Films and albums with something to find: drawn, written as a real video, asked for.

in: how many frames or pictures, a depth, random state; out: a `ShownSample` whose film is written
frame by frame when it is wanted, so that hours of it take no more memory than a second
source: the needle is one frame among many, as in Gemini 1.5's video haystack (one overlaid text in
a film of hours) and VideoNIAH (an odd picture at a depth)
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from PIL import Image, ImageDraw

from l4cli.data.geometry import PictureGeometry
from l4cli.data.longcontext.sample import Question, Sample
from l4cli.data.media import open_picture, tiles_of
from l4cli.data.tiles import FilmTiles, TileSource
from l4cli.data.video import Sampling, open_film
from l4cli.errors import L4Error, UsageError

TASKS = {
    "video": "a number on one frame of a film, at each depth",
    "video-colour": "one frame of a single colour, at each depth",
    "pictures": "a number on each of several pictures, asked for by its place",
}
QUESTIONS = {
    "video": "One frame of the video shows a number. Which number is it?",
    "video-colour": "One frame of the video is a single colour. Which colour is it?",
    "pictures": "Which number is in picture {picture}?",
}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "orange": (240, 140, 20),
    "purple": (140, 40, 170),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
}
# The first that this build of FFmpeg can write.
CODECS = ("libx264", "mpeg4", "mjpeg")
FRAMES_PER_SAMPLE = 2  # a sampled frame is on the screen for so many of the film's
MIN_SIDE = 32
# Rows of five pixels, the lowest bit on the right.
_DIGITS = (
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 6, 8, 16, 31),
    (30, 1, 1, 14, 1, 1, 30),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)
_FRAMES, _EVIDENCE = "frames", "evidence"  # the pieces of a sample: what is shown, what is sought


class Shown(Protocol):
    """What a model is shown: so many blocks of one tile."""

    @property
    def num_frames(self) -> int:
        """Blocks of one tile."""

    def source(self, folder: Path, geometry: PictureGeometry, *, is_whole: bool) -> TileSource:
        """Its tiles; `is_whole`: with what is sought. Files go into the folder."""

    @property
    def places(self) -> tuple[int, ...]:
        """For each question the number of the frame that holds what is sought."""


@dataclass(frozen=True)
class ShownSample(Sample):
    """A sample whose text is pictures; its two pieces are names: the frames, what is sought."""

    shown: Shown | None = None

    @property
    def is_whole(self) -> bool:
        """Whether what is sought is in it."""
        return _EVIDENCE in self.pieces


@dataclass(frozen=True)
class FilmPlan:
    """A film of moving shapes, one sampled frame of it the needle."""

    num_frames: int  # as sampled
    fps: float  # of the sampling
    side: int
    seed: int
    needle_at: int  # among the sampled frames
    value: str  # a number, or the name of a colour

    @property
    def rate(self) -> Fraction:
        """Sampled frames a second, as a fraction that files can hold."""
        return Fraction(self.fps).limit_denominator(1000)

    @property
    def places(self) -> tuple[int, ...]:
        """The needle's frame."""
        return (self.needle_at,)

    def source(self, folder: Path, geometry: PictureGeometry, *, is_whole: bool) -> TileSource:
        """Write the film, then sample it as any other."""
        path = folder / "film.mov"
        write_film(self, path, is_whole=is_whole)
        film = open_film(path, Sampling(float(self.rate), None))
        assert film.num_frames == self.num_frames, (film.num_frames, self.num_frames)
        return FilmTiles(film, geometry)

    def needle(self) -> Image.Image:
        """The needle's frame."""
        if self.value in COLOURS:
            return Image.new("RGB", (self.side, self.side), COLOURS[self.value])
        return number_picture(self.value, self.side)


@dataclass(frozen=True)
class AlbumPlan:
    """Pictures with a number on each."""

    num_frames: int
    side: int
    numbers: np.ndarray  # int64 [num_frames]
    places: tuple[int, ...]  # which of them are asked for

    def source(self, folder: Path, geometry: PictureGeometry, *, is_whole: bool) -> TileSource:
        """Pictures drawn and decoded while they are read; without evidence the asked are blank."""
        assert self.side <= geometry.image_size, "one tile each"
        return _AlbumTiles(self, geometry, is_whole)

    def picture(self, i: int, *, is_whole: bool = True) -> bytes:
        """One of them as a PNG."""
        is_blank = not is_whole and i in self.places
        text = "" if is_blank else f"{self.numbers[i]:02d}"
        inks = list(COLOURS.values())[:6]
        file = io.BytesIO()
        number_picture(text, self.side, ink=inks[i % len(inks)]).save(file, "PNG")
        return file.getvalue()


class _AlbumTiles:
    def __init__(self, album: AlbumPlan, geometry: PictureGeometry, is_whole: bool) -> None:
        self.album, self.geometry, self.is_whole = album, geometry, is_whole
        self.num_tiles = album.num_frames

    def tiles(self, start: int, stop: int) -> np.ndarray:
        """Some of the pictures, each one tile. shapes: -> float32 [stop - start, 3, S, S]"""
        pictures = [self.album.picture(i, is_whole=self.is_whole) for i in range(start, stop)]
        return np.concatenate([tiles_of(open_picture(data), self.geometry) for data in pictures])


def number_picture(
    text: str, side: int, ink: tuple[int, int, int] = (0, 0, 0), ground: int = 255
) -> Image.Image:
    """Digits in large square pixels on a plain ground."""
    cell = max(1, side // max(6 * len(text) + 1, 9))
    picture = Image.new("RGB", (side, side), (ground,) * 3)
    left, top = (side - cell * (6 * len(text) - 1)) // 2, (side - 7 * cell) // 2
    draw = ImageDraw.Draw(picture)
    for place, digit in enumerate(map(int, text)):
        for row, bits in enumerate(_DIGITS[digit]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    x, y = left + (6 * place + column) * cell, top + row * cell
                    draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=ink)
    return picture


class _Shapes:
    """Coloured shapes that wander and bounce: where they are follows from the time alone."""

    def __init__(self, plan: FilmPlan) -> None:
        rng = np.random.default_rng([plan.seed, plan.num_frames])
        self.side, num = plan.side, int(rng.integers(2, 5))
        self.ground = tuple(int(level) for level in rng.integers(60, 150, 3))
        self.colours = rng.permutation(list(COLOURS))[:num]
        self.kinds = rng.integers(0, 3, num)
        self.sizes = rng.uniform(0.15, 0.4, num)
        self.phases = rng.uniform(0, 2, (num, 2))
        self.speeds = rng.uniform(0.05, 0.3, (num, 2))  # sides a second

    def frame(self, time_s: float) -> Image.Image:
        """The picture at a time."""
        picture = Image.new("RGB", (self.side, self.side), self.ground)
        draw = ImageDraw.Draw(picture)
        for i, name in enumerate(self.colours):
            size = self.sizes[i] * self.side
            # There and back again: a wave of straight flanks.
            wave = np.abs((self.phases[i] + self.speeds[i] * time_s) % 2 - 1)
            x, y = (float(place) for place in wave * (self.side - size))
            box, fill = (x, y, x + size, y + size), COLOURS[str(name)]
            if self.kinds[i] == 0:
                draw.rectangle(box, fill=fill)
            elif self.kinds[i] == 1:
                draw.ellipse(box, fill=fill)
            else:
                draw.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill=fill)
        return picture


def write_film(plan: FilmPlan, path: Path, *, is_whole: bool = True) -> None:
    """Encode a film, one frame at a time; without its needle if it is not whole.

    raises: L4Error where no codec can be written, or the disk is full
    """
    shapes, needle = _Shapes(plan), plan.needle()
    rate = plan.rate * FRAMES_PER_SAMPLE
    try:
        with av.open(str(path), "w") as container:
            stream = _stream(container, rate, plan.side)
            for i in range(plan.num_frames * FRAMES_PER_SAMPLE):
                is_needle = is_whole and i // FRAMES_PER_SAMPLE == plan.needle_at
                picture = needle if is_needle else shapes.frame(float(i / rate))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        why = (error.strerror or str(error)).lower()
        fix = "free some space there, or name another place: `TMPDIR=/large l4 ...`"
        raise L4Error(f"cannot write the film `{path}`", why=why, fix=fix) from error


def _stream(container: Any, rate: Fraction, side: int) -> Any:
    codec = next((name for name in CODECS if _can_write(name)), None)
    if codec is None:
        why = f"its FFmpeg has none of {', '.join(CODECS)}"
        raise L4Error("PyAV cannot write videos here", why=why, fix="`pip install --upgrade av`")
    stream = container.add_stream(codec, rate=rate)
    stream.width = stream.height = side
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    if codec == "libx264":
        stream.options = {"preset": "ultrafast", "crf": "18"}
    else:
        stream.bit_rate = 8_000_000
    return stream


def _can_write(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except (ValueError, av.error.FFmpegError):
        return False
    return True


def make_video_sample(
    task: str,
    *,
    num_frames: int,
    depths: Sequence[float],
    fps: float,
    side: int,
    rng: np.random.Generator,
    question: str | None = None,
) -> ShownSample:
    """A film or an album with its questions; nothing is drawn yet.

    `depths`: where in it what is asked for lies, in percent; a film has one needle and one depth.
    raises: UsageError where there are fewer frames than it takes to hide one
    """
    if num_frames < 2:
        why = "among fewer than 2 there is nothing to find"
        raise UsageError(f"cannot test {num_frames} frames", why=why, fix="write `--frames 8,64`")
    places = [round(depth / 100 * (num_frames - 1)) for depth in depths]
    words = question if question is not None else QUESTIONS[task]
    if task == "pictures":
        numbers = rng.integers(10, 100, num_frames)
        shown: Shown = AlbumPlan(num_frames, side, numbers, tuple(places))
        values = [str(numbers[place]) for place in places]
    else:
        assert len(places) == 1, places
        is_number = task == "video"
        value = str(rng.integers(10, 100)) if is_number else str(rng.choice(list(COLOURS)))
        seed = int(rng.integers(1 << 31))
        side = max(MIN_SIDE, side - side % 2)  # colours are stored for pairs of pixels
        shown, values = FilmPlan(num_frames, fps, side, seed, places[0], value), [value]
    questions = tuple(
        Question(
            words.replace("{picture}", str(place + 1)) + "\n", (value,), evidence=(1,), depth=depth
        )
        for place, value, depth in zip(places, values, depths, strict=True)
    )
    return ShownSample(task, (_FRAMES, _EVIDENCE), questions, shown=shown)
