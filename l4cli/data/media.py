"""Pictures: opened with care, cut into tiles and normalised as Llama 4's processor does.

in: an encoded PNG or JPEG; out: an RGB picture, its grid, its tiles
source: HF Llama4ImageProcessor (transformers 5.23); facts on tiling: Llama 4 resizes without
distortion onto the best canvas of tiles, pads with black, and adds one distorted global tile
"""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from l4cli.data.geometry import PictureGeometry
from l4cli.data.resize import resize
from l4cli.errors import L4Error

MAX_PIXELS = 89_478_485  # Pillow's own warning level: 256 MiB of RGB
MAX_MEDIA_BYTES = 256 << 20
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# What Pillow raises on damaged files; it has no common class for them.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError),
    *(EOFError, OverflowError, struct.error, zlib.error),
)


class PictureError(L4Error):
    """A picture that cannot be used; `reason` groups it in the report of `--skip-bad`."""

    def __init__(self, reason: str, why: str, fix: str) -> None:
        super().__init__("cannot use this picture", why=why, fix=fix)
        self.reason = reason


def open_picture(data: bytes) -> Image.Image:
    """Decode a PNG or JPEG wholly, turn it upright and make it RGB, transparency on white.

    raises: PictureError for other formats, damaged files and decompression bombs
    """
    if not data.startswith((_PNG, _JPEG)):
        fix = "convert it to PNG or JPEG"
        raise PictureError("unreadable picture", "it is neither a PNG nor a JPEG", fix)
    try:
        # The classes, not Image.open: it tries other formats and warns about bombs globally.
        opener = PngImageFile if data.startswith(_PNG) else JpegImageFile
        with opener(io.BytesIO(data)) as image:
            _check_size(image.size)
            image.load()
            # EXIF first: it is lost in the conversion.
            return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODER_ERRORS as error:
        message = " ".join(str(error).split()).rstrip(".")
        why = f"it is damaged or cut off: {message[:1].lower()}{message[1:]}"
        raise PictureError("unreadable picture", why, "replace the file") from error


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        why = f"it claims {width} x {height} pixels, and at most {MAX_PIXELS} are decoded"
        raise PictureError("decompression bomb", why, "make it smaller, if it is a real picture")


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@functools.cache
def _canvases(max_patches: int) -> np.ndarray:
    """Every grid of at most `max_patches` tiles: int64 [grids, 2] of rows, cols.

    Order: by aspect ratio as first seen from many tiles to few; it decides exact ties.
    """
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for num in range(max_patches, 0, -1):
        for rows in range(1, num + 1):
            if num % rows == 0:
                by_ratio.setdefault(rows * rows / num, []).append((rows, num // rows))
    return np.array([grid for grids in by_ratio.values() for grid in grids], dtype=np.int64)


def grid_of(width: int, height: int, geometry: PictureGeometry) -> tuple[int, int]:
    """Choose the canvas: shrink as little as possible, then enlarge as little, then pad least.

    shapes: -> rows, cols of tiles, without the global one
    """
    grids_G2 = _canvases(geometry.max_patches)
    # fp32 as in the reference: scales that are equal there must be equal here.
    sides_G2 = (grids_G2 * geometry.image_size).astype(np.float32)
    scales_G = np.minimum(sides_G2[:, 0] / np.float32(height), sides_G2[:, 1] / np.float32(width))
    enlarging = scales_G[scales_G >= 1]
    best = enlarging.min() if len(enlarging) else scales_G.max()
    chosen_G2 = grids_G2[scales_G == best]
    rows, cols = chosen_G2[np.argmin(chosen_G2.prod(axis=1))]
    return int(rows), int(cols)


def size_on_canvas(
    width: int, height: int, grid: tuple[int, int], geometry: PictureGeometry
) -> tuple[int, int]:
    """Width and height of the resized picture inside its canvas, aspect ratio kept."""
    side = geometry.image_size
    # Never enlarged beyond one tile a side: the rest of the canvas is padding.
    most_height = min(max(height, side), grid[0] * side)
    most_width = min(max(width, side), grid[1] * side)
    scale_width, scale_height = most_width / width, most_height / height
    if scale_width < scale_height:
        size = most_width, min(int(height * scale_width), most_height)
    else:
        size = min(int(width * scale_height), most_width), most_height
    return max(size[0], 1), max(size[1], 1)


def tiles_of(image: Image.Image, geometry: PictureGeometry) -> np.ndarray:
    """Cut an RGB picture into normalised tiles, the global tile last if there are several.

    shapes: -> float32 [tiles, 3, S, S] in [-1, 1], tiles row by row
    """
    side, (rows, cols) = geometry.image_size, grid_of(*image.size, geometry)
    width, height = size_on_canvas(*image.size, (rows, cols), geometry)
    pixels = np.asarray(image)
    canvas = np.zeros((rows * side, cols * side, 3), np.uint8)  # black, before normalisation
    canvas[:height, :width] = resize(pixels, width, height)
    parts = canvas.reshape(rows, side, cols, side, 3).transpose(0, 2, 4, 1, 3)
    tiles = parts.reshape(rows * cols, 3, side, side)
    if rows * cols > 1:
        # Distorted on purpose: the reference squeezes the whole picture into one square.
        overview = resize(pixels, side, side).transpose(2, 0, 1)
        tiles = np.concatenate([tiles, overview[None]])
    return (tiles.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
