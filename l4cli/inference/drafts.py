"""Guess what comes next: with a small model, or from what was said before.

in: the text so far, how many tokens; out: a `Draft`: tokens and how likely each guess was
source: speculative decoding arXiv 2211.17192; prompt lookup: the n-gram idea of assisted generation
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from l4cli.inference.cache import TokenIds
from l4cli.inference.sampler import Sampler

if TYPE_CHECKING:
    from l4cli.inference.engine import Engine

LEAST_MATCH, LONGEST_MATCH = 2, 16  # tokens that must, and at most can, agree for a lookup


@dataclass(frozen=True)
class Draft:
    """Guessed tokens; `probs_V` of each is what it was drawn from, None where it was certain."""

    tokens: list[int]
    probs: list[Tensor | None]


class Drafter(Protocol):
    """Who guesses."""

    def follow(self, ids_T: Tensor) -> None:
        """Hear all that was read so far."""

    def add(self, tokens: Iterable[int]) -> None:
        """Hear what came after it."""

    def draft(self, count: int, sampler: Sampler) -> Draft:
        """Guess at most so many tokens; `sampler` says how tokens are chosen."""


class LookupDrafter:
    """What followed the last time the newest tokens were seen; no second model."""

    def __init__(self, never: Iterable[int] = ()) -> None:
        """`never`: ids that no answer holds, such as a picture's."""
        self.ids, self.never = TokenIds(), frozenset(never)

    def follow(self, ids_T: Tensor) -> None:
        """Hear all that was read so far."""
        self.ids = TokenIds()
        self.ids.extend(ids_T)

    def add(self, tokens: Iterable[int]) -> None:
        """Hear what came after it."""
        for token in tokens:
            self.ids.append(token)

    def draft(self, count: int, sampler: Sampler) -> Draft:
        """Continue the longest match, the newest of several."""
        start = longest_match(np.frombuffer(self.ids.ids, np.uint32)) if count > 0 else None
        if start is None:
            return Draft([], [])
        tokens: list[int] = []
        while len(tokens) < count:
            # A copy may run into itself: what repeats, repeats on.
            ahead = start + len(tokens) - len(self.ids)
            token = tokens[ahead] if ahead >= 0 else self.ids[start + len(tokens)]
            if token in self.never:
                break
            tokens.append(token)
        return Draft(tokens, [None] * len(tokens))


def longest_match(ids_T: np.ndarray) -> int | None:
    """Where the end of a text stood before: the index of what came after it there."""
    last = len(ids_T) - 1
    if last < LEAST_MATCH:
        return None
    ends = np.flatnonzero(ids_T[:last] == ids_T[last])
    for length in range(2, LONGEST_MATCH + 1):
        earlier = ends[ends >= length - 1]
        found = earlier[ids_T[earlier - length + 1] == ids_T[last - length + 1]]
        if not len(found):
            return int(ends[-1]) + 1 if length > LEAST_MATCH else None
        ends = found
    return int(ends[-1]) + 1


class ModelDrafter:
    """A small model with a cache of its own; it reads the text, never the pictures."""

    def __init__(self, engine: Engine, skipped: Iterable[int] = ()) -> None:
        """`skipped`: ids that stand for pictures; the vocabulary is that of the large model."""
        self.engine, self.skipped = engine, tuple(skipped)
        self.cache = engine.new_cache()
        self.ids = TokenIds()  # what there is to read
        self.num_certain = 0  # read, and part of the text

    def follow(self, ids_T: Tensor) -> None:
        """Read all that was read so far."""
        self.ids = TokenIds()
        is_text = ~torch.isin(ids_T, torch.tensor(self.skipped, dtype=torch.int64))
        self.ids.extend(ids_T[is_text])
        if len(self.ids) > self.engine.max_context:
            return
        self.num_certain = self.cache.keep_common(self.ids)
        if self.num_certain < len(self.ids):
            self.engine.prefill(self.ids.tensor()[self.num_certain :], cache=self.cache)
            self.num_certain = self.cache.num_tokens

    def add(self, tokens: Iterable[int]) -> None:
        """Hear what came after it; guesses that were wrong are taken back."""
        for token in tokens:
            if token not in self.skipped:
                self.ids.append(token)
        common = self.num_certain
        most = min(self.cache.num_tokens, len(self.ids))
        while common < most and self.cache.tokens[common] == self.ids[common]:
            common += 1
        self.cache.take_back(self.cache.num_tokens - common)
        self.num_certain = common

    @torch.inference_mode()
    def draft(self, count: int, sampler: Sampler) -> Draft:
        """Write on, as the large model's tokens are chosen, from this model's logits."""
        tokens: list[int] = []
        probs: list[Tensor | None] = []
        unread = self.ids[self.num_certain :]
        guessing = sampler.guessing()
        while len(tokens) < count and self._can_read(len(unread), is_certain=not tokens):
            logits_V = self._read(unread, sampler.num_ids)
            if not tokens:
                self.num_certain = self.cache.num_tokens
            shaped_V = guessing.shaped(logits_V)
            if guessing.is_greedy:
                token, probs_V = int(shaped_V.argmax()), None
            else:
                probs_V = shaped_V.softmax(-1)
                token = guessing.draw(probs_V)
            guessing.note(token)
            tokens.append(token)
            probs.append(probs_V)
            unread = [token]
        return Draft(tokens, probs)

    def _can_read(self, num_tokens: int, *, is_certain: bool) -> bool:
        """Whether there is room, of guesses also to take them back."""
        has_context = self.cache.num_tokens + num_tokens <= self.engine.max_context
        return has_context and num_tokens > 0 and (is_certain or self.cache.undoable >= num_tokens)

    def _read(self, tokens: list[int], num_ids: int) -> Tensor:
        """The next token's logits, over the large model's vocabulary. shapes: -> [V]"""
        logits_V = self.engine.prefill(tokens, cache=self.cache).logits_V
        assert logits_V is not None
        if len(logits_V) >= num_ids:
            return logits_V[:num_ids]
        return torch.nn.functional.pad(logits_V, (0, num_ids - len(logits_V)), value=-torch.inf)
