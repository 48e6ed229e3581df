"""What training documents teach beside retrieval: by the generators of the tasks themselves.

in: a `Lesson`; out: `Draft`s, with as many questions as the task can ask of one text
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from l4cli.data.longcontext.aliases import NUM_ALIASES, taught_aliases
from l4cli.data.longcontext.counting import word_list
from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.lessons import Draft, Lesson, draft_of
from l4cli.data.longcontext.sample import Sample
from l4cli.data.longcontext.tracking import chains
from l4cli.data.longcontext.weaving import Setting
from l4cli.errors import UsageError

_MAX_CHAINS = 4
_MAX_HOPS = 4
_MAX_COMMON = 5


def tracking(lesson: Lesson) -> Draft:
    """Some chains of some hops in text, each asked for."""
    hops = lesson.rng.integers(1, _MAX_HOPS + 1, size=lesson.rng.integers(1, _MAX_CHAINS + 1))

    def make(size: int) -> Sample:
        return chains(_setting(lesson, "tracking"), hops[:size].tolist())

    return _largest(lesson, len(hops), make, lambda: chains(_setting(lesson, "tracking"), [1]))


def aggregation(lesson: Lesson) -> Draft:
    """Lists in which some words come often and all others seldom."""
    often, seldom = int(lesson.rng.integers(4, 11)), int(lesson.rng.integers(1, 3))

    def make(size: int, often: int = often, seldom: int = seldom) -> Sample:
        setting = _setting(lesson, "aggregation")
        return word_list(setting, size, often, seldom, with_example=False)

    most = int(lesson.rng.integers(1, _MAX_COMMON + 1))
    return _largest(lesson, most, make, lambda: make(1, 4, 1))


def aliases(lesson: Lesson) -> Draft:
    """Needles in text whose keys are asked for under their other names."""
    most = int(lesson.rng.integers(1, min(lesson.max_needles, NUM_ALIASES) + 1))

    def make(size: int) -> Sample:
        depths = tuple(np.sort(lesson.rng.random(size) * 100).tolist())
        return taught_aliases(_setting(lesson, "aliases", depths))

    return _largest(lesson, most, make, lambda: make(1))


def _setting(lesson: Lesson, task: str, depths: tuple[float, ...] = (50.0,)) -> Setting:
    return Setting(
        task=task,
        length=lesson.room,
        tokenizer=lesson.tokenizer,
        haystack=Haystack(lesson.haystack.source, repeat=True),
        rng=lesson.rng,
        depths=depths,
        fmt=lesson.fmt,
        asks_in_a_row=True,
    )


def _largest(
    lesson: Lesson, most: int, make: Callable[[int], Sample], smallest: Callable[[], Sample]
) -> Draft:
    """Ask as much as there is room for; where not even the least fits, its refusal says so."""
    while most > 0:
        try:
            return _draft(lesson, make(most))
        except UsageError:
            most //= 2
    return _draft(lesson, smallest())


def _draft(lesson: Lesson, sample: Sample) -> Draft:
    questions = [sample.questions[i] for i in lesson.rng.permutation(len(sample.questions))]
    return draft_of(sample.encode(lesson.tokenizer)[0], questions, lesson.tokenizer)
