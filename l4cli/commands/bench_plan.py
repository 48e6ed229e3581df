"""What `l4 bench` was asked to measure, as cases.

in: the lists behind its options; out: cases of answering and of training
"""

from __future__ import annotations

from dataclasses import dataclass

from l4cli.commands.bench_cases import DECODE, PREFILL, TRAIN, Case


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    kinds: tuple[str, ...]
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    seq_len: int
    batch_size: int
    repeats: int

    def answering(self) -> list[Case]:
        """Decode by depth and batch, prefill by depth and length."""
        cases = []
        if DECODE in self.kinds:
            cases += [
                Case(DECODE, self.new_tokens, d, b) for d in self.depths for b in self.batches
            ]
        if PREFILL in self.kinds:
            cases += [Case(PREFILL, p, d) for d in self.depths for p in self.prompts]
        return cases

    def training(self) -> list[Case]:
        is_asked = TRAIN in self.kinds
        return [Case(TRAIN, self.seq_len, batch=self.batch_size)] if is_asked else []
