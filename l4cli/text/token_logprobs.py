"""What a model said, token by token: the bytes, how likely they were, and what else was likely.

in: a server's log-probabilities; out: the same as plain JSON, and back, without loss
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LEAST = -9999.0  # how servers write what JSON has no number for


@dataclass(frozen=True)
class TokenLogprobs:
    """One answer; a special token's bytes are those of its name."""

    tokens: tuple[bytes, ...]
    logprobs: tuple[float, ...]  # nats, of each token given all before it
    top: tuple[tuple[tuple[bytes, float], ...], ...]  # the likeliest tokens at each place

    def to_json(self) -> dict[str, Any]:
        """Four lists. Bytes that are not UTF-8 become lone surrogates, as in Python's files."""
        return {
            "tokens": [_text(token) for token in self.tokens],
            "logprobs": [_number(logprob) for logprob in self.logprobs],
            "top_tokens": [[_text(token) for token, _ in top] for top in self.top],
            "top_logprobs": [[_number(logprob) for _, logprob in top] for top in self.top],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TokenLogprobs:
        """What `to_json` gave. raises: KeyError, TypeError, ValueError"""
        tops = zip(fields["top_tokens"], fields["top_logprobs"], strict=True)
        found = cls(
            tuple(_bytes(token) for token in fields["tokens"]),
            tuple(float(logprob) for logprob in fields["logprobs"]),
            tuple(
                tuple((_bytes(token), float(p)) for token, p in zip(tokens, logprobs, strict=True))
                for tokens, logprobs in tops
            ),
        )
        if not len(found.tokens) == len(found.logprobs) == len(found.top):
            raise ValueError("the lists are not of one length")
        return found


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _number(logprob: float) -> float:
    """A millionth of a nat is nothing, and a line of many numbers is long."""
    return round(logprob, 6) if math.isfinite(logprob) else _LEAST
