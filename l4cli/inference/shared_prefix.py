"""Read once what several prompts begin with: a fork is left where their ways part.

in: requests; out: for each the longest past that is known already, and where to leave forks
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from l4cli.inference.cache import Cache
from l4cli.inference.pieces import as_ids
from l4cli.inference.requests import Request

LEAST_SHARED = 64  # tokens worth a fork
LOOK_AHEAD = 256  # waiting requests that are compared with the one that begins


class SharedPrefixes:
    """What waiting prompts have in common with those that were read; plain text only.

    A fork may lie anywhere: forks share what is kept of a chunk, and are emptied at its border.
    """

    def __init__(self, requests: Iterable[tuple[int, Request]]) -> None:
        self.waiting = {
            index: as_ids(request.tokens).numpy()
            for index, request in requests
            # Pictures are the same ids whatever they show, and experts are told of every position.
            if request.cache is None and request.pixel_values is None and not request.wants_experts
        }
        self.trunks: list[tuple[np.ndarray, Cache]] = []  # their ids and what was read of them

    def begin(self, index: int) -> tuple[Cache | None, list[int]]:
        """A request's turn: a fork of what is known of its prompt, and where to leave others."""
        ids = self.waiting.pop(index, None)
        if ids is None:
            return None, []
        found = [trunk for trunk_ids, trunk in self.trunks if _begins_with(ids, trunk_ids)]
        known = max(found, key=lambda trunk: trunk.num_tokens, default=None)
        marks: list[int] = []
        read = 0 if known is None else known.num_tokens
        for length in sorted({common_length(ids, other) for other in self._next()}):
            if length >= read + LEAST_SHARED:
                marks.append(length)
                read = length
        fork = None if known is None else known.fork(1)[0]
        self.trunks = [(begin, trunk) for begin, trunk in self.trunks if self._is_awaited(begin)]
        return fork, marks

    def leave(self, cache: Cache) -> None:
        """Keep what a prompt has in common with one that waits."""
        self.trunks.append((cache.tokens.tensor().numpy(), cache.fork(1)[0]))

    def _next(self) -> list[np.ndarray]:
        return list(self.waiting.values())[:LOOK_AHEAD]

    def _is_awaited(self, begin: np.ndarray) -> bool:
        return any(_begins_with(ids, begin) for ids in self._next())


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids two prompts begin with alike."""
    shorter = min(len(one), len(other))
    few = min(shorter, LEAST_SHARED)
    for length in (few, shorter):  # most prompts part early
        differs = np.flatnonzero(one[:length] != other[:length])
        if len(differs):
            return int(differs[0])
    return shorter


def _begins_with(ids: np.ndarray, begin: np.ndarray) -> bool:
    return len(begin) <= len(ids) and np.array_equal(ids[: len(begin)], begin)
