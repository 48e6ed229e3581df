"""Films: sampled by presentation time, decoded as a stream, each frame one tile.

in: a file, or its bytes, in any codec PyAV reads; out: a `Film`, its sampled frames as RGB pictures
source: DESIGN.md section 2 (a video is its sampled frames, one tile each)

A sample is the frame on the screen at its time. So a variable frame rate needs no care, and a film
slower than the rate asked for shows a frame more than once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image

from l4cli.data.decoding import FilmDecoder, orientation
from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import MAX_MEDIA_BYTES, MAX_PIXELS, open_picture, size_on_canvas, tiles_of
from l4cli.data.resize import resize
from l4cli.errors import L4Error, UsageError

MAX_FPS = 1000.0
JPEG_QUALITY = 95
_ROUNDING_S = 1e-3  # containers round times, to milliseconds at worst
_SLACK_S = 1.0  # how far a film may end before the end its header states
# Playlists name further files and addresses; only the file that was named is read.
_OPTIONS = {"protocol_whitelist": "none"}


class VideoError(L4Error):
    """A film that cannot be used; `reason` groups it in the report of `--skip-bad`."""

    def __init__(self, reason: str, why: str, fix: str, name: str | None = None) -> None:
        what = "cannot use this video" if name is None else f"cannot use video `{name}`"
        super().__init__(what, why=why, fix=fix)
        self.reason = reason


@dataclass(frozen=True)
class Sampling:
    """Which frames of a film are taken: `fps` a second, or fewer, spread evenly over the film."""

    fps: float = 1.0
    max_frames: int | None = 64

    def __post_init__(self) -> None:
        assert self.max_frames is None or self.max_frames > 0, self.max_frames
        if not 0 < self.fps <= MAX_FPS:
            why = f"it is no rate above 0 and up to {MAX_FPS:g} frames a second"
            raise UsageError(f"cannot use `--fps {self.fps:g}`", why=why, fix="write `--fps 1`")


@dataclass(frozen=True)
class Film:
    """A film and the samples to take from it: number i is on the screen at `i * step_s`."""

    source: Path | bytes
    width: int  # upright, with square pixels
    height: int
    duration_s: float
    num_frames: int
    step_s: float
    is_spread: bool  # at most so many frames were wanted, and at the rate they would be more

    def time_s(self, i: int) -> float:
        """When sample `i` is on the screen."""
        return i * self.step_s

    def describe(self) -> str:
        """How it was sampled, in one short line."""
        per_s = 1 / self.step_s
        rate = f"{per_s:.3g} a second" if per_s >= 0.1 else f"one every {self.step_s:.3g} s"
        spread = ", spread evenly over the film" if self.is_spread else ""
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames, {rate}"
        size = f"{self.width} x {self.height}, {self.duration_s:.1f} s"
        return f"{size}: {frames}{spread}"

    def frames(self, start: int = 0) -> Iterator[tuple[float, Image.Image]]:
        """Decode the samples from number `start` on, one after the other; one is held at a time.

        raises: VideoError where the film is damaged or ends too early
        """
        number = start
        with _opened(self.source) as (container, stream):
            decoder = FilmDecoder(container, stream)
            decoder.wanted_s = self.time_s(number)
            shown, image = None, None
            for frame, time_s in decoder.frames():
                while shown is not None and time_s > self.time_s(number) + _ROUNDING_S:
                    image = image or _picture(shown, decoder)
                    yield self.time_s(number), image
                    number += 1
                    if number == self.num_frames:
                        return
                    decoder.wanted_s = self.time_s(number)
                shown, image = frame, None
            if shown is None:
                raise _damaged("no frame of it can be decoded")
            # The last frame stays on the screen; a film that lacks more than that was cut off.
            if self.time_s(self.num_frames - 1) > decoder.end_s + _SLACK_S:
                raise _damaged(f"it ends at {decoder.end_s:.1f} of {self.duration_s:.1f} s")
            for i in range(number, self.num_frames):
                image = image or _picture(shown, decoder)
                yield self.time_s(i), image


def open_film(source: Path | bytes, sampling: Sampling) -> Film:
    """Look at a film and say which of its frames will be taken; decodes the first alone.

    raises: VideoError for what is no film, or one that is damaged
    """
    with _opened(source) as (container, stream):
        width, height = _size(stream)
        duration_s = _duration_s(container, stream)
    with _opened(source) as (container, stream):  # anew: the packets may have been counted
        if _lies_on_its_side(container, stream):
            width, height = height, width
    at_rate = max(1, int(np.ceil(duration_s * sampling.fps - _ROUNDING_S)))
    limit = sampling.max_frames
    if limit is None or at_rate <= limit:
        return Film(source, width, height, duration_s, at_rate, 1 / sampling.fps, False)
    return Film(source, width, height, duration_s, limit, duration_s / limit, True)


def sample_frames(
    source: Path | bytes, fps: float = 1.0, max_frames: int | None = None
) -> Iterator[tuple[float, Image.Image]]:
    """Give the time and the RGB picture of each sampled frame, as a stream."""
    return open_film(source, Sampling(fps, max_frames)).frames()


def encode_frame(image: Image.Image, geometry: PictureGeometry) -> bytes:
    """Shrink or enlarge a frame onto one tile, and write it as a JPEG."""
    width, height = size_on_canvas(*image.size, (1, 1), geometry)
    on_tile = Image.fromarray(resize(np.asarray(image), width, height))
    file = io.BytesIO()
    on_tile.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def encode_film(
    source: Path | bytes, sampling: Sampling, geometry: PictureGeometry
) -> tuple[Film, list[bytes]]:
    """Sample a film and encode each frame. raises: VideoError, also for more than a row may hold"""
    film = open_film(source, sampling)
    frames, num_bytes = [], 0
    for _, image in film.frames():
        frames.append(encode_frame(image, geometry))
        num_bytes += len(frames[-1])
        if num_bytes > MAX_MEDIA_BYTES:
            why = f"its {film.num_frames} frames take more than {MAX_MEDIA_BYTES >> 20} MiB"
            fix = "take fewer with `--fps` or `--max-frames`"
            raise VideoError("too many frames", why, fix)
    return film, frames


def frame_tile(image: Image.Image, geometry: PictureGeometry) -> np.ndarray:
    """One frame as the model sees it, through the same JPEG as in a token stream.

    shapes: -> float32 [1, 3, S, S]
    """
    return tiles_of(open_picture(encode_frame(image, geometry)), geometry)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[Any, Any]]:
    """Open a film's first real video stream; what FFmpeg raises becomes a `VideoError`."""
    try:
        # A file object, never a name: FFmpeg takes names like `http:` and `concat:` for orders.
        with (
            open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file,
            av.open(_not_empty(file), options=_OPTIONS) as container,
        ):
            stream = _video_stream(container)
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        message = " ".join(str(error.strerror).split())
        raise _damaged(f"{message[:1].lower()}{message[1:]}") from error
    except EOFError as error:
        raise _damaged(str(error)) from error
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise VideoError("unreadable video", why, "name a video file") from error


