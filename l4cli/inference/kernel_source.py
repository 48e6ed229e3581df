"""Read a checkpoint's weights one at a time, as `kernel_blobs` asks for them.

in: a folder's headers; out: weights [O, I] by module name, experts apart, codes as they are
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from l4cli.checkpoint import StoredWeights, open_weights
from l4cli.checkpoint.hf_keys import TEXT_PREFIX
from l4cli.checkpoint.quantized import is_quantized, read_quantized
from l4cli.checkpoint.reader import LastRead, read_finite
from l4cli.errors import L4Error
from l4cli.quantization import QuantizedWeight


class CheckpointSource:
    """The text half of a folder, plain or quantized."""

    def __init__(self, folder: Path) -> None:
        self.stored: StoredWeights = open_weights(folder)
        is_nested = any(key.startswith(TEXT_PREFIX) for key in self.stored.tensors)
        self.prefix = TEXT_PREFIX if is_nested else ""
        self._of_expert = LastRead(self.stored)

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """A weight, a norm or a table. raises: L4Error for what is damaged or not finite"""
        key = self.prefix + name
        if is_quantized(self.stored, key):
            return read_quantized(self.stored, key)
        if f"{key}.weight" in self.stored.tensors:
            return self.plain(f"{key}.weight")
        head, _, last = key.rpartition(".")
        owner, _, index = head.rpartition(".")
        fused = f"{owner}.{'down_proj' if last == 'down_proj' else 'gate_up_proj'}"
        if index.isdigit() and fused in self.stored.tensors:
            return self._of_fused(fused, int(index), last)
        return self.plain(key)  # a bare parameter, as a softmax's scale

    def _of_fused(self, key: str, expert: int, proj: str) -> Tensor:
        """One expert's map. shapes: stored [E, in, out], gate columns before up -> [O, I]"""
        columns = self.stored.tensors[key].shape[2]
        part = {"gate_proj": slice(0, columns // 2), "up_proj": slice(columns // 2, columns)}
        return self._of_expert(key, expert)[:, part.get(proj, slice(0, columns))].T

    def plain(self, key: str) -> Tensor:
        """A tensor by its stored name."""
        if key not in self.stored.file_of:
            what = f"cannot use `{self.stored.folder}`"
            raise L4Error(what, why=f"it has no `{key}`", fix="fetch the checkpoint again")
        return read_finite(self.stored, key)
