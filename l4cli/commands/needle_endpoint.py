"""The model under test when it is behind a server: nothing of it is known but what it answers.

in: the address, a model's name, a key from the environment; out: a subject that asks there
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from l4cli import terminal
from l4cli.commands.needle_options import Request
from l4cli.errors import UsageError
from l4cli.evals.endpoint import Api, EndpointOptions, api_key_from, request_url
from l4cli.evals.endpoint_subject import CHAT_ANSWER_TOKENS, EndpointSubject, EstimatedTokenizer
from l4cli.evals.needle.subject import AnswersOnly
from l4cli.text import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TestedEndpoint:
    """A server and the name of a model there."""

    options: EndpointOptions
    tokenizer: Tokenizer
    max_tokens: int | None
    answer_tokens: int | None

    @classmethod
    def open(cls, request: Request) -> TestedEndpoint:
        """Check the words; nobody is asked yet. raises: UsageError"""
        assert request.endpoint is not None
        if request.model is None:
            why = "a server may have many models"
            raise UsageError("no model was named", why=why, fix="name one with `--model NAME`")
        api = Api(request.api.value)
        options = EndpointOptions(
            url=request_url(request.endpoint, api),
            model=request.model,
            api=api,
            api_key=api_key_from(request.api_key_env),
            num_jobs=request.jobs,
            timeout_s=request.timeout,
            seed=request.seed,
        )
        tokenizer: Tokenizer = EstimatedTokenizer()
        if request.tokenizer is not None:
            tokenizer = load_tokenizer(request.tokenizer)
        return cls(options, tokenizer, request.max_tokens, request.answer_tokens)

    @property
    def name(self) -> str:
        return self.options.model

    @property
    def kind(self) -> str:
        """How it is asked, in a few words."""
        return f"{self.options.api} at {self.options.shown_url}"

    @property
    def reserve(self) -> int:
        """Room for a chat format nobody here knows, and for a sentence around the answer."""
        if self.answer_tokens is not None:
            return self.answer_tokens
        return CHAT_ANSWER_TOKENS if self.options.api is Api.chat else 1

    def facts(self) -> dict[str, Any]:
        """What tells it from other models."""
        return {
            "model": self.options.model,
            "endpoint": self.options.shown_url,
            "tokenizer": self.tokenizer.fingerprint,
            "answer_tokens": self.answer_tokens,
        }

    def check_lengths(self, lengths: tuple[int, ...]) -> None:
        """Say what lengths mean; what the server can take it will say itself."""
        del lengths
        if isinstance(self.tokenizer, EstimatedTokenizer):
            terminal.warn(
                f"lengths are estimated at {self.tokenizer.name}; "
                "`--tokenizer` counts them with the model's own"
            )

    def weight(self, length: int) -> float:
        """What a text of this length costs beside others."""
        return float(length)

    @cached_property
    def _asked(self) -> EndpointSubject:
        return EndpointSubject(
            self.options,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            answer_tokens=self.answer_tokens,
        )

    def subject(self, longest: int) -> AnswersOnly:
        """Whoever asks the server."""
        del longest
        return AnswersOnly(self._asked)

    def report(self) -> dict[str, Any]:
        """What the run took."""
        return {"endpoint": self._asked.report()}
