"""Continue many requests side by side: one joins as soon as another ends (continuous batching).

in: an engine and requests; out: events. Prompts are read in bounded pieces between the steps of
rows that are being continued, and what prompts have in common is read once.
source: Orca (OSDI 2022); pieces between steps as in Sarathi-Serve (arXiv 2403.02310)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l4cli.inference.cache import Cache, CacheBatch
from l4cli.inference.pieces import as_ids, check_ids
from l4cli.inference.requests import Event, Finish, Request, RoutingRecord
from l4cli.inference.sampler import Sampler, choose_all
from l4cli.inference.shared_prefix import SharedPrefixes
from l4cli.ops.batch import Batch

if TYPE_CHECKING:
    from l4cli.inference.engine import Engine

READ_BESIDE = 512  # tokens of prompts read between two steps of rows that wait for them


@dataclass
class Row:
    """A request on its way."""

    index: int
    request: Request
    cache: Cache
    sampler: Sampler
    experts: Tensor | None = None  # of the positions read since the last event
    num_new_tokens: int = 0
    token: int = -1  # the newest, not read yet

    def tell(self, token: int, logprob: float, num_read: int, max_context: int) -> Event:
        """Take a new token, after `num_read` others, and say whether it is the last."""
        self.token = token
        self.num_new_tokens += 1
        finish: Finish | None = None
        if token in self.request.stop_ids:
            finish = "stop"
        elif num_read + 1 >= max_context:
            finish = "context"
        elif self.num_new_tokens >= self.request.max_new_tokens:
            finish = "length"
        return Event(self.index, token, logprob, finish, self.experts)


class Generation:
    """The requests of one call: waiting, being read, being continued."""

    def __init__(self, engine: Engine, requests: Sequence[Request], max_batch_size: int) -> None:
        self.engine, self.max_batch_size = engine, max_batch_size
        asked = [(i, request) for i, request in enumerate(requests) if request.max_new_tokens > 0]
        self.waiting = deque(asked)
        self.shared = SharedPrefixes(asked)
        self.reading: Reading | None = None
        self.active: list[Row] = []

    def events(self) -> Iterator[Event]:
        """Run until every request has ended; the events of all interleave."""
        while self.waiting or self.reading or self.active:
            fresh = self._read_some()
            if fresh:
                logits_BV = torch.stack([_logits(row) for row in fresh])
                yield from self._choose(fresh, logits_BV)
            if self.active:
                rows, self.active = self.active, []
                yield from self._choose(rows, self._step(rows))

    def _read_some(self) -> list[Row]:
        """Read prompts: about `READ_BESIDE` tokens, or until there is a row to continue."""
        fresh: list[Row] = []
        budget = READ_BESIDE
        while budget > 0 or not (self.active or fresh):
            if self.reading is None:
                short = self._begin(budget, len(self.active) + len(fresh))
                if short:
                    budget -= read_together(self.engine, short)
                    fresh += [reading.row() for reading in short]
                if self.reading is None:
                    if not short:
                        break
                    continue
            budget -= self.reading.read_piece()
            if self.reading.is_done:
                fresh.append(self.reading.row())
                self.reading = None
        return fresh

    def _begin(self, budget: int, num_rows: int) -> list[Reading]:
        """Take short prompts that are read in one pass; a long one is the next to be read."""
        short: list[Reading] = []
        while self.waiting and budget > 0 and num_rows < self.max_batch_size:
            index, request = self.waiting.popleft()
            size = READ_BESIDE if num_rows else self.engine.prefill_chunk
            reading = Reading(self.engine, index, request, self.shared, size)
            num_rows += 1
            if not 0 < reading.num_short <= budget:
                self.reading = reading
                break
            short.append(reading)
            budget -= reading.num_short
        return short

    def _choose(self, rows: list[Row], logits_BV: Tensor) -> Iterator[Event]:
        """Draw every row's next token; those with more to say stay."""
        with torch.inference_mode():
            chosen = choose_all([row.sampler for row in rows], logits_BV)
        limit = self.engine.max_context
        events = [
            row.tell(token, logprob, row.cache.num_tokens, limit)
            for row, (token, logprob) in zip(rows, chosen, strict=True)
        ]
        pairs = zip(rows, events, strict=True)
        self.active += [row for row, event in pairs if event.finish is None]
        yield from events

    @torch.inference_mode()
    def _step(self, rows: list[Row]) -> Tensor:
        """Read the newest token of every row in one forward pass. shapes: -> logits_BV"""
        engine, device = self.engine, self.engine.device
        record = RoutingRecord() if any(row.request.wants_experts for row in rows) else None
        ids_B1 = torch.tensor([[row.token] for row in rows], device=device)
        positions_B1 = torch.tensor([[row.cache.num_tokens] for row in rows], device=device)
        cache = rows[0].cache if len(rows) == 1 else CacheBatch(row.cache for row in rows)
        batch = Batch.continuing(ids_B1, positions_B1)
        hidden_BD = engine.model.hidden(batch, cache=cache, routing=record)[:, -1]
        logits_BV = engine.model.lm_head(hidden_BD).float()
        experts_BTLA = None if record is None else record.take()
        for i, row in enumerate(rows):
            row.cache.tokens.append(row.token)
            row.cache.logits_V = logits_BV[i]
            if experts_BTLA is not None and row.request.wants_experts:
                row.experts = experts_BTLA[i]
        return logits_BV


