"""How fast answers can come at best: what one step must read, over how fast it is read.

in: a config, how weights are stored, sequences side by side and how much they have read
out: bytes and operations of a step, the devices that hold the model, a ceiling in tokens a second
source: each weight a step meets is read once; keys and values of all that is attended to, too
"""

from __future__ import annotations

from dataclasses import dataclass

from l4cli.model import Llama4Config, TextConfig, count_parameters
from l4cli.planning.flops import active_matmul_parameters, mean_attended
from l4cli.planning.gpus import GPUS, Gpu
from l4cli.quantization import WeightFormat

NUM_GPUS = (1, 2, 4, 8, 16)  # what one model is spread over


@dataclass(frozen=True)
class Storage:
    """Bits of a weight by what it is; routers and norms are always 16, and hardly count."""

    name: str
    linear_bits: float  # attention, experts, MLPs
    head_bits: float = 16.0
    embedding_bits: float = 16.0


_INT4 = WeightFormat("int4", group_size=32)
STORAGES = {
    "fp32": Storage("fp32", 32, 32, 32),
    "bf16": Storage("bf16", 16),
    "fp8": Storage("fp8", 8),  # a scale an output, which hardly counts
    "int8": Storage("int8", 8),
    "int4": Storage("int4", _INT4.bits_per_weight(_INT4.group_size or 1)),
    # llama.cpp's files: blocks of 32 with an fp16 scale, the head in 8 bits at least.
    "q8_0": Storage("q8_0", 8.5, 8.5, 8.5),
    "q4_0": Storage("q4_0", 4.5, 8.5, 4.5),
}


@dataclass(frozen=True)
class StepCost:
    """One decoding step: a token more for each sequence."""

    num_sequences: int
    weight_bytes: float
    cache_bytes: float
    flops: float

    @property
    def read_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def tok_per_sec(self, bandwidth: float) -> float:
        """The ceiling that reading sets."""
        return self.num_sequences * bandwidth / self.read_bytes


def step_cost(
    config: Llama4Config,
    storage: Storage,
    depth: int = 0,
    num_sequences: int = 1,
    kv_bytes: float = 2.0,
) -> StepCost:
    """What one step reads and computes after `depth` tokens of each sequence."""
    text = config.text
    cache = sum(_attended(text, i, depth) for i in range(text.num_hidden_layers))
    per_key = 2 * text.num_key_value_heads * text.head_dim
    scores = 4 * text.num_attention_heads * text.head_dim * cache
    return StepCost(
        num_sequences=num_sequences,
        weight_bytes=_weights_read(text, storage, num_sequences),
        cache_bytes=num_sequences * cache * per_key * kv_bytes,
        flops=num_sequences * (2.0 * active_matmul_parameters(text) + scores),
    )


def held_bytes(
    config: Llama4Config,
    storage: Storage,
    depth: int = 0,
    num_sequences: int = 1,
    kv_bytes: float = 2.0,
) -> float:
    """Weights, all experts and the picture encoder included, and the sequences' caches."""
    groups = count_parameters(config).by_group
    head, embedding = groups["lm_head"], groups["embed_tokens"]
    rounded = sum(size for name, size in groups.items() if name in _LINEAR)
    plain = sum(groups.values()) - head - embedding - rounded
    bits = rounded * storage.linear_bits + head * storage.head_bits
    bits += embedding * storage.embedding_bits + plain * max(16.0, storage.linear_bits)
    cost = step_cost(config, storage, depth, num_sequences, kv_bytes)
    return bits / 8 + cost.cache_bytes


_LINEAR = ("attention", "routed experts", "shared experts", "dense MLPs")


def _weights_read(text: TextConfig, storage: Storage, num_sequences: int) -> float:
    """Bytes of the weights that a step meets; an embedding is a row a token and hardly counts."""
    hidden = text.hidden_size
    heads = text.num_attention_heads + text.num_key_value_heads
    expert = 3 * hidden * text.intermediate_size
    rounded = routers = 0.0
    for i in range(text.num_hidden_layers):
        rounded += 2 * hidden * heads * text.head_dim
        if text.is_moe(i):
            rounded += expert * (1 + experts_met(text, num_sequences))
            routers += text.num_local_experts * hidden
        else:
            rounded += 3 * hidden * text.intermediate_size_mlp
    head = text.vocab_size * hidden * storage.head_bits
    bits = rounded * storage.linear_bits + routers * max(16.0, storage.linear_bits) + head
    return bits / 8


def experts_met(text: TextConfig, num_sequences: int) -> float:
    """Different experts that so many tokens choose on average, when they choose evenly."""
    missed = 1 - text.num_experts_per_tok / text.num_local_experts
    return text.num_local_experts * (1 - missed**num_sequences)


def _attended(text: TextConfig, layer_idx: int, depth: int) -> int:
    """Keys read: all before, or of a chunked layer a whole chunk at most."""
    chunk = text.attention_chunk_size
    if chunk is None or not text.is_local(layer_idx):
        return depth
    return min(depth, chunk)


@dataclass(frozen=True)
class Ceiling:
    """A model on devices of one kind: as few as hold it."""

    storage: Storage
    gpu: str
    num_gpus: int
    held_bytes: float
    cost: StepCost

    @property
    def tok_per_sec(self) -> float:
        """Of all sequences together; what devices say to each other is not counted."""
        return self.cost.tok_per_sec(self.num_gpus * GPUS[self.gpu].bandwidth)


def ceiling(
    config: Llama4Config,
    storage: Storage,
    gpu: str,
    depth: int = 0,
    num_sequences: int = 1,
    *,
    num_gpus: int | None = None,
) -> Ceiling | None:
    """The fastest decoding on as few devices as hold it, or on so many; None if none do."""
    held = held_bytes(config, storage, depth, num_sequences)
    counts = NUM_GPUS if num_gpus is None else (num_gpus,)
    fitting = [n for n in counts if held <= n * GPUS[gpu].memory_bytes]
    if not fitting or not can_compute(storage, GPUS[gpu]):
        return None
    cost = step_cost(config, storage, depth, num_sequences)
    return Ceiling(storage, gpu, fitting[0], held, cost)


def can_compute(storage: Storage, gpu: Gpu) -> bool:
    """Whether the device has products in this format (weight-only formats work on all)."""
    return storage.name != "fp8" or gpu.fp8_rate is not None


def prefill_flops(text: TextConfig, num_tokens: int, depth: int = 0) -> float:
    """Operations of reading so many tokens after `depth` others; the head is for the last only."""
    head = text.vocab_size * text.hidden_size
    products = 2.0 * num_tokens * (active_matmul_parameters(text) - head) + 2.0 * head
    width = 4 * text.num_attention_heads * text.head_dim
    keys = sum(
        _keys_seen(text, i, depth + num_tokens) - _keys_seen(text, i, depth)
        for i in range(text.num_hidden_layers)
    )
    return products + width * keys


def _keys_seen(text: TextConfig, layer_idx: int, length: int) -> float:
    """Keys that all queries of a text see, added up."""
    return length * mean_attended(text, layer_idx, length) if length else 0.0
