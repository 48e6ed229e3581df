"""Picture geometry: figures by hand, files as published, files of transformers, bad values."""

from __future__ import annotations

import json

import pytest

from l4cli.data.geometry import PictureGeometry
from l4cli.errors import L4Error


def test_llama4_tile_costs_144_tokens() -> None:
    assert PictureGeometry().tokens_per_tile == 144
    assert PictureGeometry(64, 8, 0.5, 16).tokens_per_tile == 16
    assert PictureGeometry(28, 7, 1.0, 1).tokens_per_tile == 16


def test_round_trip() -> None:
    geometry = PictureGeometry(64, 8, 0.5, 4)
    assert PictureGeometry.from_dict(geometry.to_dict()) == geometry
    assert PictureGeometry.from_processor_files(geometry.to_processor_files()) == geometry
    assert PictureGeometry.from_processor_files({"tokenizer.json": "{}"}) is None


def test_published_files() -> None:
    pictures = {
        "image_processor_type": "Llama4ImageProcessorFast",
        "size": {"height": 336, "width": 336},
        "max_patches": 16,
        "resize_to_max_canvas": False,
    }
    processor = {"image_token": "<|image|>", "patch_size": 14}
    files = {
        "preprocessor_config.json": json.dumps(pictures),
        "processor_config.json": json.dumps(processor),
    }
    assert PictureGeometry.from_processor_files(files) == PictureGeometry()
    nested = {"processor_config.json": json.dumps({**processor, "image_processor": pictures})}
    assert PictureGeometry.from_processor_files(nested) == PictureGeometry()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"image_size": 0}, "`image_size`"),
        ({"image_size": "336"}, "`image_size`"),
        ({"image_size": 10**9}, "too many"),
        ({"patch_size": True}, "`patch_size`"),
        ({"patch_size": 13}, "divide"),
        ({"patch_size": 336}, "shrink"),
        ({"pixel_shuffle_ratio": 0}, "`pixel_shuffle_ratio`"),
        ({"pixel_shuffle_ratio": "a"}, "`pixel_shuffle_ratio`"),
        ({"max_patches": 0}, "`max_patches`"),
    ],
)
def test_impossible_geometry_is_refused(fields, why) -> None:
    with pytest.raises(L4Error) as caught:
        PictureGeometry.from_dict({**PictureGeometry().to_dict(), **fields})
    assert why in caught.value.why


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": "{"},
        {"preprocessor_config.json": "[1]"},
        {"preprocessor_config.json": '{"size": {"height": 336, "width": 224}}'},
        {"preprocessor_config.json": '{"size": {}}'},
        {"preprocessor_config.json": '{"resize_to_max_canvas": true}'},
        {"processor_config.json": '{"image_processor": [1]}'},
    ],
)
def test_bad_processor_files_are_refused(files) -> None:
    with pytest.raises(L4Error):
        PictureGeometry.from_processor_files(files)
