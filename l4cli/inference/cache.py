"""What the model has read: keys and values, as few as its attention can still reach.

in: q, k, v of new tokens from each layer; out: attention over everything kept
source: HF `chunked_overlay` (a query sees keys of its own chunk of absolute positions only)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.inference.attention import Part, attend_causally, attend_to_all
from l4cli.model.config import TextConfig

FORMAT = "l4-cache-1"
SPARE_TOKENS = 64  # room beyond what a prompt needs, so that decoding does not start with a copy


class LayerCache:
    """One layer of one sequence: a prefix shared with forks, then an own tail that grows.

    With a chunk size, both together hold the current chunk only: at a border they are emptied.
    """

    def __init__(self, chunk_size: int | None) -> None:
        self.chunk_size = chunk_size
        self.num_tokens = 0  # read so far, kept or not
        self.prefix: Part | None = None  # never written to
        self.tail: Part | None = None  # [K, capacity, H] twice; only this cache writes to it
        self.tail_length = 0

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Append k and v, then attend with q. shapes: -> out_TNH"""
        if len(q_TNH) == 1:
            self._append(k_TKH, v_TKH)
            out_1NH = attend_to_all(q_TNH, self.parts())
            self._advance(1)
            return out_1NH
        if self.chunk_size is None:
            return self._attend_run(q_TNH, k_TKH, v_TKH)
        return self._attend_chunks(q_TNH, k_TKH, v_TKH, self.chunk_size)

    def _attend_chunks(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, chunk_size: int
    ) -> Tensor:
        """Split at chunk borders: the rest of the current chunk, whole chunks, a last piece."""
        length = len(q_TNH)
        first = min(-self.num_tokens % chunk_size, length)
        num_whole = (length - first) // chunk_size
        last = first + num_whole * chunk_size
        pieces = []
        if first:
            pieces.append(self._attend_run(q_TNH[:first], k_TKH[:first], v_TKH[:first]))
        if num_whole:
            q, k, v = (x[first:last].unflatten(0, (-1, chunk_size)) for x in (q_TNH, k_TKH, v_TKH))
            pieces.append(attend_causally(q, k, v, []).flatten(0, 1))
            self._advance(last - first)
        if last < length:
            pieces.append(self._attend_run(q_TNH[last:], k_TKH[last:], v_TKH[last:]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _attend_run(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attend with new tokens that cross no border."""
        out_1TNH = attend_causally(q_TNH[None], k_TKH[None], v_TKH[None], self.parts())
        ends_chunk = self.chunk_size and (self.num_tokens + len(q_TNH)) % self.chunk_size == 0
        if not ends_chunk:
            self._append(k_TKH, v_TKH)
        self._advance(len(q_TNH))
        return out_1TNH[0]

    def parts(self) -> list[Part]:
        """What is kept, in order of position: none, one or two runs of keys and values."""
        parts = [] if self.prefix is None else [self.prefix]
        if self.tail is not None and self.tail_length:
            keys, values = self.tail
            parts.append((keys[:, : self.tail_length], values[:, : self.tail_length]))
        return parts

    def _append(self, k_TKH: Tensor, v_TKH: Tensor) -> None:
        end = self.tail_length + len(k_TKH)
        if self.tail is None or end > self.tail[0].shape[1]:
            self.tail = self._grown(end, k_TKH)
        for kept, new_TKH in zip(self.tail, (k_TKH, v_TKH), strict=True):
            kept[:, self.tail_length : end] = new_TKH.transpose(0, 1)
        self.tail_length = end

    def _grown(self, needed: int, like_TKH: Tensor) -> Part:
        """The tail with half as much room again, never room for the longest possible sequence."""
        capacity = max(needed + SPARE_TOKENS, needed * 3 // 2)
        if self.chunk_size is not None:
            capacity = max(needed, min(capacity, self.chunk_size))
        _, num_heads, head_dim = like_TKH.shape
        keys, values = (like_TKH.new_empty(num_heads, capacity, head_dim) for _ in range(2))
        if self.tail is not None:
            for new, kept in zip((keys, values), self.tail, strict=True):
                new[:, : self.tail_length] = kept[:, : self.tail_length]
        return keys, values

    def _advance(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        if self.chunk_size is not None and self.num_tokens % self.chunk_size == 0:
            self.prefix, self.tail_length = None, 0

    def share(self) -> LayerCache:
        """A second cache with the same past; from here on both append to tails of their own."""
        parts = self.parts()
        if len(parts) == 2:  # forked before: join once, so that no cache has more than two parts
            (keys, more_keys), (values, more_values) = zip(*parts, strict=True)
            parts = [(torch.cat([keys, more_keys], 1), torch.cat([values, more_values], 1))]
        self.prefix = parts[0] if parts else None
        self.tail, self.tail_length = None, 0
        other = LayerCache(self.chunk_size)
        other.prefix, other.num_tokens = self.prefix, self.num_tokens
        return other


class Cache:
    """One sequence: its tokens, every layer's keys and values, the logits of what comes next."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.layers = [
            LayerCache(config.attention_chunk_size if config.is_local(i) else None)
            for i in range(config.num_hidden_layers)
        ]
        self.tokens: list[int] = []
        self.logits_V: Tensor | None = None  # after the last token; fp32

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return len(self.tokens)

    @property
    def size_bytes(self) -> int:
        """Memory held by keys and values, what is shared with forks included."""
        held = {}
        for layer in self.layers:
            for tensor in (*(layer.prefix or ()), *(layer.tail or ())):
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())

    def attend(self, layer_idx: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Append k and v, then attend with q. shapes: -> out_BTNH"""
        assert len(q_BTNH) == 1, "several sequences need a `CacheBatch`"
        return self.layers[layer_idx].attend(q_BTNH[0], k_BTKH[0], v_BTKH[0])[None]

    @torch.inference_mode()
    def fork(self, num_forks: int) -> list[Cache]:
        """Caches that go on from here on their own; what was read is shared, not copied."""
        forks = []
        for _ in range(num_forks):
            fork = Cache(self.config)
            fork.layers = [layer.share() for layer in self.layers]
            fork.tokens, fork.logits_V = list(self.tokens), self.logits_V
            forks.append(fork)
        return forks

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"tokens": torch.tensor(self.tokens, dtype=torch.int64)}
        if self.logits_V is not None:
            tensors["logits"] = self.logits_V
        for i, layer in enumerate(self.layers):
            parts = layer.parts()
            if parts:
                keys, values = zip(*parts, strict=True)
                tensors[f"layers.{i}.keys"] = torch.cat(keys, 1)
                tensors[f"layers.{i}.values"] = torch.cat(values, 1)
        metadata = {"format": FORMAT, "model": _fingerprint(self.config)}
        # The process id keeps two writers apart; the rename makes the last one whole.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, config: TextConfig, device: torch.device | str = "cpu") -> Cache:
        """Read what `save` wrote for a model of this shape. raises: L4Error for anything else"""
        what = f"cannot open cache `{path}`"
        fix = "make it again with `Cache.save`"
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise L4Error(what, why=" ".join(str(error).lower().split()), fix=fix) from error
        if metadata.get("format") != FORMAT:
            raise L4Error(what, why=f"it is not marked as `{FORMAT}`", fix=fix)
        if metadata.get("model") != _fingerprint(config):
            raise L4Error(what, why="it was made by a model of another config", fix=fix)
        return cls._from_tensors(config, tensors)

    @classmethod
    def _from_tensors(cls, config: TextConfig, tensors: dict[str, Tensor]) -> Cache:
        cache = cls(config)
        cache.tokens = tensors["tokens"].tolist()
        cache.logits_V = tensors.get("logits")
        for i, layer in enumerate(cache.layers):
            layer.num_tokens = cache.num_tokens
            if f"layers.{i}.keys" in tensors:
                layer.prefix = (tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"])
        return cache


class CacheBatch:
    """Several sequences side by side, each with its own length: nothing is ever padded."""

    def __init__(self, rows: Iterable[Cache]) -> None:
        self.rows = list(rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens read so far by each sequence."""
        return [row.num_tokens for row in self.rows]

    def attend(self, layer_idx: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Append k and v to each row's cache, then attend with q. shapes: -> out_BTNH"""
        columns = zip(self.rows, q_BTNH, k_BTKH, v_BTKH, strict=True)
        return torch.stack([row.layers[layer_idx].attend(q, k, v) for row, q, k, v in columns])


def _fingerprint(config: TextConfig) -> str:
    """Tell models apart by their shape; weights of one shape cannot be told apart here."""
    layers = range(config.num_hidden_layers)
    rotated = [(config.uses_rope(i), config.is_local(i)) for i in layers]
    sizes = (config.vocab_size, config.hidden_size, config.num_key_value_heads, config.head_dim)
    shape = [rotated, config.attention_chunk_size, sizes]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()
