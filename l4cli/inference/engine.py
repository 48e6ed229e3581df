"""Run a model over ids: read a prompt in pieces, write answers token by token, score texts.

in: ids, tiles and `Request`s; out: a `Cache`, `Event`s, log-probabilities. Nothing here knows text
source: DESIGN section 5; rows of unequal length decode together as in Orca (OSDI 2022)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l4cli.errors import L4Error
from l4cli.inference.cache import Cache
from l4cli.inference.generation import Generation
from l4cli.inference.kept import CacheOptions
from l4cli.inference.layer_major import Progress, hidden_states, read_layer_major
from l4cli.inference.native import NativeModel
from l4cli.inference.native_loading import weights_id
from l4cli.inference.pieces import as_ids, check_ids, groups_of, prefill_pieces
from l4cli.inference.questions import Questions
from l4cli.inference.requests import Event, Request, RoutingRecord
from l4cli.inference.speculative import Speculation, speculate
from l4cli.model import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration
from l4cli.ops.batch import Batch

PREFILL_CHUNK = 2048  # tokens read at once: enough rows for each expert, little memory
LOGIT_ELEMENTS = 2**22  # logits held at once when scoring: 16 MiB


class Engine:
    """A model ready to be asked; keeps no state between calls."""

    def __init__(
        self,
        model: Llama4ForCausalLM | Llama4ForConditionalGeneration | NativeModel,
        *,
        num_token_ids: int | None = None,
        max_context: int | None = None,
        cache_options: CacheOptions | None = None,
    ) -> None:
        """`num_token_ids`: the tokenizer's; the rows above are padding and are never chosen."""
        self.model = model.eval()
        self.config: Llama4Config = model.config
        self.max_context = max_context or self.config.text.max_position_embeddings
        self.device = next(model.parameters()).device
        self.never = _never_chosen(self.config, num_token_ids).to(self.device)
        self.cache_options = cache_options or CacheOptions()
        self.prefill_chunk: int = getattr(model, "prefill_chunk", PREFILL_CHUNK)

    @functools.cached_property
    def model_id(self) -> str:
        """Tells these weights from others of the same shape, whatever precision they are in."""
        if isinstance(self.model, NativeModel):
            return self.model.model_id
        return weights_id(self.model)

    def new_cache(self) -> Cache:
        """Nothing read yet."""
        cache = Cache(self.config.text, self.cache_options)
        cache.model_id = self.model_id
        return cache

    def load_cache(self, path: Path) -> Cache:
        """What `Cache.save` wrote for this model. raises: L4Error for another one's"""
        return Cache.load(
            path,
            self.config.text,
            self.device,
            model_id=self.model_id,
            sparse_topk=self.cache_options.sparse_topk,
        )

    def check_context(self, num_tokens: int) -> None:
        """raises: L4Error with both numbers when so many tokens do not fit"""
        if num_tokens > self.max_context:
            raise L4Error(
                "the context is too long",
                why=f"{num_tokens} tokens are needed, the model has room for {self.max_context}"
                " (`max_position_embeddings`)",
                fix="shorten the prompt, give fewer pictures, ask for fewer new tokens, "
                "or begin anew (`/reset`)",
            )

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Any,
        pixel_values: Tensor | None = None,
        *,
        cache: Cache | None = None,
        chunk_size: int | None = None,
        routing: RoutingRecord | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Cache:
        """Read a prompt, about `chunk_size` tokens at once but never a part of a tile.

        `on_progress` hears how many are read; if it raises, the cache holds exactly those.
        """
        cache = cache or self.new_cache()
        ids = as_ids(tokens)
        needs = 1 if routing is None else None  # whose choices are noted goes through all layers
        for rows, hidden_TD in self.read(ids, pixel_values, cache, chunk_size, routing, needs):
            if rows.stop == len(ids):
                cache.logits_V = self.model.lm_head(hidden_TD[-1]).float()
            if on_progress is not None:
                on_progress(rows.stop)
        return cache

    @torch.inference_mode()
    def score(
        self,
        tokens: Any,
        pixel_values: Tensor | None = None,
        *,
        cache: Cache | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Log-probability of each token given all before it, fp32.

        shapes: n tokens -> [n - 1]; [n] after a cache, whose logits tell of the first
        """
        ids = as_ids(tokens)
        parts = []
        if cache is not None and cache.logits_V is not None:
            parts.append(cache.logits_V.log_softmax(-1)[ids[:1].to(self.device)])
        cache = cache or self.new_cache()
        for rows, hidden_TD in self.read(ids, pixel_values, cache, chunk_size, None, None):
            next_ids = ids[rows.start + 1 : rows.stop + 1].to(self.device)
            if len(next_ids):
                parts.append(self._judged(hidden_TD[: len(next_ids)], next_ids)[0])
            if rows.stop == len(ids):
                cache.logits_V = self.model.lm_head(hidden_TD[-1]).float()
        return torch.cat(parts) if parts else torch.empty(0)

    def _judged(self, hidden_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of one id at each position and the likeliest id, in small pieces."""
        rows = max(1, LOGIT_ELEMENTS // self.config.text.vocab_size)
        pieces = zip(hidden_TD.split(rows), ids_T.split(rows), strict=True)
        parts = [_judge(self.model.lm_head(h).float(), ids, self.never) for h, ids in pieces]
        logprobs, likeliest = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(likeliest)

    @torch.inference_mode()
    def score_many(self, cache: Cache, continuations: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """What the model thinks of several continuations of one past, which stays as it is.

        shapes: -> for each of n ids, their log-probabilities [n] fp32 and the likeliest ids [n]
        """
        assert cache.logits_V is not None, "the cache has read nothing"
        all_ids = [as_ids(tokens) for tokens in continuations]
        for ids in all_ids:
            check_ids(ids, self.config.text.vocab_size)
            self.check_context(cache.num_tokens + len(ids))
        results = []
        for group in groups_of([len(ids) for ids in all_ids], self.prefill_chunk):
            results += self._score_group(cache, all_ids[group])
        return results

    @torch.inference_mode()
    def read_layer_major(
        self,
        tokens: Any,
        questions: Sequence[Any],
        pixel_values: Tensor | None = None,
        *,
        hidden_store: str | Path = "memory",
        weights: Path | str | None = None,
        chunk_size: int = PREFILL_CHUNK,
        on_progress: Progress | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """`score_many` after `prefill`, with one layer's keys, values and weights held at a time.

        `hidden_store`: "memory", or a file to be made for the states of all tokens; `weights`: a
        checkpoint to bring layers in from, one by one, when the model came without them.
        """
        ids, all_ids = as_ids(tokens), [as_ids(question) for question in questions]
        longest = max([0, *(len(question) for question in all_ids)])
        self.check_context(len(ids) + longest)
        for some in (ids, *all_ids):
            check_ids(some, self.config.text.vocab_size)
        assert len(ids), "there is no text to read"
        if not longest:
            return [(torch.empty(0), torch.empty(0, dtype=torch.int64)) for _ in all_ids]
        # The text's last token tells of each question's first: it goes along with all of them.
        asked = [torch.cat([ids[-1:], question[:-1]]) for question in all_ids if len(question)]
        text = self.config.text
        with hidden_states(
            hidden_store, len(ids) - 1, text.hidden_size, self.model.compute_dtype
        ) as hidden_TD:
            states_MD = read_layer_major(
                self.model,
                self._embedded(ids[:-1], pixel_values, chunk_size),
                hidden_TD,
                asked,
                self.cache_options,
                chunk_size,
                weights,
                on_progress,
            )
        judged = self._judged(states_MD, torch.cat(all_ids).to(self.device))
        lengths = [len(question) for question in all_ids]
        return list(zip(*(x.split(lengths) for x in judged), strict=True))

    def _embedded(
        self, ids_T: Tensor, pixel_values: Tensor | None, chunk_size: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Embeddings, pictures among them, piece by piece. shapes: -> rows, h_TD"""
        for rows, tiles in prefill_pieces(ids_T, pixel_values, self.config, chunk_size):
            pixels = None
            if pixel_values is not None and tiles.stop > tiles.start:
                pixels = pixel_values[tiles].to(self.device)
            yield rows, self.model.embed(ids_T[None, rows].to(self.device), pixels)[0]

    def _score_group(self, cache: Cache, all_ids: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Continuations side by side in one row, each seeing the past and itself."""
        assert cache.logits_V is not None
        heads = [ids[:-1] for ids in all_ids]  # what follows the last token is not asked
        lengths = [len(ids) for ids in heads]
        ids_1M = torch.cat([*heads, torch.empty(0, dtype=torch.int64)])[None].to(self.device)
        targets = [ids.to(self.device) for ids in all_ids]
        first = [_judge(cache.logits_V[None], ids[:1], self.never) for ids in targets]
        if ids_1M.shape[1] == 0:
            return first
        positions = [cache.num_tokens + torch.arange(n, device=self.device) for n in lengths]
        batch = Batch.continuing(ids_1M, torch.cat(positions)[None])
        questions = Questions(cache.layers, cache.num_tokens, lengths)
        hidden_MD = self.model.hidden(batch, questions)[0]
        next_ids = torch.cat([ids[1:] for ids in targets])
        logprobs, argmax = self._judged(hidden_MD, next_ids)
        rest = zip(logprobs.split(lengths), argmax.split(lengths), strict=True)
        return [
            (torch.cat([a, c]), torch.cat([b, d]))
            for (a, b), (c, d) in zip(first, rest, strict=True)
        ]

    def generate(
        self,
        requests: Sequence[Request],
        max_batch_size: int = 16,
        speculation: Speculation | None = None,
    ) -> Iterator[Event]:
        """Continue every request, up to `max_batch_size` side by side; their events interleave.

        With a `speculation` they are continued one after the other.
        """
        for request in requests:
            num_read = 0 if request.cache is None else request.cache.num_tokens
            self.check_context(num_read + len(request.tokens) + 1)
        if speculation is None:
            yield from Generation(self, requests, max_batch_size).events()
            return
        for index, request in enumerate(requests):
            if request.max_new_tokens > 0:
                yield from speculate(self, index, request, speculation)

    def read(
        self,
        ids_T: Tensor,
        pixel_values: Tensor | None,
        cache: Cache,
        chunk_size: int | None,
        routing: RoutingRecord | None,
        num_needed: int | None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Feed ids piece by piece. shapes: -> the piece's rows, hidden_TD

        `num_needed`: of how many tokens at the very end states are wanted; None: of all.
        """
        check_ids(ids_T, self.config.text.vocab_size)
        self.check_context(cache.num_tokens + len(ids_T))
        size = chunk_size or self.prefill_chunk
        pieces = prefill_pieces(ids_T, pixel_values, self.config, size)
        cache.logits_V = None
        for rows, tiles in pieces:
            ids_1T = ids_T[None, rows].to(self.device)
            first = cache.num_tokens
            positions_1T = torch.arange(first, first + ids_1T.shape[1], device=self.device)[None]
            pixels = None
            if pixel_values is not None and tiles.stop > tiles.start:
                pixels = pixel_values[tiles].to(self.device)
            batch = Batch.continuing(ids_1T, positions_1T, pixels)
            needed = num_needed
            if needed is not None and rows.stop < len(ids_T):
                needed = 0
            hidden_1TD = self.model.hidden(batch, cache, routing, needed)
            cache.tokens.extend(ids_T[rows])
            yield rows, hidden_1TD[0]


def _judge(logits_TV: Tensor, ids_T: Tensor, never: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ids, and the ids that greedy decoding would choose."""
    logprobs_T = -F.cross_entropy(logits_TV, ids_T, reduction="none")
    return logprobs_T, logits_TV.index_fill(-1, never, -torch.inf).argmax(-1)


def _never_chosen(config: Llama4Config, num_token_ids: int | None) -> Tensor:
    """Ids that no answer may hold: padding rows, and the placeholder that stands for pixels."""
    vocab_size = config.text.vocab_size
    ids = list(range(num_token_ids or vocab_size, vocab_size))
    if config.vision is not None and config.image_token_index not in ids:
        ids.append(config.image_token_index)
    return torch.tensor(ids, dtype=torch.int64)
