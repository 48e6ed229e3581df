"""Draw pictures of one coloured shape each, and write down what can be asked about them.

in: a folder, a count, a seed; out: FOLDER/images/*.png, FOLDER/chats.jsonl, FOLDER/truth.jsonl

A picture is one shape (five of them, eight colours, three sizes, nine places) on a plain, shaded,
noisy or striped background. A line of chats.jsonl is a conversation about one picture: either
three questions in random order, or a description. `--pairs seen` leaves out the colour-shape
pairs of `UNSEEN`, `--pairs unseen` draws only those, `--pairs all` draws every pair.

examples:
  python examples/quickstart/draw.py runs/quickstart/pictures --count 8000 --pairs seen
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 38, 34),
    "orange": (245, 136, 24),
    "yellow": (244, 218, 45),
    "green": (46, 160, 60),
    "cyan": (50, 200, 215),
    "blue": (40, 75, 205),
    "purple": (132, 52, 170),
    "pink": (245, 130, 185),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Each shape and five of the colours miss one partner in training.
UNSEEN = (
    ("red", "square"),
    ("yellow", "triangle"),
    ("green", "circle"),
    ("blue", "star"),
    ("orange", "cross"),
)
SIZES = {"small": (0.21, 0.22), "medium": (0.25, 0.26), "large": (0.29, 0.30)}  # radius / side
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
BACKGROUNDS = ("plain", "shaded", "noisy", "striped")
SIDES = (48, 56, 64)  # pixels; one tile of the `nano` preset is 64

QUESTIONS = {
    "colour": ("What colour is the shape?", "Which colour is it?", "What colour is it?"),
    "shape": ("What shape is it?", "Which shape is this?", "What shape do you see?"),
    "where": ("Where is it?", "Where is the shape?", "Where in the picture is it?"),
    "size": ("How big is it?", "What size is the shape?"),
    "box": ("Give its box.", "Draw a box around it.", "What is the box of the shape?"),
}
NUM_ASKED = 3  # questions in a conversation; the shape, the hardest to learn, is always one
DESCRIBED = 0.5  # of the pictures; a description is short, so that more pictures are seen
DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")

_OVERSAMPLING = 4  # the shape's mask is drawn this much larger, then averaged down
_CELL_MARGIN = 0.02  # centres keep this far from the borders between places
_CONTRAST = 130.0  # least distance in RGB between a shape and what is behind it


@dataclass(frozen=True)
class Scene:
    """One picture and the truth about it. The box is in percent of width and height."""

    image: Image.Image
    colour: str
    shape: str
    size: str
    place: str
    box: tuple[int, int, int, int]

    def answer(self, kind: str) -> str:
        """What is right to say when asked for `kind`."""
        if kind == "box":
            return "[" + " ".join(map(str, self.box)) + "]"
        return {"colour": self.colour, "shape": self.shape, "size": self.size}.get(kind, self.place)

    def description(self) -> str:
        preposition = "in" if self.place == "the middle" else "at"
        return f"A {self.size} {self.colour} {self.shape} {preposition} {self.place}."


def place_name(row: int, column: int) -> str:
    """Name a cell of the 3 x 3 grid."""
    if row == 1 and column == 1:
        return "the middle"
    words = [ROWS[row]] * (row != 1) + [COLUMNS[column]] * (column != 1)
    return "the " + " ".join(words)


def draw_scene(rng: random.Random, pairs: list[tuple[str, str]]) -> Scene:
    """Draw one picture; the same generator state gives the same picture."""
    colour, shape = rng.choice(pairs)
    size = rng.choice(list(SIZES))
    row, column = rng.randrange(3), rng.randrange(3)
    side = rng.choice(SIDES)
    radius = rng.uniform(*SIZES[size])
    centre = (_centre(rng, column, radius), _centre(rng, row, radius))
    mask, box = _mask(rng, shape, centre, radius, side)
    rgb = tuple(min(255, max(0, v + rng.randint(-18, 18))) for v in COLOURS[colour])
    background = _background(rng, side, rgb)
    alpha = np.asarray(mask, np.float32)[:, :, None] / 255
    pixels = background * (1 - alpha) + np.asarray(rgb, np.float32) * alpha
    image = Image.fromarray(pixels.round().astype(np.uint8))
    return Scene(image, colour, shape, size, place_name(row, column), box)


def _centre(rng: random.Random, cell: int, radius: float) -> float:
    low = max(cell / 3 + _CELL_MARGIN, radius + 0.01)
    high = min((cell + 1) / 3 - _CELL_MARGIN, 0.99 - radius)
    return rng.uniform(low, high)


def _mask(
    rng: random.Random, shape: str, centre: tuple[float, float], radius: float, side: int
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The shape's coverage of every pixel, and the tight box around it in percent."""
    scale = side * _OVERSAMPLING
    large = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(large)
    x, y, r = centre[0] * scale, centre[1] * scale, radius * scale
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        turn = math.radians(rng.uniform(-5, 5))
        pen.polygon(_outline(shape, x, y, r, turn), fill=255)
    left, top, right, bottom = large.getbbox()
    box = tuple(round(100 * v / scale) for v in (left, top, right, bottom))
    return large.reduce(_OVERSAMPLING), box


