"""Boxes in answers: find them in the text, draw them on the picture.

in: an answer with boxes like `[12 30 45 80]`, left top right bottom in percent of the picture
out: the picture with their outlines
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from l4cli import terminal

_BOX = re.compile(r"\[\s*(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})\s*\]")
_COLORS = ("#ff2d2d", "#00c853", "#2979ff", "#ffab00", "#d500f9", "#00b8d4")


@dataclass(frozen=True)
class Box:
    """Corners in whole percent of width and height."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def is_real(self) -> bool:
        """Whether it lies in the picture and has an inside."""
        return self.left < self.right <= 100 and self.top < self.bottom <= 100

    def overlap(self, other: Box) -> float:
        """Intersection over union."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        both = max(width, 0) * max(height, 0)
        return both / (self._area() + other._area() - both)

    def _area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


def find_boxes(text: str) -> list[Box]:
    """All that is written as a box, even outside the picture; commas are as good as spaces."""
    return [Box(*(int(number) for number in match)) for match in _BOX.findall(text)]


def draw_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """A copy of the picture with an outline of its own colour for each box."""
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    width = max(1, round(min(image.size) / 100))
    for i, box in enumerate(boxes):
        left, right = (round(x * image.width / 100) for x in (box.left, box.right))
        top, bottom = (round(y * image.height / 100) for y in (box.top, box.bottom))
        # A dark rim keeps the line visible on a ground of its own colour.
        corners = (left, top, max(right - 1, left), max(bottom - 1, top))
        canvas.rectangle(corners, outline="black", width=width + 1)
        canvas.rectangle(corners, outline=_COLORS[i % len(_COLORS)], width=width)
    return drawn


def show_boxes(text: str, image: Image.Image, path: Path) -> None:
    """Draw the boxes an answer names into `path`; say so when there are none."""
    found = find_boxes(text)
    real = [box for box in found if box.is_real]
    if len(real) < len(found):
        terminal.warn(f"{len(found) - len(real)} of {len(found)} boxes lie outside the picture")
    if not real:
        terminal.warn(f"the answer names no box like `[10 20 50 60]`; `{path}` was not written")
    else:
        draw_boxes(image, real).save(path)
        terminal.say(f"{len(real)} box{'es' if len(real) > 1 else ''} drawn into `{path}`")
