"""Test a model with the engine: read a text once, ask everything on what was read.

in: an engine, a tokenizer, samples; out: readings

An exact answer is checked in one pass over question and answer: every token of the answer must be
the likeliest one after those before it, which is what greedy decoding would write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.evals.needle.subject import Reading, straddles
from l4cli.inference import Cache, Engine, Request
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
        context = np.concatenate([self.frame.before, ids])
        cache = None
        if len(context):  # nothing, where a question stands alone and there is no BOS
            cache = self.engine.prefill(context, on_progress=self.on_progress)
        answers = self.answers(cache, sample.questions)
        reading = self.reading(sample, answers, len(context), offsets)
        if cache is None or not cache.recall:
            return reading
        recall = {str(i): round(found.mean, 6) for i, found in cache.recall.items()}
        return replace(reading, sparse_recall=recall)

    def reading(
        self, sample: Sample, answers: list[str], num_context: int, offsets: np.ndarray
    ) -> Reading:
        """Answers, with what was read for them and how the evidence lay in it."""
        num_before = len(self.frame.before)
        return Reading(
            answers,
            num_context + max(map(self.num_asked, sample.questions)),
            [
                straddles(question, offsets, num_before, self.chunk_size)
                for question in sample.questions
            ],
        )

    def answers(self, cache: Cache | None, questions: Sequence[Question]) -> list[str]:
        """Answer questions about what was read."""
        exact = [q for q in questions if self.is_checked(q)]
        free = [q for q in questions if not self.is_checked(q)]
        answers = dict(zip(map(id, exact), self._check(cache, exact), strict=True))
        answers |= dict(zip(map(id, free), self._write(cache, free), strict=True))
        return [answers[id(question)] for question in questions]

    def is_checked(self, question: Question) -> bool:
        """Whether one pass over question and answer tells: no free speech, one right answer."""
        return question.match is Match.exact and not self.speaks_freely

    def num_asked(self, question: Question) -> int:
        """Tokens of a question and of a right answer."""
        return question.num_tokens(self.tokenizer) + len(self.frame.after)

    def asked(self, question: Question) -> np.ndarray:
        """Ids of a question and of what stands between it and the answer."""
        return np.concatenate([self.tokenizer.encode(question.prompt), self.frame.after])

    def _check(self, cache: Cache | None, questions: Sequence[Question]) -> list[str]:
        """For each the reference if greedy decoding writes it, else what it writes instead."""
        if not questions:
            return []
        asked = [self.asked(question) for question in questions]
        expected = [self.tokenizer.encode(question.answers[0]) for question in questions]
        if cache is not None:
            pairs = zip(asked, expected, strict=True)
            scored = self.engine.score_many(cache, [np.concatenate(pair) for pair in pairs])
        else:
            scored = [
                self.engine.score_many(self.engine.prefill(ids), [answer])[0]
                for ids, answer in zip(asked, expected, strict=True)
            ]
        answers = [
            self._told(question, ids, likeliest[-len(ids) :].cpu().numpy())
            for question, ids, (_, likeliest) in zip(questions, expected, scored, strict=True)
        ]
        unclear = [i for i, answer in enumerate(answers) if answer is None]
        rooms = [2 * len(expected[i]) + SPARE_ANSWER_TOKENS for i in unclear]
        written = iter(self._generate(cache, [asked[i] for i in unclear], rooms))
        return [next(written) if answer is None else answer for answer in answers]

    def _told(self, question: Question, expected: np.ndarray, said: np.ndarray) -> str | None:
        """What greedy decoding writes, from the likeliest ids at the places of the right ones.

        None: they do not tell, it must be written.
        """
        reference = question.answers[0]
        wrong = np.flatnonzero(said != expected)
        if not len(wrong):
            return reference
        # Up to the first difference the ids are those of decoding; after it they are not.
        text = self.tokenizer.decode(said[: wrong[0] + 1])
        # The same text in other tokens so far?
        is_unclear = reference.startswith(text) or text.startswith(reference)
        return None if is_unclear else text

    def _write(self, cache: Cache | None, questions: Sequence[Question]) -> list[str]:
        """Free answers, greedily."""
        rooms = [self._room(question) for question in questions]
        return self._generate(cache, [self.asked(question) for question in questions], rooms)

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
