"""Check several guessed tokens in one pass: the same answers, fewer passes of the large model.

in: a request and who guesses; out: events as without guesses, from the same distribution
Greedy answers are the same tokens. A pass of several tokens rounds otherwise than one of one:
two tokens as near as that (1e-6 in fp32, 1e-2 in bf16) may change places, as in any batch.
source: Leviathan et al. arXiv 2211.17192; Chen et al. arXiv 2302.01318 (rejection sampling)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l4cli.inference.cache import Cache
from l4cli.inference.drafts import Draft, Drafter
from l4cli.inference.generation import Row, read_whole
from l4cli.inference.requests import Event, Request, RoutingRecord
from l4cli.inference.sampler import Sampler
from l4cli.model import Llama4Config, count_parameters
from l4cli.ops.batch import Batch

if TYPE_CHECKING:
    from l4cli.inference.engine import Engine

MOST_GUESSES = 16  # tokens, when nobody says how many
_MEMORY = 0.96  # how much an older guess weighs beside the next newer one
_PROBE_EVERY = 8  # steps; a drafter that failed is tried again


@dataclass
class Speculation:
    """Who guesses, how many tokens, and how well that went."""

    drafter: Drafter
    num_tokens: int | None = None  # a step; None: as many as pay
    cost: Callable[[int], float] = lambda count: 1.0  # of a step with so many guesses
    num_steps: int = 0  # passes of the large model
    num_drafted: int = 0
    num_accepted: int = 0
    _good: float = field(default=3.2, repr=False)  # a hopeful beginning: four in five
    _tried: float = field(default=4.0, repr=False)

    def wanted(self) -> int:
        """How many tokens to guess. By counts alone: the same seed gives the same answer."""
        if self.num_tokens is not None:
            return self.num_tokens
        rate = self._good / self._tried
        gains = [
            sum(rate**i for i in range(count + 1)) / self.cost(count)
            for count in range(MOST_GUESSES + 1)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        return best or int(self.num_steps % _PROBE_EVERY == 0)

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Count one step."""
        self.num_steps += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if num_drafted:
            # What follows a wrong guess was not judged.
            judged = min(num_accepted + 1, num_drafted)
            keep = _MEMORY**judged
            self._good, self._tried = keep * self._good + num_accepted, keep * self._tried + judged

    def anew(self) -> Speculation:
        """The same, with nothing counted: the same seed gives the same answer in any order."""
        return Speculation(self.drafter, self.num_tokens, self.cost)

    @property
    def accepted_per_step(self) -> float:
        """Guessed tokens taken in each pass, on average; one more is always written."""
        return self.num_accepted / max(self.num_steps, 1)


def step_cost(target: Llama4Config, draft: Llama4Config | None) -> Callable[[int], float]:
    """Weights that a step with so many guesses touches, in those of a step without.

    At batch 1 they are what takes the time; different tokens call different experts.
    """
    one = touched_weights(target, 1)
    each = 0.0 if draft is None else touched_weights(draft, 1)
    return lambda count: (touched_weights(target, count + 1) + count * each) / one


def touched_weights(config: Llama4Config, num_tokens: int) -> float:
    """How many weights are read, on average, for so many tokens of text."""
    counts, text = count_parameters(config), config.text
    routed = counts.by_group["routed experts"]
    share = text.num_experts_per_tok / text.num_local_experts
    always = counts.active - routed * share - text.vocab_size * text.hidden_size
    return always + routed * (1 - (1 - share) ** num_tokens)


