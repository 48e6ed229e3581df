"""A model behind a server as the subject of a needle test: every question is one request.

in: samples; out: the answers to their questions, in order
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.evals.endpoint import Api, Endpoint, EndpointOptions
from l4cli.evals.parallel import in_parallel
from l4cli.evals.token_budget import BYTES_PER_TOKEN, TokenBudget
from l4cli.text.tokenizer import Definition, Ids, Tokenizer

CHAT_ANSWER_TOKENS = 64  # room for a sentence around what is asked for
SPARE_ANSWER_TOKENS = 16
_FRAME_TOKENS = 16  # what a chat format adds around a prompt, about


class EndpointSubject:
    """Asks a server; several threads may ask at once, `num_jobs` requests run at a time."""

    def __init__(
        self,
        options: EndpointOptions,
        *,
        tokenizer: Tokenizer | None = None,
        max_tokens: int | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        """`max_tokens`: of the whole run. `answer_tokens`: of one answer, None: by question."""
        is_estimated = tokenizer is None or isinstance(tokenizer, EstimatedTokenizer)
        self.tokenizer = tokenizer or EstimatedTokenizer()
        self.budget = TokenBudget(max_tokens, is_exact=not is_estimated)
        self.endpoint = Endpoint(options)
        self.options, self.answer_tokens = options, answer_tokens
        # A completion goes on where the question ends; a chat model answers in a sentence.
        self.speaks_freely = options.api is Api.chat
        self.counting = f"{BYTES_PER_TOKEN} bytes a token, an estimate"
        if not is_estimated:
            self.counting = f"the tokenizer `{self.tokenizer.name}`"

    def ask(self, sample: Sample) -> list[str]:
        """Answer the questions of a sample, all or none of them within the budget.

        raises: L4Error when the server cannot be asked, or not any more
        """
        context = sample.text
        num_context = self._count(context) + _FRAME_TOKENS
        rooms = [self.answer_tokens or self._room(question) for question in sample.questions]
        promises = self.budget.promise(
            [
                (num_context + self._count(question.prompt), room)
                for question, room in zip(sample.questions, rooms, strict=True)
            ]
        )

        def answer(i: int) -> str:
            prompt = context + sample.questions[i].prompt
            return self.endpoint.complete(prompt, rooms[i], promises[i]).text

        try:
            numbers, num_jobs = range(len(rooms)), self.options.num_jobs
            return list(in_parallel(answer, numbers, num_jobs, on_failure=self.endpoint.stop))
        finally:
            for promise in promises:
                promise.release()

    def report(self) -> dict[str, Any]:
        """What the run took, for the summary."""
        return {
            "num_requests": self.endpoint.num_requests,
            "num_retries": self.endpoint.num_retries,
            "num_tokens_used": self.budget.num_used,
            "tokens_counted_with": self.counting,
        }

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _room(self, question: Question) -> int:
        """Tokens an answer may take: twice what is right, and in a conversation a sentence more."""
        # Digits and letters without sense take more tokens than an estimate by bytes says.
        counts = [max(self._count(text), len(text.encode()) // 2) for text in question.answers]
        wanted = sum(counts) if question.match is Match.all else max(counts, default=0)
        extra = CHAT_ANSWER_TOKENS if self.speaks_freely else SPARE_ANSWER_TOKENS
        return 2 * wanted + extra


class EstimatedTokenizer(Tokenizer):
    """Stands in where nobody knows the server's vocabulary: four bytes are a token.

    Good for lengths of about so many tokens of English; whoever reports them says so.
    """

    def __init__(self) -> None:
        name = f"{BYTES_PER_TOKEN} bytes a token"
        super().__init__(
            Definition(
                name=name,
                tokens=(),
                special_tokens={},
                fingerprint=name,
                backend=_FourBytes(),
                backend_reason="no tokenizer was given",
                files=dict,
                byte_ids=None,
                is_divisible=False,
            )
        )
        self.vocab_size = 1 << (8 * BYTES_PER_TOKEN)

    def decode(self, ids: Ids) -> str:
        """Give the text of ids; a character that is cut in two is left out."""
        data = np.asarray(ids, dtype="<u4").tobytes()
        return data.rstrip(b"\0").decode(errors="ignore")


class _FourBytes:
    """Ids that are the bytes themselves, the last one filled up with zeros."""

    name = "estimate"

    def encode(self, text: str) -> np.ndarray:
        data = text.encode()
        padded = data.ljust(math.ceil(len(data) / BYTES_PER_TOKEN) * BYTES_PER_TOKEN, b"\0")
        return np.frombuffer(padded, dtype="<u4").astype(np.uint32)
