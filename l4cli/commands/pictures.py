"""Open the pictures that people name.

in: paths; out: RGB pictures; raises L4Error that says which file and why
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from l4cli.data.media import open_picture
from l4cli.errors import L4Error


def open_images(paths: list[Path]) -> list[tuple[str, Image.Image]]:
    """Open pictures. raises: L4Error naming the one that cannot be used"""
    return [(str(path), open_image(path)) for path in paths]


def open_image(path: Path) -> Image.Image:
    """Open one PNG or JPEG. raises: L4Error with its path"""
    what = f"cannot use picture `{path}`"
    try:
        data = path.read_bytes()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise L4Error(what, why=why, fix="name a PNG or JPEG file") from None
    if not data:
        raise L4Error(what, why="the file is empty", fix="name a PNG or JPEG file")
    try:
        return open_picture(data)
    except L4Error as error:
        raise L4Error(what, why=error.why, fix=error.fix) from None