def speculate(
    engine: Engine, index: int, request: Request, speculation: Speculation
) -> Iterator[Event]:
    """Continue one request. Wherever it is left, its cache holds all but the newest token."""
    row = read_whole(engine, index, request)
    cache, drafter = row.cache, speculation.drafter
    assert cache.logits_V is not None
    token, logprob = row.sampler.choose(cache.logits_V)
    event = row.tell(token, logprob, cache.num_tokens, engine.max_context)
    yield event
    if event.finish is not None:
        return
    drafter.follow(cache.tokens.tensor())
    told = [token]
    while True:
        drafter.add(told)
        draft = drafter.draft(_count(engine, row, speculation), row.sampler)
        before = cache.num_tokens
        logits_TV, experts_TLA = read_run(
            engine, cache, [row.token, *draft.tokens], request.wants_experts
        )
        told, logprobs = verify(row.sampler, logits_TV, draft)
        speculation.learn(len(draft.tokens), len(told) - 1)
        at = 0
        try:
            for at, (token, logprob) in enumerate(zip(told, logprobs, strict=True)):
                row.experts = None if experts_TLA is None else experts_TLA[at : at + 1]
                event = row.tell(token, logprob, before + 1 + at, engine.max_context)
                if event.finish is not None:
                    break
                yield event
        finally:  # also where nobody listens any longer: what was not told is not read
            cache.take_back(cache.num_tokens - (before + 1 + at))
            cache.logits_V = logits_TV[at]
        if event.finish is not None:
            yield event
            return


def _count(engine: Engine, row: Row, speculation: Speculation) -> int:
    """Tokens to guess: no more than can be taken back, or than the answer may have."""
    limits = (
        speculation.wanted(),
        row.cache.undoable - 1,
        row.request.max_new_tokens - row.num_new_tokens - 1,
        engine.max_context - row.cache.num_tokens - 2,
    )
    return max(0, min(limits))


@torch.inference_mode()
def read_run(
    engine: Engine, cache: Cache, tokens: list[int], wants_experts: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Read a few tokens and keep the logits after each. shapes: -> [T, V], experts [T, L, A]"""
    record = RoutingRecord() if wants_experts else None
    ids_1T = torch.tensor([tokens], device=engine.device)
    first = cache.num_tokens
    positions_1T = torch.arange(first, first + len(tokens), device=engine.device)[None]
    batch = Batch.continuing(ids_1T, positions_1T)
    hidden_1TD = engine.model.hidden(batch, cache=cache, routing=record)
    cache.tokens.extend(torch.tensor(tokens))
    logits_TV = engine.model.lm_head(hidden_1TD[0]).float()
    return logits_TV, None if record is None else record.take()[0]


@torch.inference_mode()
def verify(sampler: Sampler, logits_TV: Tensor, draft: Draft) -> tuple[list[int], list[float]]:
    """Take guesses as long as they stand, then one token more; with their log-probabilities."""
    tokens: list[int] = []
    # Nothing that is taken changes what follows, so all positions are filtered at once.
    shaped_TV = sampler.shaped(logits_TV) if sampler.is_seen_V is None else None
    for i in range(len(draft.tokens) + 1):
        shaped_V = sampler.shaped(logits_TV[i]) if shaped_TV is None else shaped_TV[i]
        if i == len(draft.tokens):
            token = _drawn(sampler, shaped_V)
        else:
            token = _judged(sampler, shaped_V, draft.tokens[i], draft.probs[i])
        sampler.note(token)
        tokens.append(token)
        if i < len(draft.tokens) and token != draft.tokens[i]:
            break
    rows_TV = logits_TV[: len(tokens)]
    chosen_T1 = torch.tensor(tokens, device=logits_TV.device)[:, None]
    logprobs = rows_TV.gather(-1, chosen_T1)[:, 0] - rows_TV.logsumexp(-1)
    return tokens, logprobs.tolist()


def _drawn(sampler: Sampler, shaped_V: Tensor) -> int:
    return int(shaped_V.argmax()) if sampler.is_greedy else sampler.draw(shaped_V.softmax(-1))


def _judged(sampler: Sampler, shaped_V: Tensor, guess: int, guess_probs_V: Tensor | None) -> int:
    """The guess with probability min(1, p / q), else a token from what p has beyond q."""
    if sampler.is_greedy:
        return int(shaped_V.argmax())
    probs_V = shaped_V.softmax(-1)
    likely = 1.0 if guess_probs_V is None else float(guess_probs_V[guess])
    if sampler.chance() * likely < float(probs_V[guess]):
        return guess
    if guess_probs_V is None:
        rest_V = probs_V.index_fill(0, torch.tensor([guess], device=probs_V.device), 0)
    else:
        rest_V = (probs_V - guess_probs_V).clamp(min=0)
    # All zero only where p and q are the same but for rounding.
    return sampler.draw(rest_V if bool(rest_V.any()) else probs_V)
