"""Test a model with the engine: read a text once, ask everything on what was read.

in: an engine, a tokenizer, samples; out: readings

An exact answer is checked in one pass over question and answer: every token of the answer must be
the likeliest one after those before it, which is what greedy decoding would write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.evals.needle.subject import Reading, straddles
from l4cli.inference import Cache, Engine, Request
from l4cli.ops.batch import Batch
from l4cli.text import Tokenizer, render_chat

CHAT_ANSWER_TOKENS = 64  # room for a sentence around what is asked for
SPARE_ANSWER_TOKENS = 16  # beyond twice the reference, where answers are written freely


@dataclass(frozen=True)
class Frame:
    """Ids around a text and its question: BOS alone, or the turns of a conversation."""

    before: np.ndarray
    after: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.before) + len(self.after)

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, is_chat: bool) -> Frame:
        """raises: L4Error where the tokenizer knows no chat format"""
        if not is_chat:
            bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            return cls(np.array(bos, np.uint32), np.zeros(0, np.uint32))
        messages = [{"role": "user", "content": ""}]
        ids = render_chat(tokenizer, messages, add_generation_prompt=True).ids
        end_of_turn = int(np.argmax(ids == tokenizer.eot_id))
        return cls(ids[:end_of_turn], ids[end_of_turn:])


class EngineSubject:
    """A model in this process."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        is_chat: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.speaks_freely = is_chat
        self.frame = Frame.of(tokenizer, is_chat=is_chat)
        self.chunk_size = engine.config.text.attention_chunk_size
        self.on_progress = on_progress

    def read(self, sample: Sample) -> Reading:
        """Read the text, then ask each question on a fork of what was read."""
        ids, offsets = sample.encode(self.tokenizer)
        num_before = len(self.frame.before)
        context = np.concatenate([self.frame.before, ids])
        cache = None
        if len(context):  # nothing, where a question stands alone and there is no BOS
            cache = self.engine.prefill(context, on_progress=self.on_progress)
        answers = [""] * len(sample.questions)
        exact = [] if self.speaks_freely else _numbers(sample.questions, Match.exact)
        for i in exact:
            answers[i] = self._exact_answer(cache, sample.questions[i])
        free = [i for i in range(len(answers)) if i not in exact]
        written = self._write(cache, [sample.questions[i] for i in free])
        for i, text in zip(free, written, strict=True):
            answers[i] = text
        return Reading(
            answers,
            len(context) + max(map(self._num_asked, sample.questions)),
            [
                straddles(question, offsets, num_before, self.chunk_size)
                for question in sample.questions
            ],
        )

    def _num_asked(self, question: Question) -> int:
        """Tokens of a question and of its longest reference."""
        answers = [len(self.tokenizer.encode(text)) for text in question.answers]
        return len(self._asked(question)) + max(answers, default=0)

    def _asked(self, question: Question) -> np.ndarray:
        return np.concatenate([self.tokenizer.encode(question.prompt), self.frame.after])

    def _exact_answer(self, cache: Cache | None, question: Question) -> str:
        """The reference if greedy decoding writes it, else what it writes up to the difference."""
        asked = self._asked(question)
        expected = self.tokenizer.encode(question.answers[0]).astype(np.int64)
        said = self._likeliest(cache, asked, expected)
        wrong = np.flatnonzero(said != expected)
        if not len(wrong):
            return question.answers[0]
        text = self.tokenizer.decode(said[: wrong[0] + 1])
        reference = question.answers[0]
        if not (reference.startswith(text) or text.startswith(reference)):
            return text
        # The same text in other tokens so far: let it be written.
        room = 2 * len(expected) + SPARE_ANSWER_TOKENS
        return self._generate(cache, [asked], [room])[0]

    @torch.inference_mode()
    def _likeliest(
        self, cache: Cache | None, asked: np.ndarray, expected: np.ndarray
    ) -> np.ndarray:
        """The likeliest id at the place of each expected one, given those before it."""
        ids = np.concatenate([asked, expected])[:-1].astype(np.int64)
        engine = self.engine
        fork = Cache(engine.config.text) if cache is None else cache.fork(1)[0]
        ids_1T = torch.from_numpy(ids)[None].to(engine.device)
        first = fork.num_tokens
        positions_1T = torch.arange(first, first + len(ids), device=engine.device)[None]
        batch = Batch.continuing(ids_1T, positions_1T)
        hidden_TD = engine.model.hidden(batch, cache=fork)[0, len(asked) - 1 :]
        logits_TV = engine.model.lm_head(hidden_TD).float()
        logits_TV[:, engine.never] = float("-inf")
        return logits_TV.argmax(-1).cpu().numpy()

    def _write(self, cache: Cache | None, questions: Sequence[Question]) -> list[str]:
        """Free answers, greedily."""
        rooms = [self._room(question) for question in questions]
        return self._generate(cache, [self._asked(question) for question in questions], rooms)

    def _room(self, question: Question) -> int:
        """Tokens an answer may take: twice what is right, and in a conversation a sentence more."""
        references = [len(self.tokenizer.encode(text)) + 2 for text in question.answers]
        wanted = sum(references) if question.match is Match.all else max(references, default=0)
        extra = CHAT_ANSWER_TOKENS if self.speaks_freely else SPARE_ANSWER_TOKENS
        return 2 * wanted + extra

    def _generate(
        self, cache: Cache | None, asked: Sequence[np.ndarray], rooms: Sequence[int]
    ) -> list[str]:
        if not asked:
            return []
        forks: list[Cache | None] = [None] * len(asked)
        if cache is not None:
            forks = list(cache.fork(len(asked)))
        stop_ids = self.tokenizer.stop_ids
        requests = [
            Request(ids, max_new_tokens=room, stop_ids=stop_ids, cache=fork)
            for ids, room, fork in zip(asked, rooms, forks, strict=True)
        ]
        written: list[list[int]] = [[] for _ in requests]
        for event in self.engine.generate(requests):
            if event.finish != "stop":
                written[event.request].append(event.token)
        return [self.tokenizer.decode(ids) for ids in written]


def _numbers(questions: Sequence[Question], match: Match) -> list[int]:
    return [i for i, question in enumerate(questions) if question.match is match]
