"""Models that answer plain prompts: one in this process, or one behind a server.

in: prompts; out: what was said, in order
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l4cli.evals.endpoint import Endpoint, EndpointOptions
from l4cli.evals.endpoint_subject import EstimatedTokenizer
from l4cli.evals.parallel import in_parallel
from l4cli.evals.token_budget import TokenBudget
from l4cli.inference import Engine, Request
from l4cli.text import Tokenizer, render_chat

_FRAME_TOKENS = 16  # what a chat format adds around a prompt, about


class EngineAsker:
    """A checkpoint, asked in its chat format or, without one, as text to go on with; greedily."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, is_chat: bool) -> None:
        self.engine, self.tokenizer, self.is_chat = engine, tokenizer, is_chat

    def ask(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Answer all prompts at once."""
        requests = [
            Request(self._ids(prompt), max_new_tokens=max_tokens, stop_ids=self.tokenizer.stop_ids)
            for prompt in prompts
        ]
        said: list[list[int]] = [[] for _ in prompts]
        for event in self.engine.generate(requests):
            if event.finish != "stop":
                said[event.request].append(event.token)
        return [self.tokenizer.decode(ids) for ids in said]

    def _ids(self, prompt: str) -> np.ndarray:
        if self.is_chat:
            messages = [{"role": "user", "content": prompt}]
            return render_chat(self.tokenizer, messages, add_generation_prompt=True).ids
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return np.concatenate([np.array(begin, np.uint32), self.tokenizer.encode(prompt)])


class ServerAsker:
    """A server, asked in parallel and within a budget of tokens."""

    def __init__(self, options: EndpointOptions, max_tokens: int | None) -> None:
        self.endpoint = Endpoint(options)
        self.budget = TokenBudget(max_tokens, is_exact=False)
        self._counter = EstimatedTokenizer()

    def ask(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Answer all prompts, or none within the budget. raises: L4Error"""
        counts = [len(self._counter.encode(prompt)) + _FRAME_TOKENS for prompt in prompts]
        promises = self.budget.promise([(count, max_tokens) for count in counts])

        def answer(i: int) -> str:
            return self.endpoint.complete(prompts[i], max_tokens, promises[i]).text

        try:
            num_jobs = self.endpoint.options.num_jobs
            numbers = range(len(prompts))
            return list(in_parallel(answer, numbers, num_jobs, on_failure=self.endpoint.stop))
        finally:
            for promise in promises:
                promise.release()
