"""Small shards for tests: text of known tokens, drawn pictures, through the real writer."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import grid_of
from l4cli.data.packing import BestFitPacker
from l4cli.data.pieces import Splitter, offsets_of
from l4cli.data.shard_writer import ShardWriter
from l4cli.data.stream import StreamHeader, StreamWriter
from l4cli.text import Tokenizer, image_block, load_tokenizer

GEOMETRY = PictureGeometry(image_size=16, patch_size=4, pixel_shuffle_ratio=0.5, max_patches=4)


def header_of(tokenizer: Tokenizer, geometry: PictureGeometry = GEOMETRY) -> StreamHeader:
    return StreamHeader(tokenizer.files(), tokenizer.fingerprint, tokenizer.vocab_size, geometry)


def text_frame(seed: int, num_documents: int = 20, mean: int = 30) -> Frame:
    """Random bytes between BOS and EOS; every other document has a mask and a label."""
    rng, tokenizer = np.random.default_rng(seed), load_tokenizer("bytes")
    lengths = rng.geometric(1 / mean, num_documents) + 2
    offsets = offsets_of(lengths)
    tokens = rng.integers(0, 256, offsets[-1]).astype(np.uint32)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = tokenizer.bos_id, tokenizer.eos_id
    mask = (rng.random(offsets[-1]) < 0.7).astype(np.uint8)
    mask[np.repeat(np.arange(num_documents) % 2 == 0, lengths)] = 1
    codes = (np.arange(num_documents) % 3 - 1).astype(np.int32)
    return Frame(tokens, offsets, loss_mask=mask, labels={"lang": (codes, ["el", "en"])})


def picture_frame(seed: int, num_documents: int = 6) -> Frame:
    """Documents of one or two pictures each, of several sizes, between a little text."""
    rng, tokenizer = np.random.default_rng(seed), load_tokenizer("bytes")
    tokens: list[np.ndarray] = []
    lengths, media, positions, tiles = [], [], [], []
    for _ in range(num_documents):
        begin = sum(len(part) for part in tokens)
        for _ in range(int(rng.integers(1, 3))):
            width, height = (int(side) for side in rng.integers(5, 40, 2))
            data = drawn(width, height, rng)
            rows, cols = grid_of(width, height, GEOMETRY)
            block = image_block(tokenizer, rows, cols, GEOMETRY.tokens_per_tile)
            tokens.append(rng.integers(0, 256, int(rng.integers(0, 9))).astype(np.uint32))
            first = int(np.flatnonzero(block == tokenizer.patch_id)[0])
            positions.append(sum(len(part) for part in tokens) + first)
            tokens.append(block)
            media.append(data)
            tiles.append((rows, cols))
        tokens.append(np.array([tokenizer.eos_id], np.uint32))
        lengths.append(sum(len(part) for part in tokens) - begin)
    flat = np.concatenate(tokens)
    special = [tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.image_id]
    special += [tokenizer.patch_id, tokenizer.tile_x_id, tokenizer.tile_y_id]
    return Frame(
        flat,
        offsets_of(np.array(lengths)),
        loss_mask=(~np.isin(flat, special)).astype(np.uint8),
        media=media,
        media_positions=np.array(positions, np.int64),
        media_tiles=np.array(tiles, np.int32),
    )


def drawn(width: int, height: int, rng: np.random.Generator) -> bytes:
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_shards(
    folder: Path, *frames: Frame, seq_len: int = 64, tokenizer: str = "bytes", **options: Any
) -> dict[str, Any]:
    """Pack frames in order and write them; gives the index."""
    loaded = load_tokenizer(tokenizer)
    geometry = options.pop("geometry", GEOMETRY)
    splitter, packer = Splitter(seq_len), BestFitPacker(seq_len, 64 * seq_len, None)
    splitter.begin_stream("x", lambda: (loaded.image_start_id, loaded.image_end_id))
    packing = {"method": "best-fit"}
    with ShardWriter(folder, seq_len=seq_len, packing=packing, **options) as writer:
        for frame in frames:
            for rows in packer.add(splitter.add(frame)):
                writer.add(rows)
        for rows in packer.finish():
            writer.add(rows)
        return writer.finish(header_of(loaded, geometry), splitter.labels.values())


def write_stream(
    path: Path, *frames: Frame, tokenizer: str = "bytes", geometry: PictureGeometry = GEOMETRY
) -> Path:
    with open(path, "wb") as file:
        writer = StreamWriter(file, load_tokenizer(tokenizer), geometry)
        for frame in frames:
            writer.write(frame)
        writer.close()
    return path


def change_tensors(folder: Path, change: Callable[[Any], Any], number: int = -1) -> None:
    """Rewrite one shard, and the index so that the file's size and hash fit."""
    index = json.loads((folder / "index.json").read_text())
    facts = index["shards"][number]
    path = folder / facts["file"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    facts["bytes"] = path.stat().st_size
    facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
