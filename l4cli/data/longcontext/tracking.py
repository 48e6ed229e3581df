"""Variables that get their value from one another, hop by hop, far apart in a text.

in: a `Setting`; out: a `Sample` whose question wants all names of a value
source: RULER (arXiv 2404.06654), task vt, by its definition: one chain of four hops, in noise
"""

from __future__ import annotations

import dataclasses
import itertools
import string

import numpy as np

from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import (
    Setting,
    Statement,
    fresh_filler,
    replace,
    weave,
)

NUM_HOPS = 4
_NAME_LETTERS = 5
_INTRO = "Variables get their values in the text below. Keep track of them.\n"


def tracking(setting: Setting) -> Sample:
    """One chain of five variables in the noise paragraph."""
    return chains(dataclasses.replace(setting, haystack=Haystack.noise()), [NUM_HOPS])


def chains(setting: Setting, num_hops: list[int]) -> Sample:
    """One chain for each number of hops; every value is asked for."""
    rng = setting.rng
    names = _names(sum(num_hops) + len(num_hops), rng)
    values = (10_000 + rng.choice(90_000, len(num_hops), replace=False)).tolist()
    statements: list[Statement] = []
    questions: list[Question] = []
    groups: list[list[int]] = []
    for hops, value in zip(num_hops, values, strict=True):
        chain, names = names[: hops + 1], names[hops + 1 :]
        texts = [f"VAR {chain[0]} = {value}."]
        texts += [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain)]
        # A variable is named only after the one it is copied from.
        depths = np.sort(rng.random(hops + 1) * 100).tolist()
        groups.append([*range(len(statements), len(statements) + hops + 1)])
        statements += [Statement(text, depth) for text, depth in zip(texts, depths, strict=True)]
        questions.append(_question(value, chain))
    room = setting.room(questions)
    woven = weave(statements, room, setting, intro=_INTRO)
    asked = [
        dataclasses.replace(question, evidence=tuple(woven.places[i] for i in group))
        for question, group in zip(questions, groups, strict=True)
    ]
    without = replace(woven.pieces, sorted(woven.places), fresh_filler(setting, room), setting)
    return Sample(setting.task, tuple(woven.pieces), tuple(asked), without)


def _question(value: int, chain: list[str]) -> Question:
    prompt = (
        f"\nWhich variables have the value {value}, directly or through another variable? "
        f"These {len(chain)} variables have the value {value}:"
    )
    return Question(prompt, tuple(f" {name}" for name in chain), Match.all, end=".")


def _names(count: int, rng: np.random.Generator) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        letters = rng.integers(26, size=_NAME_LETTERS).tolist()
        names["".join(string.ascii_uppercase[i] for i in letters)] = None
    return list(names)
