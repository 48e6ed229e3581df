"""A checkpoint of ours as the teacher: its answers are written side by side by the engine.

in: prompts; out: records of answers. Only text: with the same shards `l4 distill --teacher` learns
from all of its probabilities, which no record could hold
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from l4cli.checkpoint import resolve_checkpoint
from l4cli.commands import chat_model
from l4cli.commands.distill_samples import Item, Record, SamplesRequest
from l4cli.commands.needle_model import id_of_weights
from l4cli.inference import Request, SamplingOptions
from l4cli.text import render_chat

_ROWS_AT_ONCE = 16
_REQUESTS_AT_ONCE = 256  # as many as are worth sorting by what they have in common


class CheckpointTeacher:
    """A folder; its weights are loaded when there is something to ask."""

    def __init__(self, request: SamplesRequest) -> None:
        assert request.checkpoint is not None
        self.request = request
        self.folder = resolve_checkpoint(request.checkpoint)
        self.num_tokens = 0

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def kind(self) -> str:
        """How it runs, in a few words."""
        return f"a checkpoint, {self.request.device}"

    def facts(self) -> dict[str, Any]:
        """What tells it from other teachers."""
        return {"teacher": str(self.folder), "weights": id_of_weights(self.folder)}

    def report(self) -> dict[str, Any]:
        """What the run took, for the summary."""
        return {"num_tokens_used": self.num_tokens}

    def ask(
        self, items: Sequence[Item], keep: Callable[[Record], None], *, is_resumed: bool
    ) -> None:
        """Answer all, some of them at a time."""
        del is_resumed
        if not items:
            return
        model = chat_model.load(self.folder, str(self.request.device), "auto", is_raw=False)
        with chat_model.fitting_threads(model):
            for start in range(0, len(items), _REQUESTS_AT_ONCE):
                self._some(model, items[start : start + _REQUESTS_AT_ONCE], keep)

    def _some(
        self, model: chat_model.ChatModel, items: Sequence[Item], keep: Callable[[Record], None]
    ) -> None:
        requests: list[Request] = []
        asked: list[Item] = []
        for prompt, sample in items:
            chat = render_chat(model.tokenizer, prompt.messages, add_generation_prompt=True)
            if len(chat.ids) + 1 > model.engine.max_context:
                why = f"{len(chat.ids)} tokens, and the model has room for "
                why += str(model.engine.max_context)
                keep({"id": prompt.id, "sample": sample, "error": why})
                continue
            asked.append((prompt, sample))
            requests.append(self._request(model, chat.ids, sample))
        said: list[list[int]] = [[] for _ in asked]
        for event in model.engine.generate(requests, max_batch_size=_ROWS_AT_ONCE):
            tokens = said[event.request]
            if event.finish != "stop":
                tokens.append(event.token)
            if event.finish is None:
                continue
            prompt, sample = asked[event.request]
            num_prompt = len(requests[event.request].tokens)
            self.num_tokens += num_prompt + len(tokens)
            keep(
                {
                    "id": prompt.id,
                    "sample": sample,
                    "content": model.tokenizer.decode(tokens),
                    "finish": event.finish,
                    "num_tokens": len(tokens),
                    "num_prompt_tokens": num_prompt,
                }
            )

    def _request(self, model: chat_model.ChatModel, ids: np.ndarray, sample: int) -> Request:
        request = self.request
        options = SamplingOptions(
            temperature=request.sampling_temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed + sample,
        )
        return Request(
            ids.tolist(),
            max_new_tokens=request.max_new_tokens,
            stop_ids=model.stop_ids,
            sampling=options,
        )
