"""A checkpoint's parameters one at a time, so that memory holds one matrix and not a model.

in: a folder; out: names, shapes, and values as the model has them: whole, or one expert's
source: the same matching as `load_weights`; safetensors slices
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from l4cli.checkpoint.hf_keys import Piece, match
from l4cli.checkpoint.reader import DTYPES, check_matching, load_config, require_finite
from l4cli.checkpoint.stored import StoredWeights, open_weights, resolve_checkpoint
from l4cli.errors import L4Error
from l4cli.model import Llama4Config, build_model

# Pages of a mapped file count as ours until it is closed, so a big file is opened anew.
_MAPPED_BYTES = 1 << 30


class ParameterReader:
    """`with ParameterReader(path) as parameters:`; everything headers can tell is checked first."""

    def __init__(self, path: Path | str) -> None:
        self.folder = resolve_checkpoint(path)
        self.config: Llama4Config = load_config(self.folder)
        self.stored: StoredWeights = open_weights(self.folder)
        model = build_model(self.config, "meta")
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        matching = match(self.stored.tensors, self.shapes)
        check_matching(self.stored, matching)
        self._pieces: dict[str, list[Piece]] = {name: [] for name in self.shapes}
        for piece in matching.pieces:
            self._pieces[piece.name].append(piece)
        self._file: Any = None
        self._open_name = ""
        self._mapped = 0

    def __enter__(self) -> ParameterReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def dtype(self, name: str) -> torch.dtype:
        """What a parameter is stored in."""
        return DTYPES[self.stored.tensors[self._pieces[name][0].key].dtype]

    def num_parts(self, name: str) -> int:
        """How many parts `parts` gives: the experts of a fused weight, else one."""
        return self.shapes[name][0] if len(self.shapes[name]) == 3 else 1

    def parts(self, name: str) -> Iterator[Tensor]:
        """A parameter in parts that follow one another in memory: expert by expert, or whole."""
        for index in range(self.num_parts(name)):
            yield self.part(name, index)

    def part(self, name: str, index: int = 0) -> Tensor:
        """One part, as stored. shapes: fused experts [E, in, out] -> [in, out], others whole

        raises: L4Error for values that are not finite
        """
        pieces = self._pieces[name]
        if pieces[0].expert is None:
            is_fused = len(self.shapes[name]) == 3
            return self._read(pieces[0].key, index if is_fused else None)
        own = sorted((p for p in pieces if p.expert == index), key=lambda p: p.columns)
        # Each is an nn.Linear's [out, in]; side by side they are the fused [in, out].
        return torch.cat([self._read(piece.key, None).T for piece in own], dim=1)

    def _read(self, key: str, index: int | None) -> Tensor:
        name = self.stored.file_of[key]
        path = self.stored.folder / name
        try:
            if name != self._open_name or self._mapped > _MAPPED_BYTES:
                self._close()
                self._file = safe_open(path, framework="pt", device="cpu").__enter__()
                self._open_name = name
            if index is None:
                tensor: Tensor = self._file.get_tensor(key)
            else:
                tensor = self._file.get_slice(key)[index]
        except SafetensorError as error:
            fix = "fetch or write the file again"
            raise L4Error(f"cannot read `{path}`", why=str(error), fix=fix) from error
        self._mapped += tensor.numel() * tensor.itemsize
        require_finite(path, key, tensor)
        return tensor

    def _close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._file, self._open_name, self._mapped = None, "", 0
