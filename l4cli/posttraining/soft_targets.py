"""A teacher's top log-probabilities as targets in our vocabulary, where both cut a text alike.

in: a rendered chat and what the teacher's server said of its answer, token by token; out: for
each target a few ids and their probabilities

The teacher's tokens and ours are matched by their bytes, never by their numbers. A server shows
its likeliest tokens only: what is shown is scaled to a sum of 1, so that the rest of the
vocabulary counts as impossible, and entropies come out a little too small.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from l4cli.text import ChatTokens, Tokenizer
from l4cli.text.token_logprobs import TokenLogprobs


@dataclass(frozen=True)
class SoftTargets:
    """The targets of one document that are known softly; column 0 is the token itself."""

    positions_M: np.ndarray  # int64, in the document's ids, rising
    ids_MK: np.ndarray  # int32; 0 with probability 0 is an unused column
    probabilities_MK: np.ndarray  # float32, the others likeliest first; a row adds up to 1
    shown_M: np.ndarray  # float64, what the row added up to before


class TokenMatcher:
    """Finds a teacher's tokens in our vocabulary."""

    def __init__(self, tokenizer: Tokenizer, num_columns: int) -> None:
        assert num_columns >= 2
        self.tokenizer, self.num_columns = tokenizer, num_columns
        self._ids: dict[bytes, int] = {}
        for i in range(tokenizer.vocab_size):
            self._ids.setdefault(tokenizer.token_bytes(i), i)
        self._ids.pop(b"", None)
        self._ids |= {name.encode(): i for name, i in tokenizer.special_tokens.items()}

    def match(self, chat: ChatTokens, content: str, said: TokenLogprobs) -> SoftTargets | None:
        """The targets of the last answer, or None where its tokens are not the teacher's.

        `content` is the end of that answer, as the teacher wrote it.
        """
        spoken = self._spoken(chat, content.encode(errors="surrogatepass"))
        if spoken is None:
            return None
        places, ours = spoken
        first = _find(said.tokens, ours)
        if first is None:
            return None
        end = first + len(ours)
        ids: Mapping[bytes, int] = self._ids
        if end < len(said.tokens):
            # One more token: what this teacher ends its turn with, whatever its name.
            places = [*places, len(chat.ids) - 1]
            ids = ChainMap({said.tokens[end]: int(chat.ids[-1])}, self._ids)
        rows = [
            self._row(int(chat.ids[place]), said, at, ids) for at, place in enumerate(places, first)
        ]
        columns, probabilities, shown = zip(*rows, strict=True)
        return SoftTargets(
            np.array(places, np.int64), np.stack(columns), np.stack(probabilities), np.array(shown)
        )

    def _spoken(self, chat: ChatTokens, content: bytes) -> tuple[list[int], list[bytes]] | None:
        """Where the tokens of `content` stand, and their bytes; None if they do not begin with it.

        The end of the turn is a target too, but no part of the text.
        """
        end = len(chat.ids) - 1
        places: list[int] = []
        missing = len(content)
        while missing > 0 and end > len(places):
            place = end - 1 - len(places)
            if not chat.loss_mask[place]:
                return None
            places.append(place)
            missing -= len(self.tokenizer.token_bytes(int(chat.ids[place])))
        if missing != 0 or not places:
            return None
        places.reverse()
        return places, [self.tokenizer.token_bytes(int(chat.ids[place])) for place in places]

    def _row(
        self, label: int, said: TokenLogprobs, at: int, known: Mapping[bytes, int]
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """One target: the label, then the likeliest others that we have a token for."""
        written = said.tokens[at]
        found: dict[int, float] = {label: float(np.exp(said.logprobs[at]))}
        others = sorted(said.top[at], key=lambda item: -item[1])
        for token, logprob in others:
            if token == written:
                continue
            token_id = known.get(token)
            if token_id is not None and token_id not in found and len(found) < self.num_columns:
                found[token_id] = float(np.exp(logprob))
        ids = np.zeros(self.num_columns, np.int32)
        probabilities = np.zeros(self.num_columns)
        ids[: len(found)] = list(found)
        probabilities[: len(found)] = list(found.values())
        probabilities[0] = max(probabilities[0], 1e-9)  # drawn, so not impossible
        shown = float(probabilities.sum())
        return ids, (probabilities / shown).astype(np.float32), min(1.0, shown)


def _find(tokens: tuple[bytes, ...], ours: list[bytes]) -> int | None:
    """Where our tokens stand at the end of the teacher's, before at most one more."""
    for num_after in (0, 1):
        first = len(tokens) - num_after - len(ours)
        if first >= 0 and list(tokens[first : first + len(ours)]) == ours:
            return first
    return None


def entropies(probabilities_MK: np.ndarray) -> np.ndarray:
    """Entropy of each row in nats, float64."""
    p_MK = probabilities_MK.astype(np.float64)
    return np.maximum(0.0, -(p_MK * np.log(np.where(p_MK > 0, p_MK, 1.0))).sum(1))
