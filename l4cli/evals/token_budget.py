"""A guard on cost: so many tokens may be asked and answered in one run, and no more.

in: what a request may take, then what it took; out: a refusal before the limit is exceeded
"""

from __future__ import annotations

import math
import threading

from l4cli.errors import L4Error

BYTES_PER_TOKEN = 4  # of English text, about; said wherever it is used
_UNKNOWN_FACTOR = 2.0  # room for a wrong estimate until a server has counted once


class TokenBudget:
    """Tokens spent and promised; safe to use from several threads."""

    def __init__(self, limit: int | None, *, is_exact: bool) -> None:
        """`limit` None: count only. `is_exact`: prompts are counted with the right tokenizer."""
        self.limit, self.is_exact = limit, is_exact
        self.num_used = 0
        self.num_requests = 0
        self._num_promised = 0
        self._lock = threading.Lock()
        # How far off the largest estimate of a prompt was.
        self._factor = 1.0 if is_exact else _UNKNOWN_FACTOR
        self._has_counted = False

    def promise(self, prompt_tokens: int, answer_tokens: int) -> int:
        """Set aside what one request may take. raises: L4Error if that is too much"""
        with self._lock:
            needed = math.ceil(prompt_tokens * self._factor) + answer_tokens
            if self.limit is not None and self._num_taken() + needed > self.limit:
                self._refuse(needed)
            self._num_promised += needed
            return needed

    def settle(self, promised: int, num_used: int) -> None:
        """Replace a promise by what was really taken."""
        with self._lock:
            self._num_promised -= promised
            self.num_used += num_used
            self.num_requests += 1

    def learn(self, estimated: int, counted: int) -> None:
        """Compare the estimate of a prompt with the server's own count."""
        with self._lock:
            ratio = counted / max(1, estimated)
            known = self._factor if self._has_counted or self.is_exact else 0.0
            self._factor = max(known, ratio)
            self._has_counted = True

    def _num_taken(self) -> int:
        return self.num_used + self._num_promised

    def _refuse(self, needed: int) -> None:
        waiting = f" and {self._num_promised:,} promised" if self._num_promised else ""
        raise L4Error(
            f"stopped before `--max-tokens {self.limit}` was exceeded",
            why=f"{self.num_used:,} tokens are used{waiting} by {self.num_requests:,} requests; "
            f"the next may take {needed:,}",
            fix="raise `--max-tokens`; what is finished is kept, and the same command goes on",
        )
