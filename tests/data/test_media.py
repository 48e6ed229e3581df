"""Pictures against transformers' own processor, and pictures that must be refused."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import PictureError, grid_of, open_picture, tiles_of
from l4cli.data.resize import resize

LLAMA4 = PictureGeometry()


@pytest.fixture(scope="module")
def reference():
    """transformers' picture module."""
    pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    from transformers.models.llama4 import image_processing_llama4

    return image_processing_llama4


def processed(reference, image: Image.Image, geometry: PictureGeometry):
    """What transformers makes of a picture: tiles as float32, grid."""
    side = geometry.image_size
    processor = reference.Llama4ImageProcessor(
        size={"height": side, "width": side}, max_patches=geometry.max_patches
    )
    out = processor(image, return_tensors="pt")
    rows, cols = out["aspect_ratios"].reshape(-1).tolist()
    return out["pixel_values"].float().numpy().reshape(-1, 3, side, side), (rows, cols)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def random_sizes(num: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(4)
    sizes = np.exp(rng.uniform(0, np.log(6000), (num, 2))).astype(int).tolist()
    squares = [(w, w) for w, _ in sizes[: num // 5]]
    exact = [(336 * w, 336 * h) for w in range(1, 17) for h in range(1, 17)]
    beside = [(w + dw, h + dh) for w, h in exact[::7] for dw in (-1, 1) for dh in (-1, 1)]
    return [*map(tuple, sizes), *squares, *exact, *beside]


@pytest.mark.parametrize("max_patches", [16, 4, 1, 9])
def test_grids_equal_transformers(reference, max_patches) -> None:
    torch = pytest.importorskip("torch")
    geometry = PictureGeometry(max_patches=max_patches)
    side = reference.SizeDict(height=336, width=336)
    reference.find_supported_resolutions.cache_clear()
    canvases = torch.tensor(reference.find_supported_resolutions(max_patches, side))
    for width, height in random_sizes(2000):
        want = reference.get_best_fit((height, width), canvases) // 336
        assert grid_of(width, height, geometry) == tuple(want.tolist()), (width, height)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (1, 1)),
        ((336, 336), (1, 1)),
        ((337, 336), (1, 2)),
        ((640, 480), (2, 2)),
        ((300, 1000), (3, 1)),
        ((1280, 720), (3, 4)),
        ((1920, 1080), (3, 5)),
        ((1344, 1344), (4, 4)),
        ((3000, 1), (1, 9)),
    ],
)
def test_published_grids(size, grid) -> None:
    assert grid_of(*size, LLAMA4) == grid


def test_pixels_differ_from_transformers_by_its_bf16_rounding_only(reference) -> None:
    """Rounded as transformers rounds, ours are its pixels, bit for bit."""
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torchvision resizes 8-bit pictures in fp32 on this CPU")
    rng = np.random.default_rng(1)
    sizes = [(336, 336), (1, 1), (3000, 1), (100, 100), (337, 336), (640, 480), (5, 900)]
    sizes += [tuple(s) for s in np.exp(rng.uniform(0, np.log(900), (8, 2))).astype(int).tolist()]
    for i, (width, height) in enumerate(sizes):
        small = PictureGeometry(image_size=64, patch_size=8, max_patches=4)
        geometry = LLAMA4 if i % 2 == 0 else small
        image = Image.fromarray(noise(width, height, i))
        want, grid = processed(reference, image, geometry)
        tiles = tiles_of(image, geometry)
        assert grid == grid_of(width, height, geometry)
        assert tiles.dtype == np.float32
        assert tiles.shape == want.shape
        assert np.abs(tiles - want).max() <= 2**-8  # bf16 near 1
        levels = torch.from_numpy(np.round((tiles + 1) * 127.5))
        rounded = (levels.to(torch.bfloat16) * (1 / 255) - 0.5) / 0.5
        assert np.array_equal(rounded.float().numpy(), want), (width, height)


def test_resizing_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    for _ in range(40):
        width, height, new_width, new_height = np.exp(rng.uniform(0, 6, 4)).astype(int).tolist()
        pixels = noise(width, height)
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
        want = torch.nn.functional.interpolate(
            planes, (new_height, new_width), mode="bilinear", antialias=True
        )[0].permute(1, 2, 0)
        got = resize(pixels, new_width, new_height)
        assert np.array_equal(got, want.numpy()), (width, height, new_width, new_height)


def test_global_tile_is_last_and_padding_is_black() -> None:
    image = Image.new("RGB", (600, 100), (255, 255, 255))
    tiles = tiles_of(image, LLAMA4)
    assert tiles.shape == (3, 3, 336, 336)
    assert (tiles[-1] == 1).all()
    assert (tiles[0, :, 100:] == -1).all()
    assert (tiles[0, :, :100] == 1).all()
    assert (tiles[1, :, :, 600 - 336 :] == -1).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes_convert_as_in_transformers(reference, mode) -> None:
    image = Image.fromarray(noise(40, 30))
    image.putalpha(Image.fromarray(noise(40, 30, 1)[..., 0]))
    data = encoded(image.convert("RGB" if mode in ("P", "I;16", "1") else mode).convert(mode))
    want = reference.Llama4ImageProcessor().process_image(
        Image.open(io.BytesIO(data)), do_convert_rgb=True
    )
    got = np.asarray(open_picture(data)).transpose(2, 0, 1)
    assert np.array_equal(got, want.numpy())


def test_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    image.putpalette([200, 0, 0])
    data = encoded(image, transparency=0)
    assert np.asarray(open_picture(data)).min() == 255


def test_cmyk_jpeg() -> None:
    data = encoded(Image.fromarray(noise(8, 8)).convert("CMYK"), "JPEG")
    want = Image.open(io.BytesIO(data)).convert("RGB")
    assert open_picture(data).tobytes() == want.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(20, 10)), "JPEG", exif=exif)
    picture = open_picture(data)
    assert picture.size == ((20, 10) if orientation < 5 else (10, 20))
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert picture.tobytes() == want.tobytes()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes cannot hold."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable picture"),
        (b"GIF89a.......", "unreadable picture"),
        (b"\x89PNG\r\n\x1a\n", "unreadable picture"),
        (b"\xff\xd8\xff", "unreadable picture"),
        (png_claiming(40_000, 40_000), "decompression bomb"),
        (png_claiming(2**31 - 1, 2**31 - 1), "decompression bomb"),
        (png_claiming(100, 100), "unreadable picture"),
        (png_claiming(0, 100), "unreadable picture"),
    ],
)
def test_bad_pictures_are_refused(data, reason) -> None:
    with pytest.raises(PictureError) as caught:
        open_picture(data)
    assert caught.value.reason == reason
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_pictures_are_refused(kind) -> None:
    data = encoded(Image.fromarray(noise(64, 48)), kind)
    for size in [*range(0, 40), *range(40, len(data) - 100, 97)]:
        with pytest.raises(PictureError):
            open_picture(data[:size])


def test_damaged_pictures_never_crash() -> None:
    rng = np.random.default_rng(3)
    for kind in ("PNG", "JPEG"):
        good = encoded(Image.fromarray(noise(32, 32)), kind)
        for _ in range(300):
            data = bytearray(good)
            for _ in range(rng.integers(1, 5)):
                data[rng.integers(len(data))] = rng.integers(256)
            with contextlib.suppress(PictureError):
                assert open_picture(bytes(data)).mode == "RGB"