class Reading:
    """A prompt that is being read, piece by piece."""

    def __init__(
        self,
        engine: Engine,
        index: int,
        request: Request,
        shared: SharedPrefixes,
        piece_size: int,
    ) -> None:
        self.engine, self.index, self.request, self.shared = engine, index, request, shared
        self.record = RoutingRecord() if request.wants_experts else None
        known, marks = shared.begin(index)
        self.cache = request.cache or known or engine.new_cache()
        self.start = 0 if known is None else known.num_tokens
        self.pieces = self._pieces(self.start, marks, piece_size)
        self.is_done = not len(request.tokens)
        is_plain = request.pixel_values is None and self.record is None
        # Tokens that may be read in one pass with others; 0: only by itself.
        self.num_short = 0 if marks or not is_plain else len(request.tokens) - self.start

    def read_piece(self) -> int:
        """Read on; say how many tokens that were."""
        before = self.cache.num_tokens
        with torch.inference_mode():
            if not self.is_done and next(self.pieces, None) is None:
                self.is_done = True
        return self.cache.num_tokens - before

    def _pieces(self, start: int, marks: list[int], size: int) -> Iterator[int]:
        """Read from one mark to the next, and leave a fork there for who shares so much."""
        ids, pixels = as_ids(self.request.tokens), self.request.pixel_values
        needs = 1 if self.record is None else None
        for end in sorted({*marks, len(ids)}):
            if end > start:
                part = ids[start:end]
                for rows, hidden_TD in self.engine.read(
                    part, pixels, self.cache, size, self.record, needs
                ):
                    if rows.stop == len(part):
                        self.cache.logits_V = self.engine.model.lm_head(hidden_TD[-1]).float()
                    yield rows.stop
            if end in marks:
                self.shared.leave(self.cache)
            start = end

    def row(self) -> Row:
        """The request, ready to be continued."""
        logits_V = self.cache.logits_V
        assert logits_V is not None, "give tokens, or a cache that has read some"
        sampling = self.request.sampling
        sampler = Sampler(sampling, self.cache.tokens, self.engine.never, logits_V)
        experts = None if self.record is None else self.record.take()[0]
        return Row(self.index, self.request, self.cache, sampler, experts)


class InOneRow:
    """Stands where a cache stands: several texts one after the other, each with its own cache."""

    def __init__(self, caches: Sequence[Cache], lengths: Sequence[int]) -> None:
        self.caches, self.lengths = caches, list(lengths)

    def attend(self, layer_idx: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Append k and v to each text's cache, then attend with q. shapes: -> out as q"""
        texts = zip(*(x[0].split(self.lengths) for x in (q_BTNH, k_BTKH, v_BTKH)), strict=True)
        layers = [cache.layers[layer_idx] for cache in self.caches]
        outs = [layer.attend(*text) for layer, text in zip(layers, texts, strict=True)]
        return torch.cat(outs)[None]


@torch.inference_mode()
def read_together(engine: Engine, readings: Sequence[Reading]) -> int:
    """Read short prompts to their ends in one pass; say how many tokens that were."""
    device, texts, positions = engine.device, [], []
    for reading in readings:
        ids_T = as_ids(reading.request.tokens)[reading.start :]
        check_ids(ids_T, engine.config.text.vocab_size)
        texts.append(ids_T)
        first = reading.cache.num_tokens
        positions.append(torch.arange(first, first + len(ids_T)))
    lengths = [len(ids_T) for ids_T in texts]
    batch = Batch.continuing(
        torch.cat(texts)[None].to(device), torch.cat(positions)[None].to(device)
    )
    cache = InOneRow([reading.cache for reading in readings], lengths)
    hidden_MD = engine.model.hidden(batch, cache)[0]
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    logits_BV = engine.model.lm_head(hidden_MD[ends]).float()
    for reading, ids_T, logits_V in zip(readings, texts, logits_BV, strict=True):
        reading.cache.tokens.extend(ids_T)
        reading.cache.logits_V = logits_V
        reading.is_done = True
    return sum(lengths)


def read_whole(engine: Engine, index: int, request: Request) -> Row:
    """A request alone, its prompt read to the end."""
    reading = Reading(engine, index, request, SharedPrefixes([]), engine.prefill_chunk)
    while not reading.is_done:
        reading.read_piece()
    return reading.row()


def _logits(row: Row) -> Tensor:
    assert row.cache.logits_V is not None
    return row.cache.logits_V
