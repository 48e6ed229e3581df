"""How keys and values are kept: as computed, in another float format, or in 8 or 4 bits.

in: runs of keys and values [K, S, H]; out: parts that give them back, one part at a time
source: KIVI (arXiv 2402.02750): keys by channel, because a key's large channels are the same in
every token; values by token; the newest tokens stay as they are
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from l4cli.errors import UsageError, suggest

KvDtype = Literal["auto", "fp32", "bf16", "int8", "int4"]
KV_DTYPES: tuple[str, ...] = get_args(KvDtype)
BLOCK = 16384  # tokens of a sealed part: what is copied or unpacked at once, whatever the length
KEY_GROUP = 128  # tokens that share a channel's scale and minimum
VALUE_GROUP = 128  # channels that share a token's
NEWEST = 128  # tokens that are never quantized
SPARE_TOKENS = 64  # room beyond what a prompt needs, so that decoding does not start with a copy
_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BITS = {"int8": 8, "int4": 4}

Plain = tuple[Tensor, Tensor]  # keys_KSH, values_KSH


@dataclass(frozen=True)
class CacheOptions:
    """How layers that see everything keep what they have read; chunked layers hold little."""

    kv_dtype: KvDtype = "auto"  # as computed

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            why = "keys and values are kept as " + ", ".join(KV_DTYPES)
            fix = suggest(self.kv_dtype, KV_DTYPES)
            raise UsageError(f"unknown format `{self.kv_dtype}`", why=why, fix=fix)

    @property
    def bits(self) -> int | None:
        """Bits of a code; None: nothing is quantized."""
        return _BITS.get(self.kv_dtype)

    def float_dtype(self, computed: torch.dtype) -> torch.dtype:
        """The dtype of what is not quantized."""
        return _FLOATS.get(self.kv_dtype, computed)


class Packed:
    """Keys and values in codes of 8 or 4 bits, in whole groups of tokens; grows up to `BLOCK`.

    shapes: codes [K, S, H], of 4 bits [K, S, H / 2]; key scale and low [K, S / KEY_GROUP, H];
    value scale and low [K, S, H / VALUE_GROUP]
    """

    NAMES = ("keys", "key_scale", "key_low", "values", "value_scale", "value_low")

    def __init__(self, bits: int, num_tokens: int, tensors: tuple[Tensor, ...]) -> None:
        self.bits, self.num_tokens, self.tensors = bits, num_tokens, tensors

    @classmethod
    def of(cls, keys_KSH: Tensor, values_KSH: Tensor, bits: int) -> Packed:
        """Quantize whole groups of tokens."""
        num_heads, num_tokens, head_dim = keys_KSH.shape
        keys = _quantize(keys_KSH.unflatten(1, (-1, KEY_GROUP)), bits, 2)
        values = _quantize(values_KSH.unflatten(2, (-1, _value_group(head_dim))), bits, 3)
        tensors = []
        for codes, scale, low in (keys, values):
            codes = codes.reshape(num_heads, num_tokens, head_dim)
            tensors += [_pair(codes) if bits == 4 else codes, scale, low]
        return cls(bits, num_tokens, tuple(tensors))

    def load(self, dtype: torch.dtype) -> Plain:
        """The levels as numbers again. shapes: -> keys_KSH, values_KSH"""
        keys, key_scale, key_low, values, value_scale, value_low = self.view().tensors
        if self.bits == 4:
            keys, values = _unpair(keys), _unpair(values)
        head_dim = keys.shape[-1]
        groups = keys.unflatten(1, (-1, KEY_GROUP)).to(torch.float32)
        groups = torch.addcmul(key_low.float().unsqueeze(2), groups, key_scale.float().unsqueeze(2))
        rows = values.unflatten(2, (-1, _value_group(head_dim))).to(torch.float32)
        rows = torch.addcmul(value_low.float().unsqueeze(3), rows, value_scale.float().unsqueeze(3))
        return groups.flatten(1, 2).to(dtype), rows.flatten(2, 3).to(dtype)

    def view(self) -> Packed:
        """What is filled, sharing memory."""
        filled = tuple(
            tensor[:, : self.num_tokens // unit]
            for tensor, unit in zip(self.tensors, _units(), strict=True)
        )
        return Packed(self.bits, self.num_tokens, filled)

    def append(self, more: Packed) -> None:
        """Take more tokens in; there must be room for them in a block."""
        end = self.num_tokens + more.num_tokens
        assert end <= BLOCK
        if end > self.tensors[0].shape[1]:
            capacity = min(BLOCK, -(-end * 3 // 2 // KEY_GROUP) * KEY_GROUP)
            self.tensors = tuple(
                grown(tensor, self.num_tokens // unit, capacity // unit)
                for tensor, unit in zip(self.tensors, _units(), strict=True)
            )
        for kept, new, unit in zip(self.tensors, more.view().tensors, _units(), strict=True):
            kept[:, self.num_tokens // unit : end // unit] = new
        self.num_tokens = end


Part = Plain | Packed


def first_tokens(parts: list[Part], count: int) -> list[Part]:
    """The parts of the first tokens; a group of codes that is cut becomes plain."""
    found: list[Part] = []
    for part in parts:
        length = min(count, num_tokens(part))
        count -= length
        if isinstance(part, tuple):
            found += [(part[0][:, :length], part[1][:, :length])] if length else []
            continue
        whole = length // KEY_GROUP * KEY_GROUP
        if whole:
            found.append(Packed(part.bits, whole, part.tensors).view())
        if whole < length:
            group = slice(whole // KEY_GROUP, whole // KEY_GROUP + 1)
            tokens = slice(whole, whole + KEY_GROUP)
            units = zip(part.tensors, _units(), strict=True)
            cut = tuple(tensor[:, tokens if unit == 1 else group] for tensor, unit in units)
            keys, values = Packed(part.bits, KEY_GROUP, cut).load(torch.float32)
            rest = length - whole
            found.append((keys[:, :rest].contiguous(), values[:, :rest].contiguous()))
    return found


def grown(kept: Tensor, filled: int, capacity: int) -> Tensor:
    """A copy with more room along dimension one."""
    larger = kept.new_empty(kept.shape[0], capacity, *kept.shape[2:])
    larger[:, :filled] = kept[:, :filled]
    return larger


def load(part: Part, dtype: torch.dtype) -> Plain:
    """A part's keys and values in the dtype of the queries."""
    if isinstance(part, Packed):
        return part.load(dtype)
    keys_KSH, values_KSH = part
    return keys_KSH.to(dtype), values_KSH.to(dtype)


