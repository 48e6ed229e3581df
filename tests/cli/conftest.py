"""Data that several modules train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from tiny_pretrain import (
    TINY,
    pack_shards,
)

from l4cli.cli import main


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text/`, `held/` and `pictures/` shards, `tiny.json`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    for name, lines in (("text", 400), ("held", 30)):
        text = "".join(f"line {i} says {i * 7919 % 1000} and ends\n" for i in range(lines))
        (folder / f"{name}.txt").write_text(text)
        pack_shards(folder, name, f"{name}.txt", "--format", "lines")
    rows = []
    for i in range(8):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).rectangle((8, 8, 20 + 4 * i, 40), fill=(255, 30 * i, 0))
        picture.save(folder / f"{i}.png")
        rows.append({"text": f"<|image|> a box {i} wide", "images": [f"{i}.png"]})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack_shards(folder, "pictures", "pictures.jsonl", "--preset", "nano")
    return folder


@pytest.fixture(scope="session")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows the lines of `text/` a little."""
    out = tmp_path_factory.mktemp("teacher") / "big"
    config = {**TINY, "hidden_size": 64, "num_attention_heads": 4}
    (out.parent / "big.json").write_text(json.dumps(config))
    shape = ["--config", str(out.parent / "big.json"), "--steps", "40", "--batch-size", "8"]
    assert main(["pretrain", str(data / "text"), *shape, "--lr", "0.01", "-o", str(out), "-q"]) == 0
    return out / "latest"
