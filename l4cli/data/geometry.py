"""How a picture is cut into tiles and how many tokens a tile costs.

in: a preset's vision fields or processor config files; out: `PictureGeometry`, equal or refused
source: HF Llama4ImageProcessor and Llama4Processor configs, transformers 5.23
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l4cli.errors import L4Error

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
PROCESSOR_FILES = (PREPROCESSOR_FILE, PROCESSOR_FILE)
MAX_IMAGE_SIZE = 8192  # far above any tower; a larger value in a file is a damaged file


@dataclass(frozen=True)
class PictureGeometry:
    """Tile side, patch side, pixel shuffle and the most tiles of one picture."""

    image_size: int = 336
    patch_size: int = 14
    pixel_shuffle_ratio: float = 0.5
    max_patches: int = 16

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "max_patches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _bad(f"`{name}` is {value!r}, not a whole number above 0")
        if self.image_size > MAX_IMAGE_SIZE or self.max_patches > 1024:
            raise _bad(f"tiles of {self.image_size} pixels, up to {self.max_patches}, are too many")
        ratio = self.pixel_shuffle_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise _bad(f"`pixel_shuffle_ratio` is {ratio!r}, not a number in (0, 1]")
        if self.image_size % self.patch_size:
            raise _bad(f"patches of {self.patch_size} do not divide tiles of {self.image_size}")
        if not (self.grid_size * ratio).is_integer():
            raise _bad(f"a grid of {self.grid_size} patches cannot shrink by {ratio}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """`<|patch|>` tokens that stand for one tile, after pixel shuffle."""
        return int(self.grid_size * self.pixel_shuffle_ratio) ** 2

    def to_dict(self) -> dict[str, Any]:
        """The four fields, as they stand in streams, shards and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PictureGeometry:
        """Read the four fields; all must be there and nothing else."""
        names = ("image_size", "patch_size", "pixel_shuffle_ratio", "max_patches")
        if not isinstance(fields, Mapping) or set(fields) != set(names):
            raise _bad(f"the fields should be {', '.join(f'`{name}`' for name in names)}")
        return cls(**fields)

    @classmethod
    def from_processor_files(cls, files: Mapping[str, str]) -> PictureGeometry | None:
        """Read a tokenizer folder's processor config files; None when it has none.

        shapes: file name -> text, as `Tokenizer.files()` gives them
        """
        if PREPROCESSOR_FILE not in files and PROCESSOR_FILE not in files:
            return None
        processor = _object(files, PROCESSOR_FILE)
        # transformers 5 nests the picture half in `processor_config.json`; older files stand apart.
        pictures = _object(files, PREPROCESSOR_FILE) or processor.get("image_processor", {})
        if not isinstance(pictures, dict):
            raise _bad(f"`image_processor` in `{PROCESSOR_FILE}` is not a JSON object")
        if pictures.get("resize_to_max_canvas"):
            raise _bad("`resize_to_max_canvas` is true, and Llama 4 was trained with false")
        size = pictures.get("size", {"height": cls.image_size, "width": cls.image_size})
        if isinstance(size, Mapping):
            if size.get("height") != size.get("width"):
                raise _bad(f"tiles of {size.get('width')} x {size.get('height')} are not square")
            size = size.get("height")
        return cls(
            image_size=size,
            patch_size=processor.get("patch_size", cls.patch_size),
            pixel_shuffle_ratio=processor.get("pixel_shuffle_ratio", cls.pixel_shuffle_ratio),
            max_patches=pictures.get("max_patches", cls.max_patches),
        )

    def to_processor_files(self) -> dict[str, str]:
        """File name -> text of the configs from which transformers builds its processor."""
        pictures = {
            "image_processor_type": "Llama4ImageProcessor",
            "processor_class": "Llama4Processor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": self.image_size, "width": self.image_size},
            "max_patches": self.max_patches,
            "resize_to_max_canvas": False,
        }
        processor = {
            "processor_class": "Llama4Processor",
            "image_token": "<|image|>",
            "fake_image_token": "<|image|>",
            "patch_size": self.patch_size,
            "pixel_shuffle_ratio": self.pixel_shuffle_ratio,
        }
        return {
            PREPROCESSOR_FILE: json.dumps(pictures, indent=2) + "\n",
            PROCESSOR_FILE: json.dumps(processor, indent=2) + "\n",
        }

    def describe(self) -> str:
        """The four figures in one short line, for errors and tables."""
        return (
            f"tiles of {self.image_size} px, patches of {self.patch_size} px, "
            f"pixel shuffle {self.pixel_shuffle_ratio:g}, at most {self.max_patches} tiles"
        )


def read_processor_files(folder: Path, fix: str) -> dict[str, str]:
    """File name -> text of those a folder has. raises: L4Error with `fix` for unreadable ones"""
    try:
        present = [name for name in PROCESSOR_FILES if (folder / name).is_file()]
        return {name: (folder / name).read_text(encoding="utf-8") for name in present}
    except (OSError, ValueError) as error:
        what = f"cannot read the processor config in `{folder}`"
        raise L4Error(what, why=" ".join(str(error).split()).lower(), fix=fix) from error


def _object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise _bad(f"`{name}` is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _bad(f"`{name}` is not a JSON object")
    return value


def _bad(why: str) -> L4Error:
    return L4Error(
        "cannot use this picture geometry",
        why=why,
        fix="take Llama 4's own (336/14/0.5/16), or a preset's with `l4 tokenize --preset NAME`",
    )
