"""Open the pictures and videos that people name.

in: paths; out: RGB pictures, films; raises L4Error that says which file and why
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from l4cli.data.media import open_picture
from l4cli.data.video import Film, Sampling, open_film
from l4cli.errors import L4Error


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


def open_video(path: Path, sampling: Sampling) -> Film:
    """Look at a video and choose its frames. raises: L4Error with its path"""
    try:
        return open_film(path, sampling)
    except L4Error as error:
        raise L4Error(f"cannot use video `{path}`", why=error.why, fix=error.fix) from None
