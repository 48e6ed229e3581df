"""Drawing for figures: a white page measured in units, written as PNG.

in: rectangles, lines and words in units; out: a PNG, the same bytes every time

Everything is drawn at twice the resolution and halved, so that slanted lines are smooth. The
font is the one Pillow carries, so figures look the same on every machine.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from l4cli.errors import L4Error

Color = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]

INK: Color = (31, 35, 40)
GREY: Color = (101, 109, 118)
RULE: Color = (208, 212, 217)
EMPTY: Color = (236, 238, 240)
WHITE: Color = (255, 255, 255)

_PIXELS_PER_UNIT = 2
_SUPERSAMPLE = 2
_LARGE_AREA = 4e6  # square units; pages beyond it are drawn once, at 16 megapixels and more

# Low to high. Lightness rises all the way, so that the order survives every kind of colour
# blindness and a black-and-white printer; hue goes from red over amber to green as people expect.
_SCALE: tuple[Color, ...] = (
    (84, 8, 32),
    (158, 28, 44),
    (214, 76, 54),
    (240, 138, 75),
    (245, 188, 104),
    (224, 216, 140),
    (190, 238, 208),
)


def scale_color(share: float) -> Color:
    """The colour of a share from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    i = min(int(place), len(_SCALE) - 2)
    part = place - i
    low, high = _SCALE[i], _SCALE[i + 1]
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def luminance(color: Color) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2)."""

    def linear(value: int) -> float:
        v = value / 255
        return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(value) for value in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink_on(color: Color) -> Color:
    """Black or white, whichever can be read on a colour."""
    light = (1.05) / (luminance(color) + 0.05)
    dark = (luminance(color) + 0.05) / (luminance(INK) + 0.05)
    return WHITE if light > dark else INK


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if not features.check("freetype2"):
        raise L4Error(
            "cannot draw a figure",
            why="this Pillow was built without FreeType, so it cannot write words",
            fix="install the ordinary package: `pip install --force-reinstall pillow`",
        )
    return ImageFont.load_default(size_px)


def text_width(text: str, size: float) -> float:
    """How wide words are, in units."""
    return _font(64).getlength(text) * size / 64


def line_height(size: float) -> float:
    """From one line of words to the next, in units."""
    return size * 1.35


def wrap(text: str, size: float, width: float) -> list[str]:
    """Break words into lines no wider than `width`; a longer word is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}".strip()
            if line and text_width(joined, size) > width:
                lines.append(line)
                joined = word
            while text_width(joined, size) > width and len(joined) > 1:
                fits = _num_fitting(joined, size, width)
                lines.append(joined[:fits])
                joined = joined[fits:]
            line = joined
        if line:
            lines.append(line)
    return lines


def _num_fitting(word: str, size: float, width: float) -> int:
    count = 1
    while count < len(word) and text_width(word[: count + 1], size) <= width:
        count += 1
    return count


