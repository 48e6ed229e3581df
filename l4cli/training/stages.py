"""What the stages of an extension are: lengths, tokens, and what is changed to stretch the model.

in: numbers and words; out: plain values that options, data and training share (no torch)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROPE_KINDS = ("llama3", "ntk", "yarn", "pi")


@dataclass(frozen=True)
class Stage:
    """One run of the loop: rows of `seq_len`, `num_tokens` of them in all."""

    number: int
    seq_len: int
    num_tokens: int

    @property
    def name(self) -> str:
        return f"stage-{self.number}-{self.seq_len}"

    @property
    def long_len(self) -> int:
        """From how many tokens on a document is long here: half a row."""
        return -(-self.seq_len // 2)


@dataclass(frozen=True)
class RopeChange:
    """How far the angles are stretched; without a factor as far as the stage is long."""

    kind: str  # one of ROPE_KINDS
    factor: float | None = None


@dataclass(frozen=True)
class Changes:
    """What is changed to stretch a model; None leaves a thing as the checkpoint has it."""

    overrides: Sequence[str] = ()  # `key=value`
    attn_scale: float | None = None
    floor_scale: float | None = None
    temperature: bool | None = None
    attention_chunk_size: int | None = None
    rope_theta: float | None = None
    rope: RopeChange | None = None
    only_full_rope: bool = False
    scalable_softmax: bool = False
