"""A teacher behind a server: one request is one answer, many are under way.

in: prompts; out: records of answers, each kept as soon as it is paid for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from l4cli.commands.distill_samples import Item, Record, SamplesRequest
from l4cli.evals.endpoint import (
    Answer,
    Api,
    Ask,
    Endpoint,
    EndpointOptions,
    RequestRefused,
    api_key_from,
    request_url,
)
from l4cli.evals.parallel import in_parallel
from l4cli.evals.token_budget import BYTES_PER_TOKEN, TokenBudget
from l4cli.posttraining.prompts import Prompt

_FRAME_TOKENS = 16  # what a chat format adds around a message, about


class EndpointTeacher:
    """A server and the name of a model there; nobody is asked before `ask`."""

    def __init__(self, request: SamplesRequest) -> None:
        """raises: UsageError for an address or a key that cannot be used"""
        assert request.endpoint is not None
        assert request.model is not None
        api = Api(request.api.value)
        self.request = request
        self.options = EndpointOptions(
            url=request_url(request.endpoint, api),
            model=request.model,
            api=api,
            api_key=api_key_from(request.api_key_env),
            num_jobs=request.jobs,
            timeout_s=request.timeout,
            max_tries=request.max_tries,
            seed=request.seed,
        )
        self.endpoint = Endpoint(self.options)
        self.budget = TokenBudget(request.max_tokens, is_exact=False)

    @property
    def name(self) -> str:
        return self.options.model

    @property
    def kind(self) -> str:
        """How it is asked, in a few words."""
        return f"{self.options.api} at {self.options.shown_url}"

    def facts(self) -> dict[str, Any]:
        """What tells it from other teachers."""
        return {
            "teacher": self.options.model,
            "endpoint": self.options.shown_url,
            "api": str(self.options.api),
        }

    def ask(
        self, items: Sequence[Item], keep: Callable[[Record], None], *, is_resumed: bool
    ) -> None:
        """Answer all, `--jobs` at a time."""
        self.endpoint.was_answered = is_resumed

        def answer(item: Item) -> None:
            keep(self._answer(*item))

        jobs = self.request.jobs
        for _ in in_parallel(answer, items, jobs, on_failure=self.endpoint.stop):
            pass

    def report(self) -> dict[str, Any]:
        """What the run took, for the summary."""
        return {
            "num_requests": self.endpoint.num_requests,
            "num_retries": self.endpoint.num_retries,
            "num_tokens_used": self.budget.num_used,
        }

    def _answer(self, prompt: Prompt, sample: int) -> Record:
        request = self.request
        is_chat = self.options.api is Api.chat
        ask = Ask(
            prompt.messages if is_chat else str(prompt.text),
            request.max_new_tokens,
            temperature=request.sampling_temperature,
            top_p=request.top_p,
            seed=request.seed + sample,
            top_logprobs=request.num_top_logprobs,
        )
        (promise,) = self.budget.promise([(_num_tokens(prompt), request.max_new_tokens)])
        try:
            answer = self.endpoint.ask(ask, promise, may_refuse=True)
        except RequestRefused as error:
            if self.endpoint.is_stopped:
                raise
            return {"id": prompt.id, "sample": sample, "error": error.why}
        finally:
            promise.release()
        return _record(prompt, sample, answer)


def _record(prompt: Prompt, sample: int, answer: Answer) -> Record:
    record: Record = {
        "id": prompt.id,
        "sample": sample,
        "content": answer.text,
        "finish": answer.finish,
        "num_tokens": answer.answer_tokens,
        "num_prompt_tokens": answer.prompt_tokens,
    }
    if answer.reasoning is not None:
        record["reasoning"] = answer.reasoning
    if answer.logprobs is not None:
        record["logprobs"] = answer.logprobs.to_json()
    return record


def _num_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt takes."""
    texts = [str(message["content"]) for message in prompt.messages]
    return sum(len(text.encode()) // BYTES_PER_TOKEN + _FRAME_TOKENS for text in texts)
