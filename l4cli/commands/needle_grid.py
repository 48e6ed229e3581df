"""From what was asked for to texts: the grid, and the maker of its samples.

in: a request, a tokenizer; out: jobs and samples, the same ones for the same request
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l4cli.commands.longcontext_options import haystack_of, needle_format
from l4cli.commands.needle_options import Request
from l4cli.data.longcontext.sample import Sample
from l4cli.data.longcontext.tasks import TASKS, make
from l4cli.evals.needle.grid import GridOptions, Job, plan_jobs
from l4cli.text import Tokenizer

# What a model must tell apart that does more than notice what does not belong into a text.
HARD_VARIANTS = {"single": "multi-key-full"}


def grid_options(request: Request) -> GridOptions:
    """The grid that was asked for."""
    return GridOptions(
        tasks=request.task_list,
        lengths=request.length_list,
        depths=request.depth_list,
        num_samples=request.samples,
        seed=request.seed,
        is_separate=request.separate,
        has_controls=request.controls,
    )


def jobs_of(request: Request) -> list[Job]:
    """Every text to read."""
    return plan_jobs(grid_options(request), lambda task: TASKS[task].takes_depths, HARD_VARIANTS)


class SampleMaker:
    """Makes the sample of a job; `reserve` tokens are left for what the subject adds."""

    def __init__(self, request: Request, tokenizer: Tokenizer, reserve: int) -> None:
        self.seed, self.tokenizer, self.reserve = request.seed, tokenizer, reserve
        self.fmt = needle_format(request.needle, request.question, request.keys, request.values)
        self.haystack = haystack_of(request.haystack)
        self._made: dict[str, Sample] = {}
        self.documents = tuple(request.qa or ())

    def __call__(self, job: Job) -> Sample:
        """The sample; one that was made to look at it is not made again."""
        return self._made.pop(job.key, None) or self._make(job)

    def _make(self, job: Job) -> Sample:
        return make(
            job.task,
            length=job.length,
            depths=job.depths or (50.0,),
            tokenizer=self.tokenizer,
            haystack=self.haystack,
            rng=np.random.default_rng(job.seed(self.seed)),
            fmt=self.fmt,
            reserve=self.reserve,
            documents=self.documents,
            repeat_keys=True,
        )

    def check(self, jobs: Sequence[Job]) -> list[Sample]:
        """Make the shortest and the longest text of every task before a model is loaded.

        raises: L4Error where the haystack is too short or the length has no room
        """
        lengths = [job.length for job in jobs]
        ends = {min(lengths), max(lengths)} if jobs else set()
        first: dict[tuple[str, int], Job] = {}
        for job in jobs:
            if job.length in ends:
                first.setdefault((job.task, job.length), job)
        for job in first.values():
            self._made[job.key] = self(job)
        return list(self._made.values())
