"""What caches hold, as the C++ decoder reads it: addresses, kept until a cache changes.

in: `Cache`s; out: arrays of `Past` that point into their tensors, with room for one more token
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from l4cli.inference.cache import Cache
from l4cli.inference.kept import Packed, Part, Plain
from l4cli.inference.layer_cache import LayerCache
from src_kernels.cpu import engine as native

_KINDS = {torch.float32: native.KEPT_FP32, torch.bfloat16: native.KEPT_BF16}
_PACKED_KINDS = {8: native.KEPT_INT8, 4: native.KEPT_INT4}


@dataclass
class _Seen:
    """One layer when it was last looked at; the tail's length is counted on."""

    sealed: tuple[Part, ...]
    num_packed: int  # packing may leave the tail as long as it was
    tail: Plain | None
    tail_length: int
    capacity: int
    parts: ctypes.Array[native.Part]


class Pasts:
    """Of each cache an array with a `Past` a layer."""

    def __init__(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.like_1KH = torch.empty(1, num_kv_heads, head_dim, dtype=dtype)
        self.known: WeakKeyDictionary[Cache, tuple[ctypes.Array[native.Past], list[_Seen]]] = (
            WeakKeyDictionary()
        )

    def of(self, cache: Cache) -> ctypes.Array[native.Past]:
        """A cache's layers, each with room for one token."""
        found = self.known.get(cache)
        if found is None:
            array = (native.Past * len(cache.layers))()
            found = (array, [self._look(layer, array[i]) for i, layer in enumerate(cache.layers)])
            self.known[cache] = found
            return array
        array, all_seen = found
        for i, layer in enumerate(cache.layers):
            seen = all_seen[i]
            if (
                layer.tail is not seen.tail
                or layer.tail_length != seen.tail_length
                or layer.sealed is not seen.sealed
                or _num_packed(layer) != seen.num_packed
                or seen.tail_length == seen.capacity
            ):
                all_seen[i] = self._look(layer, array[i])
        return array

    def taken(self, cache: Cache) -> None:
        """Each layer has got its token."""
        _, all_seen = self.known[cache]
        for layer, seen in zip(cache.layers, all_seen, strict=True):
            layer.take_one()
            seen.tail_length += 1

    def _look(self, layer: LayerCache, past: native.Past) -> _Seen:
        tail = layer.grow_tail(layer.tail_length + 1, self.like_1KH)
        parts = [*layer.sealed]
        if layer.packed is not None:
            parts.append(layer.packed)
        array = described([*parts, tail])
        array[len(parts)].length = layer.tail_length
        past.parts = array
        past.num_parts, past.num_sealed = len(array), len(layer.sealed)
        past.sealed_id = id(layer.sealed) if layer.sealed else 0
        num_packed = _num_packed(layer)
        return _Seen(layer.sealed, num_packed, tail, layer.tail_length, tail[0].shape[1], array)


def _num_packed(layer: LayerCache) -> int:
    return 0 if layer.packed is None else layer.packed.num_tokens


def described(parts: list[Part]) -> ctypes.Array[native.Part]:
    """Parts as C reads them; they must be kept alive."""
    array = (native.Part * len(parts))()
    for part, out in zip(parts, array, strict=True):
        _describe(part, out)
    return array


def runs_in_chunks(num_read: int, length: int, chunk_size: int | None) -> list[slice]:
    """New tokens cut at the borders of chunks: inside a run all see each other, causally."""
    if chunk_size is None:
        return [slice(0, length)]
    borders = [0, *range(chunk_size - num_read % chunk_size, length, chunk_size), length]
    return [slice(a, b) for a, b in pairwise(borders)]


def _describe(part: Part, out: native.Part) -> None:
    if isinstance(part, Packed):
        keys, key_scale, key_low, values, value_scale, value_low = part.tensors
        out.kind, out.length = _PACKED_KINDS[part.bits], part.num_tokens
        out.value_groups = value_scale.shape[2]
        out.key_scale, out.key_low = key_scale.data_ptr(), key_low.data_ptr()
        out.value_scale, out.value_low = value_scale.data_ptr(), value_low.data_ptr()
        out.key_scale_stride, out.value_scale_stride = key_scale.stride(0), value_scale.stride(0)
        assert key_low.stride() == key_scale.stride()
        assert value_low.stride() == value_scale.stride()
    else:
        keys, values = part
        out.kind, out.length = _KINDS[keys.dtype], keys.shape[1]
    for tensor in (keys, values):
        assert tensor.stride()[1:] == (tensor.shape[2], 1)
    assert keys.stride(0) == values.stride(0)
    out.head_stride = keys.stride(0)
    out.keys, out.values = keys.data_ptr(), values.data_ptr()


def is_readable(cache: Cache) -> bool:
    """Whether the decoder can attend to everything a cache holds, exactly as asked."""
    return not cache.options.sparse_topk


def pointers(arrays: list[ctypes.Array[native.Past]]) -> Tensor:
    """Addresses of arrays, as C wants them."""
    return torch.tensor([ctypes.addressof(array) for array in arrays], dtype=torch.int64)
