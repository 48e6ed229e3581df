"""Choose the next token: penalty, temperature, then the filters, then one draw.

in: logits fp32 [V] of one position, the ids seen so far, `SamplingOptions`; out: one id
Filters take [..., V] as well: each row is filtered as if it were alone.
source: HF LogitsProcessor (same order, same ties); min-p arXiv 2407.01082; CTRL penalty 1909.05858
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l4cli.errors import UsageError


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose. Temperature 0 takes the likeliest token and ignores the filters."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    min_p: float = 0.0  # 0: all
    repetition_penalty: float = 1.0  # 1: none
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top-k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top-p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min-p", self.min_p, "from 0 to 1")
        penalty = self.repetition_penalty
        _require(0 < penalty < float("inf"), "repetition-penalty", penalty, "above 0; 1 is none")


def _require(is_true: bool, name: str, value: float, meaning: str) -> None:
    if not is_true:
        what, fix = f"cannot sample with `{name}` {value}", f"pass `--{name}` {meaning}"
        raise UsageError(what, why=f"it must be {meaning}", fix=fix)


def penalize_repetition(logits_V: Tensor, is_seen_V: Tensor, penalty: float) -> Tensor:
    """Make every token seen before less likely (penalty > 1), however often it was seen."""
    # Dividing a negative logit would raise it.
    damped_V = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return torch.where(is_seen_V, damped_V, logits_V)


def keep_top_k(logits_V: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` largest logits and what ties with the last of them."""
    threshold = logits_V.topk(min(top_k, logits_V.shape[-1])).values[..., -1:]
    return logits_V.masked_fill(logits_V < threshold, -torch.inf)


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens until their probabilities sum to `top_p`; at least one."""
    probs_V = logits_V.softmax(-1)
    # Nearly always a few hundred candidates are enough; sorting 200k ids costs 10 ms a token.
    vocab_size = probs_V.shape[-1]
    num_candidates = min(256, vocab_size)
    while True:
        top, ids = probs_V.topk(num_candidates)
        before = top.cumsum(-1) - top
        if num_candidates == vocab_size or float(before[..., -1].min()) >= top_p:
            break
        num_candidates = min(16 * num_candidates, vocab_size)
    is_kept = before < top_p
    is_kept[..., 0] = True
    kept = logits_V.gather(-1, ids).masked_fill(~is_kept, -torch.inf)
    return torch.full_like(logits_V, -torch.inf).scatter(-1, ids, kept)


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest."""
    probs_V = logits_V.softmax(-1)
    return logits_V.masked_fill(probs_V < min_p * probs_V.amax(-1, keepdim=True), -torch.inf)


def shape_logits(logits_V: Tensor, is_seen_V: Tensor | None, options: SamplingOptions) -> Tensor:
    """Apply penalty, temperature, top-k, top-p and min-p, in this order (that of transformers)."""
    if is_seen_V is not None:
        logits_V = penalize_repetition(logits_V, is_seen_V, options.repetition_penalty)
    if options.temperature == 0:
        return logits_V
    scaled_V = logits_V / options.temperature
    is_finite = scaled_V.amax(-1, keepdim=True).isfinite()
    if not bool(is_finite.all()):  # a tiny temperature; of infinities no softmax is
        below_V = (logits_V - logits_V.amax(-1, keepdim=True)) / options.temperature
        scaled_V = torch.where(is_finite, scaled_V, below_V)
    logits_V = scaled_V
    if options.top_k:
        logits_V = keep_top_k(logits_V, options.top_k)
    if options.top_p < 1:
        logits_V = keep_top_p(logits_V, options.top_p)
    if options.min_p > 0:
        logits_V = keep_min_p(logits_V, options.min_p)
    return logits_V


class Sampler:
    """One request's options, its own stream of random numbers and, for the penalty, its past."""

    def __init__(
        self, options: SamplingOptions, seen: Sequence[int], never: Tensor, like_V: Tensor
    ) -> None:
        self.options, self.never = options, never  # ids that are never chosen
        self.num_ids, device = len(like_V), like_V.device
        self.generator = torch.Generator(device).manual_seed(options.seed)
        self.is_seen_V: Tensor | None = None
        if options.repetition_penalty != 1:
            self.is_seen_V = torch.zeros(like_V.shape, dtype=torch.bool, device=device)
            self.is_seen_V[torch.tensor(seen, dtype=torch.int64, device=device)] = True

    def choose(self, logits_V: Tensor) -> tuple[int, float]:
        """Draw a token; also its log-probability under the model itself, before any filter."""
        token = self.take(logits_V)
        return token, float(logits_V[token] - logits_V.logsumexp(-1))

    def take(self, logits_V: Tensor) -> int:
        """Draw a token and count it among those seen."""
        shaped_V = self.shaped(logits_V)
        if self.is_greedy:
            token = int(shaped_V.argmax())
        else:
            token = self.draw(shaped_V.softmax(-1))
        self.note(token)
        return token

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.options.temperature == 0

    def shaped(self, logits_V: Tensor) -> Tensor:
        """Logits that a draw is made from. shapes: [..., V] -> the same"""
        if len(self.never):
            logits_V = logits_V.index_fill(-1, self.never, -torch.inf)
        return shape_logits(logits_V, self.is_seen_V, self.options)

    def draw(self, probs_V: Tensor) -> int:
        """One draw from weights, which need not sum to one."""
        return int(torch.multinomial(probs_V, 1, generator=self.generator))

    def chance(self) -> float:
        """A number from 0 up to, not including, 1."""
        device = self.generator.device
        return float(torch.rand((), generator=self.generator, device=device, dtype=torch.float64))

    def note(self, token: int) -> None:
        """Count a token among those seen."""
        if self.is_seen_V is not None:
            self.is_seen_V[token] = True

    def guessing(self) -> Sampler:
        """One that draws alike for guesses: what it notes this one does not see."""
        other = copy.copy(self)
        if self.is_seen_V is not None:
            other.is_seen_V = self.is_seen_V.clone()
        return other


def choose_all(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[tuple[int, float]]:
    """`Sampler.choose` of each row; rows with the same options are filtered together."""
    groups: dict[object, list[int]] = {}
    for i, sampler in enumerate(samplers):
        is_alone = sampler.is_seen_V is not None
        alike = replace(sampler.options, seed=0)
        groups.setdefault(i if is_alone else alike, []).append(i)
    tokens = [0] * len(samplers)
    for rows in groups.values():
        first = samplers[rows[0]]
        if len(rows) == 1:
            tokens[rows[0]] = first.take(logits_BV[rows[0]])
            continue
        shaped_RV = first.shaped(logits_BV[rows])
        if first.is_greedy:
            drawn = shaped_RV.argmax(-1).tolist()
        else:  # each from its own stream of random numbers, as if it were alone
            pairs = zip(rows, shaped_RV.softmax(-1), strict=True)
            drawn = [samplers[i].draw(probs_V) for i, probs_V in pairs]
        for i, token in zip(rows, drawn, strict=True):
            tokens[i] = token
    chosen_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    logprobs = logits_BV.gather(-1, chosen_B1)[:, 0] - logits_BV.logsumexp(-1)
    return list(zip(tokens, logprobs.tolist(), strict=True))