class Canvas:
    """A page of `width` by `height` units; y grows downwards."""

    def __init__(self, width: float, height: float) -> None:
        self._supersample = _SUPERSAMPLE if width * height <= _LARGE_AREA else 1
        self._scale = _PIXELS_PER_UNIT * self._supersample
        size = (self._px(width), self._px(height))
        # Even, so that halving is exact.
        self._image = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), WHITE)
        self._draw = ImageDraw.Draw(self._image)
        # Where words stand, in units: left, top, right, bottom. A layout is judged by it.
        self.words: list[tuple[str, Box]] = []

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in units."""
        return self._image.width / self._scale, self._image.height / self._scale

    def _note(self, text: str, box: Sequence[float]) -> None:
        left, top, right, bottom = (value / self._scale for value in box)
        self.words.append((text, (left, top, right, bottom)))

    def _px(self, units: float) -> int:
        return round(units * self._scale)

    def rectangle(self, x: float, y: float, width: float, height: float, fill: Color) -> None:
        """A filled box."""
        box = (self._px(x), self._px(y), self._px(x + width) - 1, self._px(y + height) - 1)
        self._draw.rectangle(box, fill=fill)

    def hatched(self, x: float, y: float, width: float, height: float) -> None:
        """A box for what was not measured: grey with slanted strokes."""
        left, top = self._px(x), self._px(y)
        size = (max(1, self._px(x + width) - left), max(1, self._px(y + height) - top))
        tile = Image.new("RGB", size, EMPTY)
        pen, step = ImageDraw.Draw(tile), self._px(5)
        for start in range(-size[1], size[0] + step, step):
            pen.line((start, size[1], start + size[1], 0), fill=RULE, width=max(1, self._px(0.6)))
        self._image.paste(tile, (left, top))

    def line(self, points: Sequence[Point], color: Color = RULE, width: float = 1) -> None:
        """Joined strokes."""
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        self._draw.line(scaled, fill=color, width=max(1, self._px(width)), joint="curve")

    def dashed(
        self, start: Point, end: Point, color: Color = INK, width: float = 1, dash: float = 4
    ) -> None:
        """A dashed stroke."""
        length = math.dist(start, end)
        place = 0.0
        while place < length:
            ends = []
            for at in (place, min(place + dash, length)):
                part = at / length
                ends.append(
                    (start[0] + (end[0] - start[0]) * part, start[1] + (end[1] - start[1]) * part)
                )
            self.line(ends, color, width)
            place += dash * 1.75

    def dot(self, x: float, y: float, radius: float, color: Color) -> None:
        """A filled circle with a thin white rim."""
        for size, fill in ((radius + 0.8, WHITE), (radius, color)):
            box = [(x - size) * self._scale, (y - size) * self._scale]
            box += [(x + size) * self._scale, (y + size) * self._scale]
            self._draw.ellipse(box, fill=fill)

    def veil(self, points: Sequence[Point], color: Color, opacity: float) -> None:
        """A see-through area."""
        mask = Image.new("L", self._image.size, 0)
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        ImageDraw.Draw(mask).polygon(scaled, fill=round(255 * opacity))
        self._image.paste(Image.new("RGB", self._image.size, color), (0, 0), mask)

    def text(
        self, x: float, y: float, text: str, size: float, color: Color = INK, anchor: str = "lm"
    ) -> None:
        """One line of words. `anchor`: l, m, r and a, m, s, as Pillow has them."""
        font = _font(self._px(size))
        place = (x * self._scale, y * self._scale)
        self._draw.text(place, text, color, font, anchor=anchor)
        self._note(text, self._draw.textbbox(place, text, font, anchor=anchor))

    def upright(self, x: float, y: float, text: str, size: float, color: Color = INK) -> None:
        """Words that run upwards, centred on a point."""
        font = _font(self._px(size))
        left, top, right, bottom = font.getbbox(text)
        tile = Image.new("L", (math.ceil(right) + 2, math.ceil(bottom) + 2), 0)
        ImageDraw.Draw(tile).text((0, 0), text, 255, font)
        tile = tile.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
        turned = tile.transpose(Image.Transpose.ROTATE_90)
        corner = (self._px(x) - turned.width // 2, self._px(y) - turned.height // 2)
        self._image.paste(Image.new("RGB", turned.size, color), corner, turned)
        self._note(text, (*corner, corner[0] + turned.width, corner[1] + turned.height))

    def save(self, path: Path) -> None:
        """Write the PNG under a temporary name and rename it."""
        times = self._supersample
        size = (self._image.width // times, self._image.height // times)
        image = self._image.resize(size, Image.Resampling.BOX)
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(part, format="PNG", optimize=False, compress_level=6)
            os.replace(part, path)
        except OSError as error:
            raise L4Error(
                f"cannot write the figure `{path}`",
                why=(error.strerror or str(error)).lower(),
                fix="choose a folder that can be written with `-o`",
            ) from error
