"""All tasks by name: what each one asks, and how to make a sample of it.

in: a task's name, a length, depths, a tokenizer, a haystack; out: a `Sample` of exactly that length
source: RULER (arXiv 2404.06654) for its thirteen; the others' are named where they are made
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from l4cli.data.longcontext import (
    aliases,
    answering,
    asked_again,
    counting,
    facts,
    reports,
    repository,
    retrieval,
    tracking,
)
from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.needles import NeedleFormat, sentence_format
from l4cli.data.longcontext.sample import Sample
from l4cli.data.longcontext.weaving import Setting
from l4cli.errors import UsageError, suggest
from l4cli.text import Tokenizer


@dataclass(frozen=True)
class Task:
    """A kind of question about a long text."""

    help: str
    generate: Callable[[Setting], Sample]
    takes_depths: bool = False  # a question at each depth; others have places of their own
    uses_format: bool = False  # whether the needle's format is the user's to choose


TASKS: dict[str, Task] = {
    "single": Task("a needle at each depth, each asked for", retrieval.single, True, True),
    "single-noise": Task("the same in one paragraph repeated", retrieval.single_noise, True, True),
    "single-uuid": Task("the same with a long value", retrieval.single_uuid, True, True),
    "multi-key": Task("the same with three more needles", retrieval.multi_key, True, True),
    "multi-key-full": Task("nothing but needles around it", retrieval.multi_key_full, True, True),
    "multi-key-uuid": Task("nothing but needles, all uuids", retrieval.multi_key_uuid, True, True),
    "multi-value": Task("four values of one key, all asked", retrieval.multi_value, False, True),
    "multi-query": Task("four keys, all asked at once", retrieval.multi_query, False, True),
    "tracking": Task("variables that get their value from one another", tracking.tracking),
    "common-words": Task("the ten most common words of a list", counting.common_words),
    "frequent-words": Task("the three most frequent coded words", counting.frequent_words),
    "qa": Task("a question one of many documents answers", answering.one_paragraph),
    "qa-hops": Task("a question that needs two documents", answering.two_paragraphs),
    "facts": Task("where somebody is, by one fact", facts.one_fact),
    "facts-2": Task("where a thing is, by two facts", facts.two_facts),
    "facts-3": Task("where a thing was before, by three facts", facts.three_facts),
    "aliases": Task("a person asked for in other words", aliases.aliases, True),
    "aliases-taught": Task("keys under their other name", aliases.taught_aliases, True, True),
    "requests": Task("the i-th of several answers to one request", asked_again.requests),
    "code": Task("what a call across four files returns", repository.code),
    "documents": Task("an answer that needs two of many reports", reports.documents),
    "activity": Task("counts and latest events of a log", reports.activity),
}

# RULER's names for its thirteen, and the tasks they are here.
RULER: dict[str, str] = {
    "niah_single_1": "single-noise",
    "niah_single_2": "single",
    "niah_single_3": "single-uuid",
    "niah_multikey_1": "multi-key",
    "niah_multikey_2": "multi-key-full",
    "niah_multikey_3": "multi-key-uuid",
    "niah_multivalue": "multi-value",
    "niah_multiquery": "multi-query",
    "vt": "tracking",
    "cwe": "common-words",
    "fwe": "frequent-words",
    "qa_1": "qa",
    "qa_2": "qa-hops",
}


def make(
    task: str,
    *,
    length: int,
    depths: Sequence[float],
    tokenizer: Tokenizer,
    haystack: Haystack,
    rng: np.random.Generator,
    fmt: NeedleFormat | None = None,
    reserve: int = 0,
    documents: Sequence[str] = (),
    repeat_keys: bool = False,
) -> Sample:
    """Make one sample; all randomness comes from `rng`.

    Text, longest question and its answer have `length - reserve` tokens, each piece encoded apart.
    raises: UsageError where the length has no room for it, L4Error where the haystack is too short
    """
    setting = Setting(
        task=task,
        length=length,
        tokenizer=tokenizer,
        haystack=haystack,
        rng=rng,
        depths=tuple(depths),
        reserve=reserve,
        fmt=fmt if fmt is not None else sentence_format(),
        documents=tuple(documents),
        repeat_keys=repeat_keys,
    )
    assert depths, "a sample needs a depth"
    assert all(0 <= depth <= 100 for depth in depths), depths
    return TASKS[task].generate(setting)


def parse_tasks(text: str) -> list[str]:
    """Read a list such as `single,multi-key`; `all` and `ruler` stand for many.

    raises: UsageError naming the task that is nearest to an unknown one
    """
    names: list[str] = []
    for name in text.split(","):
        word = name.strip()
        if word == "all":
            names += TASKS
        elif word == "ruler":
            names += RULER.values()
        elif word in TASKS or word in RULER:
            names.append(RULER.get(word, word))
        else:
            fix = suggest(word, [*TASKS, "all", "ruler"])
            raise UsageError(f"unknown task `{word}`", why="there is no task of this name", fix=fix)
    return list(dict.fromkeys(names))
