"""Films for tests, drawn and encoded on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# YUV with halved colours, DCT and rounding: a plain area comes back within this many levels.
TOLERANCE = 6


def grey(level: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A plain frame whose red tells which it is."""
    return np.full((size[1], size[0], 3), (level, 100, 50), np.uint8)


def save_film(
    path: Path,
    frames: Iterable[np.ndarray],
    rate: int = 10,
    codec: str = "libx264",
    *,
    times_s: list[float] | None = None,
    gop: int | None = None,
    aspect: Fraction | None = None,
    rotation: int = 0,
    is_mirrored: bool = False,
    audio_s: float = 0.0,
) -> Path:
    """Write a film, frame by frame; with `times_s` at these times instead of a fixed rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000  # its default blurs even plain frames
        sound = container.add_stream("aac", rate=8000) if audio_s else None
        if gop is not None:
            stream.gop_size = gop
            if codec == "libx264":
                stream.options = {"x264-params": f"keyint={gop}:scenecut=0"}
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation or is_mirrored:
            stream.set_display_rotation(rotation, hflip=is_mirrored)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if i == 0:
                stream.height, stream.width = pixels.shape[:2]
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_silence(container, sound, audio_s)
    return path


def save_sound(path: Path, time_s: float = 2.0) -> Path:
    """A file with sound alone."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=8000), time_s)
    return path


def _write_silence(container, stream, time_s: float) -> None:
    for i in range(round(time_s * 8000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, i * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
