"""Accelerators by name: memory and how fast it is read, and what others say of Llama 4 on them.

in: a name; out: `Gpu`; quoted speeds with who said so
source: the vendors' data sheets (dense rates, one device); the quotations name theirs
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device."""

    memory_bytes: float
    bandwidth: float  # bytes per second of its own memory
    bf16_rate: float  # operations per second, dense
    fp8_rate: float | None = None


GPUS = {
    "a100": Gpu(80e9, 2.039e12, 312e12),
    "l40s": Gpu(48e9, 0.864e12, 362e12, 733e12),
    "rtx5090": Gpu(32e9, 1.792e12, 209e12, 419e12),
    "rtxpro6000": Gpu(96e9, 1.792e12, 252e12, 503e12),
    "h100": Gpu(80e9, 3.35e12, 989e12, 1979e12),
    "h200": Gpu(141e9, 4.8e12, 989e12, 1979e12),
    "b200": Gpu(180e9, 8.0e12, 2250e12, 4500e12),
    "mi300x": Gpu(192e9, 5.3e12, 1307e12, 2615e12),
    "mi355x": Gpu(288e9, 8.0e12, 2500e12, 5000e12),
}


@dataclass(frozen=True)
class Quoted:
    """A figure that somebody published: tokens per second of one answer, or that it fits."""

    preset: str
    storage: str | None  # as `roofline.STORAGES`; None: not said
    gpu: str | None  # as `GPUS`; None: something else
    num_gpus: int
    tok_per_sec: float | None  # None: the claim is that it fits
    said: str


QUOTED = (
    Quoted("scout", "int4", "h100", 1, None, "Meta, 2025-04: fits one H100 in int4"),
    Quoted("scout", None, None, 0, 460, "Groq, 2025-04: over 460 tokens/s on its own chips"),
    Quoted(
        "scout", "int4", "rtxpro6000", 1, 60,
        "loftllc.dev, 2026: vLLM, NVFP4, RTX PRO 6000 Max-Q, short contexts",
    ),
    Quoted(
        "maverick", "fp8", "b200", 8, 1000,
        "NVIDIA, 2025-05: over 1,000 tokens/s on a DGX B200, several tokens a step (EAGLE-3)",
    ),
)  # fmt: skip
