"""One layer's past: sealed parts that forks share, then an own tail that grows.

in: q, k, v of new tokens; out: attention over everything kept
source: HF `chunked_overlay` (a query sees keys of its own chunk of absolute positions only)
"""

from __future__ import annotations

import torch
from torch import Tensor

from l4cli.inference.attention import (
    Summed,
    as_heads,
    as_rows,
    attend_after,
    attend_causally,
    attend_rows,
    attend_to_all,
)
from l4cli.inference.kept import (
    BLOCK,
    KEY_GROUP,
    NEWEST,
    SPARE_TOKENS,
    CacheOptions,
    Packed,
    Part,
    Plain,
    first_tokens,
    grown,
    part_tensors,
)
from l4cli.inference.sparse import Pages, Recall, attend_pages

_WAITING = 2048  # tokens that gather before they are quantized together


class LayerCache:
    """With a chunk size it holds the current chunk only: at a border it is emptied."""

    def __init__(self, chunk_size: int | None, options: CacheOptions | None = None) -> None:
        self.chunk_size = chunk_size
        self.options = options or CacheOptions()
        self.num_tokens = 0  # read so far, kept or not
        self.sealed: tuple[Part, ...] = ()  # never written to
        self.packed: Packed | None = None  # quantized tokens before the tail; grows
        self.tail: Plain | None = None  # [K, capacity, H] twice; only this cache writes to it
        self.tail_length = 0
        self.pages, self.recall = Pages(), Recall()  # used where `sparse_topk` is

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Append k and v, then attend with q, the queries of the newest tokens or of none.

        shapes: -> out as q
        """
        # As they are kept from the start: what a token sees must not depend on who it came with.
        kept = self.options.float_dtype(k_TKH.dtype)
        if kept != k_TKH.dtype:
            k_TKH, v_TKH = (x.to(kept).to(x.dtype) for x in (k_TKH, v_TKH))
        first = len(k_TKH) - len(q_TNH)
        if first:
            self.store(k_TKH[:first], v_TKH[:first])
            k_TKH, v_TKH = k_TKH[first:], v_TKH[first:]
        if len(q_TNH) == 0:
            return q_TNH
        if len(q_TNH) == 1:
            self._append(k_TKH, v_TKH)
            if self.is_sparse:
                out_KRH, _ = self.see(as_rows(q_TNH, k_TKH.shape[1]), 1)
                out_1NH = as_heads(out_KRH, q_TNH)
            else:
                out_1NH = attend_to_all(q_TNH, self.parts())
            self._advance(1)
            return out_1NH
        if self.chunk_size is None:
            return self._attend_run(q_TNH, k_TKH, v_TKH)
        return self._attend_chunks(q_TNH, k_TKH, v_TKH, self.chunk_size)

    def add(self, k_1KH: Tensor, v_1KH: Tensor) -> list[Part]:
        """Append one token and hand out what lies beyond the sealed parts it can see."""
        before = len(self.sealed)
        self._append(k_1KH, v_1KH)
        own = self.parts()[before:]
        self._advance(1)
        return own

    def store(self, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Append k and v of tokens that ask nothing."""
        length = len(k_TKH)
        if self.chunk_size is not None:
            reach = (self.num_tokens + length) % self.chunk_size
            if reach < length:  # a border is crossed, or met
                self._forget()
                k_TKH, v_TKH = k_TKH[length - reach :], v_TKH[length - reach :]
        if len(k_TKH):
            self._append(k_TKH, v_TKH)
        self._advance(length)

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
        new = (q_TNH[None], k_TKH[None], v_TKH[None])
        if self.is_sparse:
            out_1TNH = attend_after(*new, lambda q, own: self.see(q, len(q_TNH), own))
        else:
            out_1TNH = attend_causally(*new, self.parts())
        ends_chunk = self.chunk_size and (self.num_tokens + len(q_TNH)) % self.chunk_size == 0
        if not ends_chunk:
            self._append(k_TKH, v_TKH)
        self._advance(len(q_TNH))
        return out_1TNH[0]

    @property
    def is_sparse(self) -> bool:
        """Whether there is a long past of which only some pages are to be read."""
        return bool(self.options.sparse_topk and self.chunk_size is None and self.sealed)

    def see(self, q_KRH: Tensor, num_positions: int, before: Summed | None = None) -> Summed:
        """Attend with rows that see all that is kept, joined with what they saw `before`."""
        if not self.is_sparse:
            return attend_rows(q_KRH, self.parts(), before)
        newest, topk = self._own_parts(), self.options.sparse_topk
        found = (self.sealed, newest, num_positions, topk, self.pages, self.recall)
        return attend_pages(q_KRH, *found, before)

    def parts(self) -> list[Part]:
        """What is kept, in order of position."""
        return [*self.sealed, *self._own_parts()]

    def _own_parts(self) -> list[Part]:
        parts: list[Part] = []
        if self.packed is not None:
            parts.append(self.packed.view())
        if self.tail is not None and self.tail_length:
            keys, values = self.tail
            parts.append((keys[:, : self.tail_length], values[:, : self.tail_length]))
        return parts

    def storages(self) -> dict[int, int]:
        """Bytes of each piece of memory held, what is shared with forks included."""
        tensors = [tensor for part in self.sealed for tensor in part_tensors(part)]
        tensors += [] if self.packed is None else self.packed.tensors
        tensors += self.tail or ()
        found = (tensor.untyped_storage() for tensor in tensors)
        return {storage.data_ptr(): storage.nbytes() for storage in found}

    def _append(self, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Fill the tail; when it is full it is sealed as it is, or quantized."""
        while len(k_TKH):
            num_new = min(len(k_TKH), self._longest_tail() - self.tail_length)
            self._fill(k_TKH[:num_new], v_TKH[:num_new])
            self._settle()
            k_TKH, v_TKH = k_TKH[num_new:], v_TKH[num_new:]

    def _longest_tail(self) -> int:
        if self.chunk_size is not None:
            return self.chunk_size
        return BLOCK if self.options.bits is None else NEWEST + _WAITING

    def _fill(self, k_TKH: Tensor, v_TKH: Tensor) -> None:
        end = self.tail_length + len(k_TKH)
        for kept, new_TKH in zip(self.grow_tail(end, k_TKH), (k_TKH, v_TKH), strict=True):
            kept[:, self.tail_length : end] = new_TKH.transpose(0, 1)
        self.tail_length = end

    def grow_tail(self, end: int, like_TKH: Tensor) -> Plain:
        """The tail, made or grown to hold `end` tokens of this shape and dtype."""
        if self.tail is None:
            _, num_heads, head_dim = like_TKH.shape
            dtype = self.options.float_dtype(like_TKH.dtype)
            shape = (num_heads, self._capacity(end), head_dim)
            keys, values = (like_TKH.new_empty(shape, dtype=dtype) for _ in range(2))
            self.tail = (keys, values)
        elif end > self.tail[0].shape[1]:
            capacity = self._capacity(end)
            keys, values = (grown(kept, self.tail_length, capacity) for kept in self.tail)
            self.tail = (keys, values)
        return self.tail

    def take_one(self) -> None:
        """Count a token that was written behind the tail from outside; `grow_tail` made place."""
        self.tail_length += 1
        if self.chunk_size is not None:
            self._advance(1)
            return
        self.num_tokens += 1
        if self.tail_length == BLOCK or self.options.bits is not None:
            self._settle()

    def _capacity(self, needed: int) -> int:
        """Half as much room again, up to a block: never room for the longest possible context."""
        wanted = max(needed + SPARE_TOKENS, needed * 3 // 2)
        return max(needed, min(wanted, self._longest_tail()))

    def _settle(self) -> None:
        """Seal a full tail, or quantize all of it but the newest tokens."""
        if self.chunk_size is not None or self.tail is None:
            return
        bits = self.options.bits
        if bits is None:
            if self.tail_length == BLOCK:
                self.sealed = (*self.sealed, self.tail)
                self.tail, self.tail_length = None, 0
            return
        num_old = (self.tail_length - NEWEST) // KEY_GROUP * KEY_GROUP
        if num_old <= 0:
            return
        keys, values = self.tail
        self._pack(keys[:, :num_old], values[:, :num_old], bits)
        for kept in self.tail:
            rest = kept[:, num_old : self.tail_length].clone()
            kept[:, : rest.shape[1]] = rest
        self.tail_length -= num_old

    def _pack(self, keys_KSH: Tensor, values_KSH: Tensor, bits: int) -> None:
        """Quantize whole groups; a full block is sealed."""
        while keys_KSH.shape[1]:
            num_new = BLOCK - (0 if self.packed is None else self.packed.num_tokens)
            more = Packed.of(keys_KSH[:, :num_new], values_KSH[:, :num_new], bits)
            if self.packed is None:
                self.packed = more
            else:
                self.packed.append(more)
            if self.packed.num_tokens == BLOCK:
                self.sealed, self.packed = (*self.sealed, self.packed), None
            keys_KSH, values_KSH = keys_KSH[:, num_new:], values_KSH[:, num_new:]

    def _advance(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        if self.chunk_size is not None and self.num_tokens % self.chunk_size == 0:
            self._forget()

    def _forget(self) -> None:
        self.sealed, self.tail_length = (), 0

    def rewind(self, num_tokens: int) -> None:
        """Go back to when so many tokens were read; a chunked layer to the border of a chunk."""
        assert num_tokens <= self.num_tokens
        if self.chunk_size is not None:
            assert num_tokens % self.chunk_size == 0
            self._forget()
        else:
            self.sealed = tuple(first_tokens(self.parts(), num_tokens))
            self.packed, self.tail, self.tail_length = None, None, 0
        self.num_tokens = num_tokens

    @property
    def undoable(self) -> int:
        """How many more tokens can be taken back again, whatever their number.

        Beyond them something is emptied, sealed or quantized, and that is not undone.
        """
        if self.chunk_size is not None:
            return self.chunk_size - self.num_tokens % self.chunk_size - 1
        full = BLOCK if self.options.bits is None else NEWEST + KEY_GROUP
        return max(0, full - self.tail_length - 1)

    def take_back(self, num_tokens: int) -> None:
        """Forget the newest tokens, read since as many were `undoable`."""
        assert 0 <= num_tokens <= self.tail_length
        self.tail_length -= num_tokens
        self.num_tokens -= num_tokens

    def share(self) -> LayerCache:
        """A second cache with the same past; from here on both append to tails of their own."""
        if self.packed is not None or self.tail_length:
            self.sealed = _joined(self.parts())
        self.packed, self.tail, self.tail_length = None, None, 0
        other = LayerCache(self.chunk_size, self.options)
        other.sealed, other.num_tokens = self.sealed, self.num_tokens
        other.pages, other.recall = self.pages, self.recall
        return other


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Two short plain parts at the end become one: forks of forks do not pile up parts."""
    if len(parts) >= 2:
        before, last = parts[-2:]
        if isinstance(before, tuple) and isinstance(last, tuple):
            (keys, values), (more_keys, more_values) = before, last
            if keys.shape[1] + more_keys.shape[1] <= BLOCK:
                joined = (torch.cat([keys, more_keys], 1), torch.cat([values, more_values], 1))
                return (*parts[:-2], joined)
    return tuple(parts)
