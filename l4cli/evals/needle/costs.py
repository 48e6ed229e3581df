"""What reading long texts takes: operations, bytes and seconds, by length, before it starts.

in: a config, a length, how keys and values are kept; out: figures, or a refusal
source: two operations a weight and token; attention counted causal, chunked layers by chunk. GPU
rates are planning numbers (bf16: attention 600, products 420 TFLOP/s an H100), no measurements
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from l4cli.errors import L4Error, UsageError, suggest
from l4cli.inference import PREFILL_CHUNK
from l4cli.model import Llama4Config
from l4cli.planning import active_matmul_parameters, inference_bytes, mean_attended
from l4cli.planning.memory import ITEM_BYTES
from l4cli.terminal import bytes_text

# Share of the product rate that reading reaches on a CPU: an estimate, shown as one.
CPU_SHARE = 0.4


@dataclass(frozen=True)
class Rates:
    """How fast and how large a machine is."""

    name: str
    linear: float  # operations per second, matrix products
    attention: float
    memory_bytes: int


_GPUS = {"h100": (420e12, 600e12, 80 * 10**9), "h200": (420e12, 600e12, 141 * 10**9)}


def gpu_rates(text: str) -> Rates:
    """Read `8xh100`. raises: UsageError"""
    match = re.fullmatch(r"(?:(\d{1,6})x)?([a-z]+\d+)", text.lower())
    if match is None or int(match[1] or 1) < 1:
        why = "it is not a count and a GPU"
        raise UsageError(f"cannot use `--gpus {text}`", why=why, fix="write `--gpus 8xh100`")
    if match[2] not in _GPUS:
        why = "its rates are not known"
        raise UsageError(f"unknown GPU `{match[2]}`", why=why, fix=suggest(match[2], _GPUS))
    count, (linear, attention, memory) = int(match[1] or 1), _GPUS[match[2]]
    return Rates(text.lower(), count * linear, count * attention, count * memory)


@dataclass(frozen=True)
class ReadingCost:
    """Reading one text."""

    num_tokens: int
    kv_bytes: int
    activation_bytes: int
    linear_flops: float
    attention_flops: float

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops

    def time_s(self, rates: Rates) -> float:
        """Seconds of arithmetic."""
        return self.linear_flops / rates.linear + self.attention_flops / rates.attention


def reading_cost(config: Llama4Config, length: int, dtype: str, kv_dtype: str) -> ReadingCost:
    """What one reading of so many tokens takes; the head is needed for the answers only."""
    text = config.text
    products = active_matmul_parameters(text) - text.vocab_size * text.hidden_size
    attended = sum(mean_attended(text, i, length) for i in range(text.num_hidden_layers))
    return ReadingCost(
        num_tokens=length,
        kv_bytes=kv_bytes(config, length, dtype, kv_dtype),
        activation_bytes=_activation_bytes(config, min(length, PREFILL_CHUNK), dtype),
        linear_flops=2.0 * products * length,
        attention_flops=4.0 * text.num_attention_heads * text.head_dim * attended * length,
    )


def kv_bytes(config: Llama4Config, length: int, dtype: str, kv_dtype: str) -> int:
    """Keys and values: a chunk in chunked layers as computed, everything in the others as kept."""
    as_computed = inference_bytes(config, dtype, length)["cache"]
    if kv_dtype == "auto":
        return as_computed
    text = config.text
    num_global = sum(not text.uses_rope(i) for i in range(text.num_hidden_layers))
    values = 2 * num_global * length * text.num_key_value_heads * text.head_dim
    kept = ITEM_BYTES[kv_dtype] if kv_dtype in ("fp32", "bf16") else _coded_bytes(kv_dtype)
    return int(as_computed - values * max(ITEM_BYTES[dtype], 2) + values * kept)


def _coded_bytes(kv_dtype: str) -> float:
    """Bytes of a quantized value with its share of a group's scale and minimum."""
    return ITEM_BYTES[kv_dtype] + 4 / 128


def _activation_bytes(config: Llama4Config, num_tokens: int, dtype: str) -> int:
    """What one layer holds while it reads a piece: inputs, q, k, v, the widest feed-forward."""
    text, item = config.text, max(int(ITEM_BYTES[dtype]), 2)
    width = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    expert = (1 + text.num_experts_per_tok) * text.intermediate_size
    dense = text.intermediate_size_mlp if not text.is_moe(0) else 0
    return num_tokens * item * (4 * text.hidden_size + 2 * width + 3 * max(expert, dense))


def require_room(
    cost: ReadingCost, weights_bytes: int, available_bytes: int, length_name: str
) -> None:
    """Refuse a length that memory cannot hold. raises: L4Error with what takes how much"""
    needed = weights_bytes + cost.kv_bytes + cost.activation_bytes
    if needed <= available_bytes:
        return
    parts = {"weights": weights_bytes, "keys and values": cost.kv_bytes}
    parts["activations"] = cost.activation_bytes
    listed = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
    raise L4Error(
        f"a text of {length_name} tokens does not fit this machine",
        why=f"it needs {bytes_text(needed)} ({listed}), and {bytes_text(available_bytes)} is free",
        fix="ask for shorter `--lengths`",
    )


def weights_bytes(config: Llama4Config, dtype: str) -> int:
    """The weights in a precision."""
    return inference_bytes(config, dtype, 1)["weights"]
