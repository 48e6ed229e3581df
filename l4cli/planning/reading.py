"""What reading a long text takes: bytes and seconds, the ordinary way and layer by layer.

in: a config, a number of tokens, how keys are kept, the machine; out: `ReadingPlan`
source: two operations a weight and token; scores and values of what a causal query sees; rates of
an H100 as reached by public kernels (about 600 TFLOP/s in attention, 420 in products of experts)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from l4cli.errors import UsageError, suggest
from l4cli.model import Llama4Config, TextConfig, count_parameters
from l4cli.planning.flops import active_matmul_parameters, mean_attended
from l4cli.planning.gpus import GPUS
from l4cli.planning.machine import available_memory, gemm_rate
from l4cli.planning.memory import ITEM_BYTES

_GROUP = 128  # tokens, and channels at most, that share the two fp16 numbers of a code
_ACTIVATIONS = 12  # a piece's states in flight, in units of its hidden states and feed-forward
_PIECE = 2048  # tokens read at once
_PARALLEL = 0.92  # of several devices' rates, when they share one text
_BANDWIDTH_SHARE = 0.8  # of a memory's bandwidth that decoding reaches
_HOST_BYTES_PER_S = 25e9  # between host memory and a device
_CPU_SHARE = 0.4  # of a CPU's product rate that reading reaches (measured on small models)


@dataclass(frozen=True)
class Machine:
    """Devices that read one text together."""

    name: str
    num_devices: int
    memory_bytes: float  # of each
    attention_rate: float  # operations per second of each
    linear_rate: float
    bandwidth: float  # bytes per second of each

    @property
    def total_memory_bytes(self) -> float:
        return self.num_devices * self.memory_bytes

    @property
    def efficiency(self) -> float:
        """What sharing leaves of the rates."""
        return 1.0 if self.num_devices == 1 else _PARALLEL


_DEVICES = {
    name: (GPUS[name].memory_bytes, 600e12, 420e12, GPUS[name].bandwidth)
    for name in ("h100", "h200")
}


def parse_gpus(text: str) -> Machine:
    """`h100`, `8xh200`: so many of them. raises: UsageError for anything else"""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)", text.lower())
    name = match.group(2) if match else text
    if match is None or name not in _DEVICES or match.group(1) == "0":
        why = "known are " + ", ".join(f"`{n}` or `8x{n}`" for n in _DEVICES)
        raise UsageError(f"unknown `--gpus {text}`", why=why, fix=suggest(name, _DEVICES))
    return Machine(text.lower(), int(match.group(1) or 1), *_DEVICES[name])


def this_machine(dtype: str, device: str = "cpu") -> Machine:
    """What is here: memory that is free, and a share of the product rate (takes 0.3 s)."""
    rate = gemm_rate(dtype, device) * _CPU_SHARE
    return Machine(device, 1, available_memory(device), rate, rate, 10e9)


@dataclass(frozen=True)
class ReadingPlan:
    """Figures of one reading; sums are properties."""

    num_tokens: int
    is_layer_major: bool
    machine: Machine
    weights_bytes: float  # on the devices at once
    full_cache_bytes: float  # keys and values of layers that see everything, at once
    local_cache_bytes: float  # of chunked layers
    activation_bytes: float
    host_bytes: float  # hidden states outside the devices; 0 the ordinary way
    linear_flops: float
    full_attention_flops: float
    local_attention_flops: float
    host_traffic_bytes: float
    decode_bytes: float  # what one more token reads

    @property
    def total_bytes(self) -> float:
        """On the devices."""
        caches = self.full_cache_bytes + self.local_cache_bytes
        return self.weights_bytes + caches + self.activation_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.machine.total_memory_bytes

    @property
    def attention_s(self) -> float:
        """Of layers that see everything: the part that grows with the square of the length."""
        m = self.machine
        return self.full_attention_flops / (m.attention_rate * m.num_devices * m.efficiency)

    @property
    def linear_s(self) -> float:
        """All that grows with the length."""
        m = self.machine
        flops = self.linear_flops + self.local_attention_flops
        return flops / (m.linear_rate * m.num_devices * m.efficiency)

    @property
    def time_s(self) -> float:
        """Arithmetic, or moving states between host and device where that takes longer."""
        return max(self.attention_s + self.linear_s, self.host_traffic_bytes / _HOST_BYTES_PER_S)

    @property
    def decode_s(self) -> float:
        """One more token after the text; nothing can follow a reading layer by layer."""
        m = self.machine
        return self.decode_bytes / (m.bandwidth * _BANDWIDTH_SHARE * m.num_devices)


def plan_reading(
    config: Llama4Config,
    num_tokens: int,
    machine: Machine,
    *,
    dtype: str = "bf16",
    kv_dtype: str = "auto",
    is_layer_major: bool = False,
    spares_last_layer: bool = True,
) -> ReadingPlan:
    """Work out one reading; milliseconds, nothing is allocated.

    `dtype`: of the weights; `kv_dtype`: auto, fp32, bf16, fp8, int8 or int4.
    `spares_last_layer`: its queries and feed-forward run for the question only, as ours do.
    """
    text = config.text
    layers = range(text.num_hidden_layers)
    full = [i for i in layers if not text.is_local(i)]
    per_layer = cache_bytes_per_token(text, kv_dtype, dtype)
    local_item = cache_bytes_per_token(text, "auto", dtype)
    local_tokens = min(num_tokens, text.attention_chunk_size or num_tokens)
    num_local = len(layers) - len(full)
    weights, decode_bytes = _weights(config, dtype, is_layer_major)
    asked_full = [i for i in full if not (spares_last_layer and i == layers[-1])]
    asked_local = [
        i for i in layers if i not in full and not (spares_last_layer and i == layers[-1])
    ]
    width = 4 * text.num_attention_heads * text.head_dim * num_tokens
    full_flops = sum(width * mean_attended(text, i, num_tokens) for i in asked_full)
    local_flops = sum(width * mean_attended(text, i, num_tokens) for i in asked_local)
    hidden = num_tokens * text.hidden_size * max(2.0, ITEM_BYTES[dtype])
    kept_full = min(1, len(full)) if is_layer_major else len(full)
    kept_local = min(1, num_local) if is_layer_major else num_local
    full_cache = kept_full * num_tokens * per_layer
    return ReadingPlan(
        num_tokens=num_tokens,
        is_layer_major=is_layer_major,
        machine=machine,
        weights_bytes=weights,
        full_cache_bytes=full_cache,
        local_cache_bytes=kept_local * local_tokens * local_item,
        activation_bytes=_activation_bytes(text, dtype, num_tokens),
        host_bytes=hidden if is_layer_major else 0.0,
        linear_flops=2.0 * num_tokens * _weights_met(text, spares_last_layer),
        full_attention_flops=full_flops,
        local_attention_flops=local_flops,
        # Each layer reads and writes all states once; weights come in once.
        host_traffic_bytes=(
            2 * len(layers) * hidden + count_parameters(config).total * ITEM_BYTES[dtype]
            if is_layer_major
            else 0.0
        ),
        decode_bytes=0.0 if is_layer_major else full_cache + decode_bytes,
    )


def cache_bytes_per_token(text: TextConfig, kv_dtype: str, dtype: str = "bf16") -> float:
    """Keys and values of one token in one layer; codes with their share of scale and minimum."""
    values = text.num_key_value_heads * text.head_dim
    if kv_dtype == "auto":
        return 2 * values * max(2.0, ITEM_BYTES[dtype])
    item = ITEM_BYTES[kv_dtype]
    if kv_dtype not in ("int8", "int4"):
        return 2 * values * item
    group = _GROUP if text.head_dim % _GROUP == 0 else text.head_dim
    return values * (2 * item + 4 / _GROUP + 4 / group)


def _weights(config: Llama4Config, dtype: str, is_layer_major: bool) -> tuple[float, float]:
    """Bytes of weights held at once, and of those that one more token reads."""
    counts, item = count_parameters(config), ITEM_BYTES[dtype]
    if not is_layer_major:
        return counts.total * item, active_matmul_parameters(config.text) * item
    text = config.text
    head = text.vocab_size * text.hidden_size
    layers = [_layer_weights(text, i) for i in range(text.num_hidden_layers)]
    return max(head, *layers) * item, 0.0


def _layer_weights(text: TextConfig, layer_idx: int) -> int:
    """All weights of one layer, every expert included."""
    hidden, heads = text.hidden_size, text.num_attention_heads + text.num_key_value_heads
    total = 2 * hidden * heads * text.head_dim + 2 * hidden
    if not text.is_moe(layer_idx):
        return total + 3 * hidden * text.intermediate_size_mlp
    experts = 3 * hidden * text.intermediate_size * (1 + text.num_local_experts)
    return total + experts + hidden * text.num_local_experts


def _weights_met(text: TextConfig, spares_last_layer: bool) -> float:
    """Weights a token of the text is multiplied with: no head, and little of the last layer."""
    met = active_matmul_parameters(text) - text.vocab_size * text.hidden_size
    if not spares_last_layer:
        return met
    hidden = text.hidden_size
    met -= 2 * hidden * text.num_attention_heads * text.head_dim
    if text.is_moe(text.num_hidden_layers - 1):
        expert = 3 * hidden * text.intermediate_size
        return met - (1 + text.num_experts_per_tok) * expert - hidden * text.num_local_experts
    return met - 3 * hidden * text.intermediate_size_mlp


def _activation_bytes(text: TextConfig, dtype: str, num_tokens: int) -> float:
    """A piece on its way through a layer."""
    widest = max(text.intermediate_size, text.intermediate_size_mlp)
    item = max(2.0, ITEM_BYTES[dtype])
    return min(_PIECE, num_tokens) * item * (_ACTIVATIONS * text.hidden_size + 3 * widest)
