"""The parts of a server's reply beside the text: log-probabilities, and what a model thought.

in: a choice of a reply; out: `TokenLogprobs` or a text, None where the server gives none
source: the OpenAI REST API, `logprobs` of chat and of completions; vLLM and llama.cpp, which send
either shape, and `reasoning_content` or `reasoning` beside `content`

Nothing here fails: what is not of the known shapes is no log-probability.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from l4cli.text.token_logprobs import TokenLogprobs

_ESCAPED = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")  # bytes that are no text, in completions
REASONING_KEYS = ("reasoning_content", "reasoning")


def read_logprobs(choice: Mapping[str, Any]) -> TokenLogprobs | None:
    """The log-probabilities of a choice, in whichever of the two shapes they come."""
    found = choice.get("logprobs")
    if not isinstance(found, Mapping):
        return None
    try:
        if isinstance(found.get("content"), list):
            return _of_chat(found["content"])
        return _of_completions(found)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def read_reasoning(choice: Mapping[str, Any]) -> str | None:
    """What the model thought before it answered, if the server keeps it apart."""
    message = choice.get("message")
    if not isinstance(message, Mapping):
        return None
    for key in REASONING_KEYS:
        text = message.get(key)
        if isinstance(text, str) and text:
            return text
    return None


def _of_chat(content: list[Any]) -> TokenLogprobs | None:
    tokens, logprobs, tops = [], [], []
    for item in content:
        tokens.append(_token(item))
        logprobs.append(_finite(item["logprob"]))
        top = [(_token(other), _finite(other["logprob"])) for other in item["top_logprobs"] or []]
        tops.append(tuple(top))
    return TokenLogprobs(tuple(tokens), tuple(logprobs), tuple(tops)) if tokens else None


def _token(item: Mapping[str, Any]) -> bytes:
    given = item.get("bytes")
    if isinstance(given, list) and given:
        return bytes(given)
    return _spelled(item["token"])


def _of_completions(found: Mapping[str, Any]) -> TokenLogprobs | None:
    tokens = tuple(_spelled(token) for token in found["tokens"])
    logprobs = tuple(_finite(logprob) for logprob in found["token_logprobs"])
    tops = tuple(
        tuple((_spelled(token), _finite(p)) for token, p in (top or {}).items())
        for top in found.get("top_logprobs") or [{}] * len(tokens)
    )
    if not tokens or not len(tokens) == len(logprobs) == len(tops):
        return None
    return TokenLogprobs(tokens, logprobs, tops)


def _spelled(token: str) -> bytes:
    escaped = _ESCAPED.fullmatch(token)
    if escaped:
        return bytes.fromhex(escaped[1].replace("\\x", ""))
    return token.encode("utf-8", errors="surrogatepass")


def _finite(logprob: Any) -> float:
    value = float(logprob)
    if math.isnan(value) or value > 1e-3:  # rounding may leave a hair above zero
        raise ValueError
    return min(value, 0.0)
