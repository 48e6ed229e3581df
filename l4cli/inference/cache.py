"""What the model has read: keys and values, as few as its attention can still reach.

in: q, k, v of new tokens from each layer; out: attention over everything kept
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.inference import cache_file
from l4cli.inference.attention import as_heads, as_rows, attend_rows
from l4cli.inference.kept import CacheOptions, Packed, Part, num_tokens, part_tensors
from l4cli.inference.layer_cache import LayerCache
from l4cli.inference.sparse import Recall
from l4cli.model.config import TextConfig


class TokenIds(Sequence[int]):
    """Ids at four bytes each: a list of ten million takes ninety times as long to copy."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.ids = array("I", ids)

    def append(self, token: int) -> None:
        self.ids.append(token)

    def extend(self, ids_T: Tensor) -> None:
        """Take ids in. shapes: [T] int64 on the CPU"""
        self.ids.frombytes(ids_T.to(torch.uint32).contiguous().numpy().tobytes())

    def drop(self, num_tokens: int) -> None:
        """Forget the last ids."""
        del self.ids[len(self.ids) - num_tokens :]

    def tensor(self) -> Tensor:
        """The ids as int64 [T]; a copy."""
        if not self.ids:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(self.ids, dtype=torch.uint32).to(torch.int64)

    def first(self, num_tokens: int) -> TokenIds:
        """A copy of the beginning."""
        other = TokenIds()
        other.ids = self.ids[:num_tokens]
        return other

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return self.ids[index].tolist() if isinstance(index, slice) else self.ids[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"TokenIds({self.ids[:8].tolist()}{'...' if len(self) > 8 else ''}, {len(self)})"


class Cache:
    """One sequence: its tokens, every layer's keys and values, the logits of what comes next."""

    def __init__(self, config: TextConfig, options: CacheOptions | None = None) -> None:
        self.config, self.options = config, options or CacheOptions()
        self.layers = [
            LayerCache(chunk_size_of(config, i), self.options)
            for i in range(config.num_hidden_layers)
        ]
        self.tokens = TokenIds()
        self.logits_V: Tensor | None = None  # after the last token; fp32
        self.model_id: str | None = None  # of the weights that made it, where that is known

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return len(self.tokens)

    @property
    def size_bytes(self) -> int:
        """Memory held by keys and values, what is shared with forks included."""
        held: dict[int, int] = {}
        for layer in self.layers:
            held |= layer.storages()
        return sum(held.values())

    def attend(self, layer_idx: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Append k and v, then attend with q, the newest tokens' or none. shapes: -> out as q"""
        assert len(q_BTNH) == 1, "several sequences need a `CacheBatch`"
        return self.layers[layer_idx].attend(q_BTNH[0], k_BTKH[0], v_BTKH[0])[None]

    @torch.inference_mode()
    def fork(self, num_forks: int) -> list[Cache]:
        """Caches that go on from here on their own; what was read is shared, not copied."""
        forks = []
        for _ in range(num_forks):
            fork = Cache(self.config, self.options)
            fork.layers = [layer.share() for layer in self.layers]
            fork.tokens, fork.logits_V = self.tokens.first(self.num_tokens), self.logits_V
            fork.model_id = self.model_id
            forks.append(fork)
        return forks

    @property
    def undoable(self) -> int:
        """How many more tokens can be read and then taken back, all or some; 0 at borders."""
        return min(layer.undoable for layer in self.layers)

    def take_back(self, num_tokens: int) -> None:
        """Forget the newest tokens, read since as many were `undoable`."""
        if num_tokens == 0:
            return
        for layer in self.layers:
            layer.take_back(num_tokens)
        self.tokens.drop(num_tokens)
        self.logits_V = None

    @property
    def recall(self) -> dict[int, Recall]:
        """Of layers that read some pages only: how much of exact attention those held."""
        found = {i: layer.recall for i, layer in enumerate(self.layers)}
        return {i: recall for i, recall in found.items() if recall.num_queries}

    def keep_common(self, ids: Sequence[int]) -> int:
        """Go back to where another text parts from this one; say how many tokens are left.

        All of them when the text begins with them; else chunked layers can only go back to the
        border of a chunk, where they hold nothing, and a token must be left to read.
        """
        mine, other = self.tokens.tensor(), torch.as_tensor(list(ids), dtype=torch.int64)
        shorter = min(len(mine), len(other))
        differs = (mine[:shorter] != other[:shorter]).nonzero()
        common = int(differs[0]) if len(differs) else shorter
        if common == len(mine):
            return common
        chunk = next((layer.chunk_size for layer in self.layers if layer.chunk_size), 1)
        kept = max(0, min(common, len(other) - 1)) // chunk * chunk
        for layer in self.layers:
            layer.rewind(kept)
        self.tokens, self.logits_V = self.tokens.first(kept), None
        return kept

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"tokens": self.tokens.tensor()}
        if self.logits_V is not None:
            tensors["logits"] = self.logits_V
        for i, layer in enumerate(self.layers):
            for j, part in enumerate(layer.parts()):
                named = zip(_names(part), part_tensors(part), strict=True)
                tensors |= {f"layers.{i}.{j}.{name}": tensor for name, tensor in named}
        metadata = {
            "model": _fingerprint(self.config),
            "weights": self.model_id or "",
            "kv_dtype": self.options.kv_dtype,
        }
        cache_file.write(path, tensors, metadata)

    @classmethod
    def load(
        cls,
        path: Path,
        config: TextConfig,
        device: torch.device | str = "cpu",
        *,
        model_id: str | None = None,
        sparse_topk: int = 0,
    ) -> Cache:
        """Read what `save` wrote for this model; on a CPU the file is mapped, not copied.

        raises: L4Error for another model's, a damaged one and anything else
        """
        metadata, tensors = cache_file.read(path, device)
        what, fix = f"cannot use cache `{path}`", "remove it, or name another file"
        if metadata.get("model") != _fingerprint(config):
            raise L4Error(what, why="it was made by a model of another config", fix=fix)
        weights = metadata.get("weights")
        if weights and model_id and weights != model_id:
            why = "it was made by a model of this shape with other weights"
            raise L4Error(what, why=why, fix=fix)
        try:
            cache = cls(config, CacheOptions(metadata["kv_dtype"], sparse_topk))  # type: ignore[arg-type]
            cache._take(tensors)
        except (KeyError, AssertionError, ValueError) as error:
            raise L4Error(what, why=f"it is not whole: {error}", fix=fix) from error
        cache.model_id = weights or model_id
        return cache

    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Fill an empty cache from a file's tensors."""
        self.tokens.extend(tensors["tokens"].cpu())
        self.logits_V = tensors.get("logits")
        parts: dict[int, dict[int, dict[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            if name.startswith("layers."):
                _, layer_idx, part_idx, kind = name.split(".")
                named = parts.setdefault(int(layer_idx), {}).setdefault(int(part_idx), {})
                named[kind] = tensor
        for i, layer in enumerate(self.layers):
            layer.num_tokens = self.num_tokens
            found = [_part(named) for _, named in sorted(parts.get(i, {}).items())]
            layer.sealed = tuple(found)
            held, size = sum(num_tokens(part) for part in found), layer.chunk_size
            expected = self.num_tokens if size is None else self.num_tokens % size
            if held != expected:
                raise ValueError(f"layer {i} has {held} keys for {expected} tokens")


def _names(part: Part) -> tuple[str, ...]:
    if isinstance(part, Packed):
        return tuple(f"{name}_{part.bits}" for name in Packed.NAMES)
    return ("keys", "values")


def _part(named: dict[str, Tensor]) -> Part:
    """A part from its tensors' names. raises: KeyError when one is missing"""
    if "keys" in named:
        return named["keys"], named["values"]
    bits = 8 if "keys_8" in named else 4
    tensors = tuple(named[f"{name}_{bits}"] for name in Packed.NAMES)
    return Packed(bits, tensors[0].shape[1], tensors)


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
        layers = [row.layers[layer_idx] for row in self.rows]
        outs = torch.empty_like(q_BTNH)
        for rows in _sharing(layers, q_BTNH.shape[1]):
            if len(rows) == 1:
                i = rows[0]
                outs[i] = layers[i].attend(q_BTNH[i], k_BTKH[i], v_BTKH[i])
            else:
                forks = [layers[i] for i in rows]
                outs[rows, 0] = _attend_forks(
                    forks, *(x[rows, 0] for x in (q_BTNH, k_BTKH, v_BTKH))
                )
        return outs


def _sharing(layers: list[LayerCache], length: int) -> list[list[int]]:
    """Which rows read the same sealed parts, when each asks with one token."""
    groups: dict[int, list[int]] = {}
    for i, layer in enumerate(layers):
        is_shared = layer.sealed and length == 1 and not layer.is_sparse
        groups.setdefault(id(layer.sealed) if is_shared else -1 - i, []).append(i)
    return list(groups.values())


def _attend_forks(forks: list[LayerCache], q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor) -> Tensor:
    """One new token each: what the forks share is read once for all of them. shapes: -> as q"""
    sealed = forks[0].sealed
    num_kv_heads = k_BKH.shape[1]
    shared_KRH, lse_KR = attend_rows(as_rows(q_BNH, num_kv_heads), sealed)
    group = shared_KRH.shape[1] // len(forks)
    outs = []
    for i, fork in enumerate(forks):
        rows = slice(i * group, (i + 1) * group)
        own = fork.add(k_BKH[i, None], v_BKH[i, None])
        q_KGH = as_rows(q_BNH[i, None], num_kv_heads)
        outs.append(attend_rows(q_KGH, own, (shared_KRH[:, rows], lse_KR[:, rows]))[0])
    return as_heads(torch.cat(outs, 1), q_BNH)


def chunk_size_of(config: TextConfig, layer_idx: int) -> int | None:
    """The chunk a layer's attention stays in; None where it sees everything."""
    return config.attention_chunk_size if config.is_local(layer_idx) else None


_IRRELEVANT = (
    "max_position_embeddings",
    "router_aux_loss_coef",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    # How layers differ is told one by one.
    "moe_layers",
    "interleave_moe_layer_step",
    "no_rope_layers",
    "no_rope_layer_interval",
    "layer_types",
)


def _fingerprint(config: TextConfig) -> str:
    """Tell models apart by what they compute from their weights."""
    facts = dataclasses.asdict(config)
    for name in _IRRELEVANT:
        del facts[name]
    layers = range(config.num_hidden_layers)
    kinds = [(config.uses_rope(i), config.is_local(i), config.is_moe(i)) for i in layers]
    return hashlib.sha256(json.dumps([kinds, facts], sort_keys=True).encode()).hexdigest()