def num_tokens(part: Part) -> int:
    """How many keys a part has."""
    return part.num_tokens if isinstance(part, Packed) else part[0].shape[1]


def part_tensors(part: Part) -> tuple[Tensor, ...]:
    """What a part holds in memory."""
    return part.tensors if isinstance(part, Packed) else part


def _quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the nearest of 2^bits levels between the least and greatest along `dim`.

    shapes: -> codes as x, scale and low without `dim`
    """
    x = x.float()
    top = 2**bits - 1
    least, greatest = x.aminmax(dim=dim, keepdim=True)
    # What is stored decides the levels: its own rounding then costs a part of a level at most.
    low = least.half()
    scale = ((greatest - low.float()) / top).half()
    step = scale.float().clamp(min=1e-20)
    codes = ((x - low.float()) / step).round_().clamp_(0, top).to(torch.uint8)
    return codes, scale.squeeze(dim), low.squeeze(dim)


def _pair(codes_KSH: Tensor) -> Tensor:
    """Two codes a byte: channel j and channel j + H / 2."""
    first, second = codes_KSH.chunk(2, dim=-1)
    return first | second << 4


def _unpair(pairs: Tensor) -> Tensor:
    return torch.cat([pairs & 15, pairs >> 4], dim=-1)


def _value_group(head_dim: int) -> int:
    return VALUE_GROUP if head_dim % VALUE_GROUP == 0 else head_dim


def _units() -> tuple[int, ...]:
    """Tokens to a row of each tensor."""
    return (1, KEY_GROUP, KEY_GROUP, 1, 1, 1)
