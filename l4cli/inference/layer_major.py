"""Read a long text layer by layer: one layer's keys, values and weights are there at a time.

in: ids and continuations ("questions"); out: what `Engine.score_many` gives after a prefill
The states of the whole text stay in host memory or in a mapped file. The last layer's queries are
computed for the questions only. What is left after it is scores: nothing can be generated.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4cli.checkpoint import load_config, load_weights
from l4cli.errors import L4Error
from l4cli.inference.cache import chunk_size_of
from l4cli.inference.kept import CacheOptions
from l4cli.inference.layer_cache import LayerCache
from l4cli.inference.questions import Questions
from l4cli.model import Llama4Config, build_model
from l4cli.model.text import TextModel
from l4cli.ops.batch import Batch

Progress = Callable[[int, int], None]  # layers done, of so many


class OneLayer:
    """Stands where a cache stands while one layer goes through the text."""

    def __init__(self, layer: LayerCache) -> None:
        self.layer = layer

    def attend(self, layer_idx: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Append k and v, then attend with q, the newest tokens' or none."""
        return self.layer.attend(q_BTNH[0], k_BTKH[0], v_BTKH[0])[None]


@contextlib.contextmanager
def hidden_states(
    store: str | Path, num_tokens: int, width: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Room for the states of a text: in memory, or in a file that is removed afterwards."""
    if store == "memory" or num_tokens == 0:
        yield torch.empty(num_tokens, width, dtype=dtype)
        return
    path = Path(store)
    what = f"cannot keep hidden states in `{path}`"
    size = num_tokens * width * dtype.itemsize
    try:
        with open(path, "xb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now, not by SIGBUS
    except FileExistsError:
        fix = "remove it, or name a file that does not exist"
        raise L4Error(what, why="the file exists", fix=fix) from None
    except OSError as error:
        path.unlink(missing_ok=True)
        why = f"{(error.strerror or str(error)).lower()}; {size} bytes are needed"
        raise L4Error(what, why=why, fix="name a file on a disk with room") from error
    try:
        shape = (num_tokens, width)
        states = torch.from_file(str(path), shared=True, size=num_tokens * width, dtype=dtype)
        yield states.view(shape)
    finally:
        path.unlink(missing_ok=True)


def open_streamed(
    path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype | None,
    config: Llama4Config | None = None,
) -> Any:
    """A checkpoint's model without its layers: they come one by one while it reads.

    `config`: of the same shape, in place of the checkpoint's own.
    """
    model = build_model(config or load_config(path), device="meta")
    load_weights(model, path, device=device, dtype=dtype, only=lambda name: ".layers." not in name)
    model.compute_dtype = _text(model).embed_tokens.weight.dtype
    return model


@contextlib.contextmanager
def resident_layer(model: Any, layer_idx: int, weights: Path | str | None) -> Iterator[None]:
    """Bring a layer's weights in from a checkpoint and give them up again, if they are not here."""
    text = _text(model)
    layer = text.layers[layer_idx]
    if not any(parameter.is_meta for parameter in layer.parameters()):
        yield
        return
    assert weights is not None, "a model without weights needs a checkpoint to stream them from"
    prefix = next(name for name, module in model.named_modules() if module is layer) + "."
    ends = text.embed_tokens.weight
    load_weights(
        model,
        weights,
        device=ends.device,
        dtype=ends.dtype,
        only=lambda name: name.startswith(prefix),
    )
    try:
        yield
    finally:
        layer.to("meta")


def read_layer_major(
    model: Any,
    embedded: Iterator[tuple[slice, Tensor]],
    hidden_TD: Tensor,
    questions: Sequence[Tensor],
    options: CacheOptions,
    piece: int,
    weights: Path | str | None = None,
    on_progress: Progress | None = None,
) -> Tensor:
    """Take a text and the questions after it through all layers.

    `embedded`: the text's embeddings, piece by piece, for `hidden_TD` to hold; each question is
    the ids [n] that follow the text. shapes: -> the questions' normed states, one after another
    """
    text, device = _text(model), _text(model).embed_tokens.weight.device
    for rows, h_TD in embedded:
        hidden_TD[rows] = h_TD.to(hidden_TD.device)
    num_read, lengths = len(hidden_TD), [len(ids) for ids in questions]
    asked_1MD = model.embed(torch.cat(list(questions))[None].to(device))
    positions = torch.cat([torch.arange(num_read, num_read + n) for n in lengths])
    at_1M = positions[None].to(device)
    last = len(text.layers) - 1
    for i in range(last + 1):
        layer = LayerCache(chunk_size_of(text.config, i), options)
        with resident_layer(model, i, weights):
            for start in range(0, num_read, piece):
                rows = slice(start, min(start + piece, num_read))
                h_1TD = hidden_TD[None, rows].to(device)
                batch = _at(torch.arange(rows.start, rows.stop, device=device)[None])
                needed = 0 if i == last else None
                h_1TD = text.run_layer(i, h_1TD, batch, OneLayer(layer), needed)
                if needed is None:
                    hidden_TD[rows] = h_1TD[0].to(hidden_TD.device)
            after = Questions({i: layer}, num_read, lengths)
            asked_1MD = text.run_layer(i, asked_1MD, _at(at_1M), after)
        if on_progress is not None:
            on_progress(i + 1, last + 1)
    return text.norm(asked_1MD)[0]


def _at(positions_1T: Tensor) -> Batch:
    """Positions alone: of a token a layer needs no more."""
    return Batch.continuing(positions_1T, positions_1T)


def _text(model: Any) -> TextModel:
    return getattr(model, "language_model", model).model
