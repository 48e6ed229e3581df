"""A guard on cost: so many tokens may be asked and answered in one run, and no more.

in: what requests may take, then what they took; out: a refusal before the limit is exceeded
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from l4cli.errors import L4Error

BYTES_PER_TOKEN = 4  # of English text, about; said wherever it is used
_UNKNOWN_FACTOR = 2.0  # room for a wrong estimate until a server has counted once


@dataclass
class Promise:
    """Tokens set aside for one request, until it is known what it took."""

    budget: TokenBudget
    num_tokens: int
    estimate: int  # of the prompt
    is_open: bool = True

    def spend(self, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        """Replace the promise by the server's own count; without one all of it is taken."""
        if prompt_tokens is None:
            self._close(self.num_tokens)
            return
        self.budget.learn(self.estimate, prompt_tokens)
        self._close(prompt_tokens + (answer_tokens or 0))

    def charge(self) -> None:
        """Count a try that may have been billed, and stay open for the next.

        raises: L4Error if there may be too little left for it
        """
        self.budget.charge(self.num_tokens)

    def release(self) -> None:
        """Give back what was not used."""
        self._close(0)

    def _close(self, num_used: int) -> None:
        if self.is_open:
            self.is_open = False
            self.budget.settle(self.num_tokens, num_used)


class TokenBudget:
    """Tokens spent and promised; safe to use from several threads."""

    def __init__(self, limit: int | None, *, is_exact: bool) -> None:
        """`limit` None: count only. `is_exact`: prompts are counted with the right tokenizer."""
        self.limit, self.is_exact = limit, is_exact
        self.num_used = 0
        self._num_promised = 0
        self._changed = threading.Condition()
        # How far off the largest estimate of a prompt was.
        self._factor = 1.0 if is_exact else _UNKNOWN_FACTOR
        self._has_counted = False

    def promise(self, requests: Sequence[tuple[int, int]]) -> list[Promise]:
        """Set aside what requests (tokens of the prompt, most of the answer) may take together.

        It waits for others if they may leave enough. So a refusal finds nothing under way that
        would be paid for in vain. raises: L4Error if there is not enough
        """
        with self._changed:
            while True:
                needed = [math.ceil(p * self._factor) + a for p, a in requests]
                if self.limit is None or self._num_taken() + sum(needed) <= self.limit:
                    break
                if self._num_promised == 0:
                    self._refuse(f"the next {len(needed)} requests may take {sum(needed):,}")
                self._changed.wait()
            self._num_promised += sum(needed)
        return [Promise(self, n, p) for n, (p, _) in zip(needed, requests, strict=True)]

    def settle(self, promised: int, num_used: int) -> None:
        """Replace promised tokens by used ones."""
        with self._changed:
            self._num_promised -= promised
            self.num_used += num_used
            self._changed.notify_all()

    def charge(self, num_tokens: int) -> None:
        """Count tokens nobody had promised. raises: L4Error if promises may not be kept then"""
        with self._changed:
            self.num_used += num_tokens
            if self.limit is not None and self._num_taken() > self.limit:
                self._refuse(f"what is under way may take {self._num_promised:,}")

    def learn(self, estimated: int, counted: int) -> None:
        """Compare the estimate of a prompt with the server's own count."""
        with self._changed:
            known = self._factor if self._has_counted or self.is_exact else 0.0
            self._factor = max(known, counted / max(1, estimated))
            self._has_counted = True

    def _num_taken(self) -> int:
        return self.num_used + self._num_promised

    def _refuse(self, what_is_next: str) -> None:
        raise L4Error(
            f"stopped before `--max-tokens {self.limit}` was exceeded",
            why=f"{self.num_used:,} tokens are used, and {what_is_next}",
            fix="raise `--max-tokens`; what is finished is kept, and the same command goes on",
        )
