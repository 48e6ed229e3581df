"""Cut what is to be read: ids into pieces that split no tile, continuations into groups.

in: ids, tiles, lengths; out: slices, or a refusal of what does not belong together
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.model import Llama4Config


def as_ids(tokens: Any) -> Tensor:
    """Ids as int64, from a list, an array of any integer type or a tensor."""
    if isinstance(tokens, Tensor):
        return tokens.to("cpu", torch.int64)
    return torch.from_numpy(np.asarray(tokens, dtype=np.int64))


def check_ids(ids_T: Tensor, vocab_size: int) -> None:
    outside = ids_T[(ids_T < 0) | (ids_T >= vocab_size)]
    if len(outside):
        why = f"token id {int(outside[0])} is outside the vocabulary of {vocab_size}"
        fix = "use the tokenizer in the checkpoint's folder"
        raise L4Error("cannot read these tokens", why=why, fix=fix)


def groups_of(lengths: list[int], most: int) -> list[slice]:
    """Neighbours that together have about `most` tokens."""
    groups, start, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > most:
            groups.append(slice(start, i))
            start, total = i, 0
        total += length
    if start < len(lengths):
        groups.append(slice(start, len(lengths)))
    return groups


def prefill_pieces(
    ids_T: Tensor, pixel_values: Tensor | None, config: Llama4Config, chunk_size: int
) -> list[tuple[slice, slice]]:
    """Cut a prompt into pieces of about `chunk_size`, each with the tiles that lie in it whole.

    A tile is encoded once, with the piece it is in, so pieces end before or after its run.
    """
    assert chunk_size > 0
    placeholders, per_tile = _placeholders(ids_T, pixel_values, config)
    pieces = []
    start = first_tile = 0
    while start < len(ids_T):
        end = min(start + chunk_size, len(ids_T))
        last_tile, inside = divmod(int(torch.searchsorted(placeholders, end)), per_tile)
        if inside:
            end = int(placeholders[last_tile * per_tile])
            if end <= start:  # a tile longer than a piece is read whole
                last_tile += 1
                end = int(placeholders[last_tile * per_tile - 1]) + 1
        pieces.append((slice(start, end), slice(first_tile, last_tile)))
        start, first_tile = end, last_tile
    return pieces


def _placeholders(
    ids_T: Tensor, pixel_values: Tensor | None, config: Llama4Config
) -> tuple[Tensor, int]:
    """Where picture features go, and how many a tile has. raises: L4Error if they do not match"""
    num_tiles = 0 if pixel_values is None else len(pixel_values)
    what = "pictures do not match the text"
    if config.vision is None:
        if num_tiles:
            fix = "use a checkpoint with vision, or leave the pictures out"
            raise L4Error(what, why="the model has no picture encoder", fix=fix)
        return ids_T.new_empty(0), 1
    placeholders = (ids_T == config.image_token_index).nonzero().flatten()
    per_tile = config.vision.tokens_per_tile
    if num_tiles * per_tile != len(placeholders):
        why = f"{num_tiles} tiles of {per_tile} tokens for {len(placeholders)} placeholder tokens"
        fix = "give as many tiles as the text has placeholders for"
        raise L4Error(what, why=why, fix=fix)
    return placeholders, per_tile
