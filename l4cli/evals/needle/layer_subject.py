"""Test a model layer by layer: texts beyond memory, checked answers only.

in: an engine, a tokenizer, samples; out: readings, the same as of `EngineSubject`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from l4cli.data.longcontext.sample import Question, Sample
from l4cli.evals.needle.engine_subject import EngineSubject
from l4cli.evals.needle.subject import Reading
from l4cli.inference import Engine
from l4cli.text import Tokenizer


class LayerSubject(EngineSubject):
    """A model of which one layer is held at a time; text and questions are read together."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        hidden_store: str | Path = "memory",
        weights: Path | None = None,
    ) -> None:
        """`hidden_store`: "memory" or a file to be made; `weights`: where layers come from."""
        super().__init__(engine, tokenizer)
        self.hidden_store, self.weights = hidden_store, weights

    def read(self, sample: Sample) -> Reading:
        """Read the text with all its questions behind it."""
        ids, offsets = sample.encode(self.tokenizer)
        context = np.concatenate([self.frame.before, ids])
        return self.reading(sample, self._read(context, sample.questions), len(context), offsets)

    def _read(self, context: np.ndarray, questions: Sequence[Question]) -> list[str]:
        assert all(map(self.is_checked, questions)), "nothing can be written after such a reading"
        asked = [self.asked(question) for question in questions]
        expected = [self.tokenizer.encode(question.answers[0]) for question in questions]
        if len(context):
            pairs = zip(asked, expected, strict=True)
            scored = self._score(context, [np.concatenate(pair) for pair in pairs])
        else:  # a question alone, where there is no BOS either
            pairs = zip(asked, expected, strict=True)
            scored = [self._score(ids, [answer])[0] for ids, answer in pairs]
        return [
            self._text(question, ids, likeliest[-len(ids) :].cpu().numpy())
            for question, ids, (_, likeliest) in zip(questions, expected, scored, strict=True)
        ]

    def _score(
        self, context: np.ndarray, continuations: Sequence[np.ndarray]
    ) -> list[tuple[Tensor, Tensor]]:
        def tell(done: int, total: int) -> None:
            if self.on_progress is not None:
                self.on_progress(len(context) * done // total)

        return self.engine.read_layer_major(
            context,
            continuations,
            hidden_store=self.hidden_store,
            weights=self.weights,
            on_progress=tell,
        )

    def _text(self, question: Question, expected: np.ndarray, said: np.ndarray) -> str:
        """What greedy decoding writes, up to its first difference from what is right."""
        wrong = np.flatnonzero(said != expected)
        if not len(wrong):
            return question.answers[0]
        text = self.tokenizer.decode(said[: wrong[0] + 1])
        # The same text in other tokens cannot be followed here: it counts as wrong.
        return "" if text.startswith(question.answers[0]) else text
