"""The grid: which texts are read, in which order, and the loop that reads them.

in: options, a maker of samples, a subject, a store; out: one record in the store per text
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from l4cli.data.longcontext.sample import Sample
from l4cli.evals.needle.store import ResultsStore
from l4cli.evals.needle.subject import Reading, Subject, score_answer
from l4cli.evals.parallel import in_parallel

MAX_ANSWER_CHARS = 400  # of an answer, in the results


class Role(StrEnum):
    """What a text is read for: the test itself, or one of its controls."""

    test = "test"
    no_needle = "no_needle"  # the same text without what must be found
    closed_book = "closed_book"  # the questions alone
    distractors = "distractors"  # among needles that look like the one asked for


@dataclass(frozen=True)
class GridOptions:
    """What is to be read. Everything here makes the grid that one and no other."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]  # in tokens, ascending
    depths: tuple[float, ...]  # in percent, ascending
    num_samples: int = 5
    seed: int = 0
    is_separate: bool = False  # one needle a text
    has_controls: bool = True


@dataclass(frozen=True)
class Job:
    """One text to read."""

    role: Role
    task: str
    length: int
    sample: int
    depths: tuple[float, ...]  # of the needles in this text; none where a task has no depth

    @property
    def key(self) -> str:
        """Tells a finished text from the others."""
        depths = ",".join(f"{depth:g}" for depth in self.depths)
        return f"{self.role} {self.task} {self.length} {self.sample} {depths}"

    def seed(self, seed: int) -> list[int]:
        """Entropy for the random state of its sample: another one for every text.

        A text without its needle is the tested text, so the role does not count.
        """
        depths = [round(depth * 1000) for depth in self.depths] if len(self.depths) == 1 else []
        return [seed, self.length, self.sample, *self.task.encode(), *depths]


def plan_jobs(
    options: GridOptions, has_depth: Callable[[str], bool], hard_variants: dict[str, str]
) -> list[Job]:
    """Every text of the grid, short ones first, controls after what they are controls of.

    `hard_variants`: by task, the task whose haystack is needles that look like the right one.
    """
    return [job for length in options.lengths for job in _of_length(options, length, has_depth)] + [
        job for job in _distractors(options, has_depth, hard_variants)
    ]


def _of_length(
    options: GridOptions, length: int, has_depth: Callable[[str], bool]
) -> Iterator[Job]:
    for task in options.tasks:
        tests = list(_tests(options, task, length, has_depth(task)))
        yield from tests
        if not options.has_controls:
            continue
        # One text a length is enough to see what guessing brings: every depth is asked in it.
        yield from (replace(job, role=Role.no_needle) for job in tests if job.sample == 0)
        if length == options.lengths[0]:  # no text, so the length makes no difference
            yield from (replace(job, role=Role.closed_book) for job in tests)


def _tests(options: GridOptions, task: str, length: int, has_depth: bool) -> Iterator[Job]:
    depths = options.depths if has_depth else ()
    for sample in range(options.num_samples):
        if options.is_separate and depths:
            for depth in depths:
                yield Job(Role.test, task, length, sample, (depth,))
        else:
            yield Job(Role.test, task, length, sample, depths)


def _distractors(
    options: GridOptions, has_depth: Callable[[str], bool], hard_variants: dict[str, str]
) -> Iterator[Job]:
    if not options.has_controls:
        return
    for length in options.lengths:
        for task in options.tasks:
            hard = hard_variants.get(task)
            if hard is None or hard in options.tasks:  # tested anyway
                continue
            for job in _tests(options, hard, length, has_depth(hard)):
                yield replace(job, role=Role.distractors)


def as_read(job: Job, sample: Sample) -> Sample:
    """The sample as its role wants it: whole, without its evidence, or without its text."""
    if job.role is Role.closed_book:
        questions = tuple(replace(question, evidence=()) for question in sample.questions)
        return replace(sample, pieces=(), questions=questions, without_evidence=None)
    if job.role is not Role.no_needle:
        return sample
    pieces = sample.without_evidence
    if pieces is None:
        hidden = {piece for question in sample.questions for piece in question.evidence}
        pieces = tuple(text for i, text in enumerate(sample.pieces) if i not in hidden)
    questions = tuple(replace(question, evidence=()) for question in sample.questions)
    return replace(sample, pieces=pieces, questions=questions, without_evidence=None)


def run_grid(
    jobs: Sequence[Job],
    make_sample: Callable[[Job], Sample],
    subject: Subject,
    store: ResultsStore,
    *,
    num_at_once: int = 1,
    before_job: Callable[[Job], None] = lambda job: None,
    after_job: Callable[[Job], None] = lambda job: None,
) -> None:
    """Read what is not in the store yet; a text is kept as soon as its questions are answered.

    `num_at_once`: texts under way at a time, for a subject that waits for a server; they are kept
    in the order of the jobs.
    """
    missing = remaining(jobs, store.finished)
    if num_at_once == 1:
        for job in missing:
            before_job(job)
            store.append(_read(job, make_sample(job), subject))
            after_job(job)
        return
    turn = threading.Lock()  # makers of samples are made for one thread

    def read(job: Job) -> tuple[Job, dict[str, Any]]:
        with turn:
            sample = make_sample(job)
        return job, _read(job, sample, subject)

    for job, record in in_parallel(read, missing, num_at_once):
        before_job(job)
        store.append(record)
        after_job(job)


def _read(job: Job, sample: Sample, subject: Subject) -> dict[str, Any]:
    start = time.perf_counter()
    asked = as_read(job, sample)
    record = _record(job, asked, subject.read(asked), subject.speaks_freely)
    return {**record, "time_s": round(time.perf_counter() - start, 4)}


def remaining(jobs: Sequence[Job], finished: Collection[str]) -> list[Job]:
    """The jobs that are not done."""
    return [job for job in jobs if job.key not in finished]


def _record(job: Job, sample: Sample, reading: Reading, speaks_freely: bool) -> dict[str, Any]:
    answers = []
    for i, question in enumerate(sample.questions):
        answer = reading.answers[i]
        answers.append(
            {
                "depth": question.depth,
                "score": score_answer(question, answer, speaks_freely=speaks_freely),
                "straddled": reading.is_straddled[i],
                "answer": answer[:MAX_ANSWER_CHARS],
                "expected": [text[:MAX_ANSWER_CHARS] for text in question.answers],
            }
        )
    recall = {"sparse_recall": reading.sparse_recall} if reading.sparse_recall else {}
    return {
        "key": job.key,
        "role": job.role.value,
        "task": job.task,
        "length": job.length,
        "sample": job.sample,
        "num_tokens": reading.num_tokens,
        **recall,
        "answers": answers,
    }