def _outline(shape: str, x: float, y: float, r: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a polygon, as angle from straight up and distance in radii."""
    if shape == "square":
        corners = [(math.pi / 4 + k * math.pi / 2, 1.0) for k in range(4)]
    elif shape == "triangle":
        corners = [(k * 2 * math.pi / 3, 1.0) for k in range(3)]
    elif shape == "star":
        corners = [(k * math.pi / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    else:  # a cross: arms a third wide
        arm, inner = math.atan2(1, 3), math.pi / 4
        corners = []
        for k in range(4):
            quarter = k * math.pi / 2
            corners += [(quarter - arm, 1.0), (quarter + arm, 1.0), (quarter + inner, 0.447)]
    return [(x + d * r * math.sin(a + turn), y - d * r * math.cos(a + turn)) for a, d in corners]


def _background(rng: random.Random, side: int, rgb: tuple[int, ...]) -> np.ndarray:
    """A background whose colours all differ clearly from the shape's. float32 [side, side, 3]"""
    first, second = _backdrop(rng, rgb), _backdrop(rng, rgb)
    noise = np.random.default_rng(rng.getrandbits(32))
    kind = rng.choice(BACKGROUNDS)
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    angle = rng.uniform(0, 2 * math.pi)
    along = (grid[None, :] - 0.5) * math.cos(angle) + (grid[:, None] - 0.5) * math.sin(angle)
    if kind == "shaded":
        blend = np.clip(along / 1.2 + 0.5, 0, 1)
        second = first + (second - first) * 0.5
    elif kind == "striped":
        blend = (np.sin(along * rng.uniform(20, 60)) * 3 + 0.5).clip(0, 1)
        second = first + (second - first) * 0.5
    else:
        blend = np.zeros((side, side), np.float32)
    pixels = first + (second - first) * blend[:, :, None].astype(np.float32)
    if kind == "noisy":
        pixels = pixels + noise.normal(0, 22, (side, side, 3)).astype(np.float32)
    return pixels.clip(0, 255)


def _backdrop(rng: random.Random, rgb: tuple[int, ...]) -> np.ndarray:
    """A colour far from `rgb`, mostly quiet, from nearly black to nearly white."""
    while True:
        grey, spread = rng.uniform(15, 240), rng.choice((4, 10, 20))
        colour = [min(250, max(5, grey + rng.uniform(-spread, spread))) for _ in range(3)]
        if math.dist(colour, rgb) >= _CONTRAST:
            return np.asarray(colour, np.float32)


def chat(rng: random.Random, scene: Scene) -> list[dict[str, str]]:
    """A conversation about a picture; the first user message carries the picture."""
    if rng.random() < DESCRIBED:
        turns = [(rng.choice(DESCRIBE), scene.description())]
    else:
        others = [kind for kind in QUESTIONS if kind != "shape"]
        kinds = ["shape", *rng.sample(others, NUM_ASKED - 1)]
        rng.shuffle(kinds)
        turns = [(rng.choice(QUESTIONS[kind]), scene.answer(kind)) for kind in kinds]
    messages = []
    for question, answer in turns:
        marker = "" if messages else "<|image|>"
        messages.append({"role": "user", "content": marker + question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def pairs_of(which: str) -> list[tuple[str, str]]:
    """The colour-shape pairs of `seen`, `unseen` or `all`."""
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if which == "all":
        return every
    return [pair for pair in every if (pair in UNSEEN) == (which == "unseen")]


def write_pictures(folder: Path, count: int, pairs: list[tuple[str, str]], seed: int) -> None:
    """Write `count` pictures, a conversation about each, and the truth about each."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    chats, truths = [], []
    for i in range(count):
        scene = draw_scene(rng, pairs)
        name = f"images/{i:05d}.png"
        scene.image.save(folder / name)
        chats.append(json.dumps({"messages": chat(rng, scene), "images": [name]}))
        answers = {kind: scene.answer(kind) for kind in QUESTIONS}
        is_unseen = (scene.colour, scene.shape) in UNSEEN
        truths.append(json.dumps({"image": name, "is_unseen_pair": is_unseen, **answers}))
    (folder / "chats.jsonl").write_text("\n".join(chats) + "\n", encoding="utf-8")
    (folder / "truth.jsonl").write_text("\n".join(truths) + "\n", encoding="utf-8")


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--pairs", choices=("seen", "unseen", "all"), default="seen")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_pictures(args.folder, args.count, pairs_of(args.pairs), args.seed)
    print(f"drew {args.count} pictures of {args.pairs} pairs into {args.folder}")


if __name__ == "__main__":
    main()