def _not_empty(file: BinaryIO) -> BinaryIO:
    if not file.read(1):
        raise _damaged("the file is empty")
    file.seek(0)
    return file


def _damaged(why: str) -> VideoError:
    why = f"it is no video, damaged or cut off: {why}"
    return VideoError("unreadable video", why, "replace the file, or convert it with `ffmpeg`")


def _video_stream(container: Any) -> Any:
    name = container.format.name
    if name.endswith("_pipe") or name in ("image2", "webp"):
        raise VideoError("unreadable video", "it is a picture", "give it as a picture: `--image`")
    if name == "tty" or not container.streams:
        raise _damaged("nothing in it can be played")
    for stream in container.streams.video:
        # Bit 0x400: the cover of a record, which is no film.
        is_cover = int(getattr(stream, "disposition", 0)) & 0x400
        if not is_cover and stream.codec_context is not None:
            return stream
    kinds = sorted({stream.type for stream in container.streams})
    if kinds == ["data"]:
        raise _damaged("its index is missing")
    why = f"it has no video stream, only {' and '.join(kinds)}"
    raise VideoError("unreadable video", why, "name a file with moving pictures")


def _size(stream: Any) -> tuple[int, int]:
    """Width and height with square pixels."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width <= 0 or height <= 0:
        raise _damaged("its frames have no size")
    width = max(1, round(width * _pixel_aspect(stream)))
    if width * height > MAX_PIXELS:
        why = f"it claims frames of {width} x {height} pixels, and at most {MAX_PIXELS} are decoded"
        raise VideoError("decompression bomb", why, "make it smaller, if it is a real video")
    return width, height


def _pixel_aspect(stream: Any) -> Fraction:
    """Width of a pixel over its height; nonsense counts as unknown."""
    aspect = stream.sample_aspect_ratio
    return aspect if aspect and Fraction(1, 16) <= aspect <= 16 else Fraction(1)


def _duration_s(container: Any, stream: Any) -> float:
    """How long the pictures run: as the stream states, else as its packets add up to."""
    if stream.duration and stream.duration > 0:
        stated_s = float(stream.duration * stream.time_base)
        # With a variable frame rate MP4 can state when the last frame is decoded, not shown.
        return max(stated_s, _end_s(container, stream) if "mp4" in container.format.name else 0)
    end_s, last_s, frame_s = 0.0, 0.0, 1 / _rate(stream)
    num_packets = 0
    for packet in container.demux():
        if packet.size == 0:
            continue
        start = packet.stream.start_time or 0
        if packet.pts is None:
            stops_s = (num_packets + 1) * frame_s if packet.stream is stream else 0.0
        else:
            stops_s = float((packet.pts - start) * packet.time_base)
            stops_s += float((packet.duration or 0) * packet.time_base)
        last_s = max(last_s, stops_s)
        if packet.stream is stream:
            num_packets += 1
            end_s = max(end_s, stops_s)
    if num_packets == 0:
        raise _damaged("it holds no frame")
    # Only this format's header is written with the whole film known; others guess.
    if "matroska" in container.format.name and container.duration:
        stated_s = container.duration / av.time_base
        if last_s + _SLACK_S < stated_s:
            raise _damaged(f"it ends at {last_s:.1f} of {stated_s:.1f} s")
    return max(end_s, frame_s)


def _end_s(container: Any, stream: Any) -> float:
    """When the last frame ends, from the packets after the last keyframe."""
    end, start = 0, stream.start_time or 0
    container.seek(start + stream.duration, stream=stream)
    for packet in container.demux(stream):
        if packet.pts is not None:
            lasts = packet.duration or round(1 / (_rate(stream) * float(stream.time_base)))
            end = max(end, packet.pts - start + lasts)
    return float(end * stream.time_base)


def _rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _lies_on_its_side(container: Any, stream: Any) -> bool:
    """Whether frames are to be turned by a quarter, as the first of them says."""
    for frame, _ in FilmDecoder(container, stream).frames():
        return orientation(frame)[0] % 2 == 1
    raise _damaged("no frame of it can be decoded")


def _picture(frame: Any, decoder: FilmDecoder) -> Image.Image:
    """A decoded frame as it is to be seen: RGB, square pixels, upright."""
    if frame.is_corrupt:
        raise _damaged("a frame of it cannot be decoded wholly")
    pixels_HWC = decoder.rgb(frame)
    width = max(1, round(frame.width * _pixel_aspect(decoder.stream)))
    pixels_HWC = resize(pixels_HWC, width, frame.height)
    turns, is_mirrored = orientation(frame)
    upright_HWC = np.rot90(pixels_HWC, turns)
    return Image.fromarray(upright_HWC[:, ::-1] if is_mirrored else upright_HWC)
