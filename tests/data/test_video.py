"""Films: what is sampled, checked by pixels against what was drawn, and what is refused."""

from __future__ import annotations

import resource
from fractions import Fraction
from itertools import count, islice
from pathlib import Path

import av
import numpy as np
import pytest
from film_samples import TOLERANCE, grey, save_film, save_sound
from PIL import Image

from l4cli.data import decoding
from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import grid_of, open_picture, tiles_of
from l4cli.data.video import (
    Sampling,
    VideoError,
    encode_film,
    encode_frame,
    frame_tile,
    open_film,
    sample_frames,
)
from l4cli.errors import UsageError

SMALL = PictureGeometry(image_size=32, patch_size=4, max_patches=4)


def steps(num: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Frames whose red rises by 5."""
    return [grey(5 * i % 256, size) for i in range(num)]


def seen(frames) -> list[tuple[float, int]]:
    """Times, and the red in the middle of each frame."""
    return [
        (time_s, int(np.asarray(image)[image.height // 2, image.width // 2, 0]))
        for time_s, image in frames
    ]


def check(found: list[tuple[float, int]], want: list[tuple[float, int]]) -> None:
    assert [time for time, _ in found] == pytest.approx([time for time, _ in want])
    for (time_s, red), (_, right) in zip(found, want, strict=True):
        assert abs(red - right) <= TOLERANCE, (time_s, red, right)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.mov", "mjpeg"),
        ("a.webm", "libvpx-vp9"),
        ("a.mkv", "ffv1"),
    ],
)
def test_frames_are_those_on_the_screen(tmp_path, name, codec) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    path = save_film(tmp_path / name, steps(40), rate=10, codec=codec)
    film = open_film(path, Sampling(fps=2, max_frames=None))
    assert (film.width, film.height, film.num_frames) == (64, 48, 8)
    assert film.duration_s == pytest.approx(4.0)
    want = [(i / 2, 25 * i) for i in range(8)]
    check(seen(film.frames()), want)
    check(seen(film.frames(start=3)), want[3:])
    check(seen(sample_frames(path.read_bytes(), fps=2)), want)
    # Between two frames the one before is on the screen: at 1/3 s it is the fourth of ten.
    assert seen(islice(sample_frames(path, fps=3), 1, 2))[0][1] == pytest.approx(15, abs=TOLERANCE)


def test_too_many_frames_are_spread(tmp_path) -> None:
    path = save_film(tmp_path / "a.mp4", steps(50))
    film = open_film(path, Sampling(fps=2, max_frames=4))
    assert film.is_spread
    assert film.describe() == "64 x 48, 5.0 s: 4 frames, 0.8 a second, spread evenly over the film"
    check(seen(film.frames()), [(0, 0), (1.25, 60), (2.5, 125), (3.75, 185)])
    film = open_film(path, Sampling(fps=2, max_frames=10))
    assert not film.is_spread
    assert film.describe() == "64 x 48, 5.0 s: 10 frames, 2 a second"
    assert open_film(path, Sampling(fps=0.01)).describe() == "64 x 48, 5.0 s: 1 frame"


def test_slow_and_variable_frame_rates(tmp_path) -> None:
    """A frame stands until the next one, however long that takes."""
    times_s = [0, 0.1, 0.2, 2.5, 2.6, 7.0]
    path = save_film(tmp_path / "a.mp4", steps(6), times_s=times_s)
    film = open_film(path, Sampling(fps=1, max_frames=None))
    frames = [max(i for i, time in enumerate(times_s) if time <= t) for t in range(film.num_frames)]
    assert film.num_frames == 8
    check(seen(film.frames()), [(t, 5 * i) for t, i in enumerate(frames)])


def test_streams_without_times_are_counted(tmp_path) -> None:
    path = save_film(tmp_path / "a.h264", steps(50), rate=25)
    check(seen(sample_frames(path, fps=5)), [(i / 5, 25 * i) for i in range(10)])


def test_sound_that_goes_on_leaves_the_last_frame(tmp_path) -> None:
    path = save_film(tmp_path / "a.mkv", steps(20), audio_s=5.0)
    film = open_film(path, Sampling(max_frames=None))
    assert film.duration_s == pytest.approx(2.0, abs=0.05)
    check(seen(film.frames()), [(0, 0), (1, 50)])


def test_frames_nobody_wants_are_not_decoded(tmp_path, monkeypatch) -> None:
    """Per sample at most its group of pictures is decoded, and far groups are not even read."""
    frames = (grey(i // 10 % 256) for i in range(2000))
    path = save_film(tmp_path / "a.mp4", frames, rate=10, gop=20)
    num_decoded, num_read = count(), count()
    decode, packets = decoding.FilmDecoder._decode, decoding.FilmDecoder._packets

    def counted(self, packet):
        next(num_decoded)
        return decode(self, packet)

    def counted_packets(self):
        for packet in packets(self):
            next(num_read)
            yield packet

    film = open_film(path, Sampling(fps=1, max_frames=5))
    monkeypatch.setattr(decoding.FilmDecoder, "_decode", counted)
    monkeypatch.setattr(decoding.FilmDecoder, "_packets", counted_packets)
    check(seen(film.frames()), [(0, 0), (40, 40), (80, 80), (120, 120), (160, 160)])
    assert next(num_decoded) < 5 * 60
    assert next(num_read) < 5 * 80
    dense = open_film(path, Sampling(fps=1, max_frames=None)).frames()
    check(seen(dense), [(i, i) for i in range(200)])


def test_leaps_in_a_film_of_one_keyframe(tmp_path) -> None:
    """They lead back to its beginning, once."""
    frames = (grey(i // 10 % 256) for i in range(2000))
    path = save_film(tmp_path / "a.mp4", frames, rate=10, gop=9999)
    film = open_film(path, Sampling(fps=1, max_frames=5))
    want = [(0, 0), (40, 40), (80, 80), (120, 120), (160, 160)]
    check(seen(film.frames()), want)
    check(seen(film.frames(start=2)), want[2:])


def test_turned_and_stretched(tmp_path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 200  # top left
    stretched = save_film(tmp_path / "a.mp4", [pixels] * 5, aspect=Fraction(2))
    film = open_film(stretched, Sampling())
    assert (film.width, film.height) == (128, 48)
    (_, image), *_ = film.frames()
    assert image.size == (128, 48)
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    for turns in range(4):
        for is_mirrored in (False, True):
            name = tmp_path / f"{turns}{is_mirrored}.mp4"
            save_film(name, [pixels] * 5, rotation=90 * turns, is_mirrored=is_mirrored)
            want = np.rot90(pixels[..., 0] > 100, turns)  # against the clock
            want = want[:, ::-1] if is_mirrored else want
            film = open_film(name, Sampling())
            (_, image), *_ = film.frames()
            assert (film.height, film.width) == image.size[::-1] == want.shape
            bright = np.asarray(image)[..., 0] > 100
            assert (bright != want).mean() < 0.05, (turns, is_mirrored)


@pytest.mark.parametrize("size", [(32, 32), (640, 48), (20, 300), (5, 5), (1000, 998)])
def test_a_frame_is_one_tile(size) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for geometry in (SMALL, PictureGeometry()):
        data = encode_frame(image, geometry)
        with open_picture(data) as small:
            assert grid_of(*small.size, geometry) == (1, 1)
            assert max(small.size) == geometry.image_size
            tiles = tiles_of(small, geometry)
        assert tiles.shape == (1, 3, geometry.image_size, geometry.image_size)
        assert np.array_equal(frame_tile(image, geometry), tiles)
        assert encode_frame(image, geometry) == data


def test_jpeg_keeps_what_is_there() -> None:
    """Little is lost beside the same tile without a JPEG: smooth parts to two levels."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], 64), np.full((64, 64), 9)], 2)
    image = Image.fromarray(pixels.astype(np.uint8))
    exact = tiles_of(image, PictureGeometry(image_size=64, max_patches=1, patch_size=8))
    tile = frame_tile(image, PictureGeometry(image_size=64, max_patches=1, patch_size=8))
    assert np.abs(tile - exact).mean() < 2 / 127.5


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    target = path.with_name("cut_" + path.name)
    target.write_bytes(data[: int(len(data) * share)])
    return target


def test_films_that_are_refused(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), dtype=np.uint8)
    for name, codec, share in (
        ("a.mp4", "libx264", 0.5),
        ("a.mkv", "libx264", 0.5),
        ("a.webm", "libvpx-vp9", 0.6),
        ("a.mov", "mjpeg", 0.5),
    ):
        path = cut(save_film(tmp_path / name, list(noise), codec=codec), share)
        with pytest.raises(VideoError, match="damaged or cut off"):
            list(sample_frames(path))
    for name, data, why in (
        ("empty.mp4", b"", "damaged"),
        ("text.mp4", b"hello " * 99, "damaged"),
        ("list.mp4", b"ffconcat version 1.0\nfile a.mp4\n", "damaged"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:5,\na.mp4\n#EXT-X-ENDLIST\n", "damaged"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=why):
            open_film(tmp_path / name, Sampling())
    for kind in ("png", "jpeg"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"p.{kind}")
        with pytest.raises(VideoError, match="it is a picture") as info:
            open_film(tmp_path / f"p.{kind}", Sampling())
        assert info.value.reason == "unreadable video"
    with pytest.raises(VideoError, match="no video stream, only audio"):
        open_film(save_sound(tmp_path / "a.m4a"), Sampling())
    with pytest.raises(VideoError, match="no such file"):
        open_film(tmp_path / "nowhere.mp4", Sampling())
    with pytest.raises(UsageError, match="--fps nan"):
        Sampling(fps=float("nan"))


def test_film_cut_in_its_data_is_refused_at_the_end(tmp_path) -> None:
    """An index before the data knows more frames than are there."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), dtype=np.uint8)
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    data = Path(path).read_bytes()
    moov, mdat = data.index(b"moov"), data.index(b"mdat")
    if moov > mdat:
        pytest.skip("this muxer did not write the index first")
    frames = sample_frames(data[: len(data) * 2 // 3])
    first = next(frames)
    assert first[0] == 0
    with pytest.raises(VideoError, match="damaged or cut off"):
        list(frames)


def test_more_than_a_row_may_hold(tmp_path, monkeypatch) -> None:
    path = save_film(tmp_path / "a.mp4", steps(50))
    film, frames = encode_film(path, Sampling(), SMALL)
    assert len(frames) == film.num_frames == 5
    monkeypatch.setattr("l4cli.data.video.MAX_MEDIA_BYTES", 3 * len(frames[0]))
    with pytest.raises(VideoError, match="5 frames take more") as info:
        encode_film(path, Sampling(), SMALL)
    assert info.value.reason == "too many frames"


def test_memory_does_not_grow_with_the_film(tmp_path) -> None:
    """Thousands of frames, sampled densely and encoded: nothing of them stays."""
    frames = (grey(i % 256, (160, 120)) for i in range(1200))
    path = save_film(tmp_path / "a.mp4", frames, rate=20, codec="mpeg4")

    def peak_after(num: int) -> int:
        frames = islice(sample_frames(path, fps=20), num)
        assert sum(len(encode_frame(image, SMALL)) for _, image in frames) > num * 100
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    short = peak_after(100)
    # Kept as pictures they would be 60 MiB more.
    assert peak_after(1200) - short < 8 << 10
