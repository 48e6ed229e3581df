"""Needles: find the value that stands beside a key, among text or among other needles.

in: a `Setting`; out: `Sample`s of an exact length, with a needle at every depth that is asked for
source: RULER (arXiv 2404.06654), tasks niah_single to niah_multiquery, by their definitions
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.needles import NeedleFormat, sentence_format
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import (
    Setting,
    Statement,
    fresh_filler,
    odd_filler,
    replace,
    weave,
)
from l4cli.errors import L4Error

NUM_KEYS = 4  # of `multi-key` and `multi-query`, and values of `multi-value`
_NUM_DEPTHS = 40  # RULER's grid for needles whose depth is random
_MAX_TRIES = 16


def single(setting: Setting) -> Sample:
    """One needle at each depth, each asked for on its own."""
    return _with_distractors(setting, 0)


def single_noise(setting: Setting) -> Sample:
    """`single` in RULER's noise paragraph."""
    return single(dataclasses.replace(setting, haystack=Haystack.noise()))


def single_uuid(setting: Setting) -> Sample:
    """`single` with a long value."""
    return single(dataclasses.replace(setting, fmt=_with_kinds(setting.fmt, None, "uuid")))


def multi_key(setting: Setting) -> Sample:
    """`single` with three more needles that nobody asks for."""
    return _with_distractors(setting, NUM_KEYS - 1)


def _with_kinds(fmt: NeedleFormat, keys: str | None, values: str) -> NeedleFormat:
    """Other kinds of keys and values; a usual sentence then speaks of uuids."""
    usual = sentence_format(keys or str(fmt.keys), values)
    if fmt == sentence_format(str(fmt.keys), str(fmt.values)):
        return usual
    return dataclasses.replace(fmt, keys=usual.keys, values=usual.values)


def _random_depths(count: int, rng: np.random.Generator) -> list[float]:
    grid = np.linspace(0, 100, _NUM_DEPTHS).round()
    return [float(depth) for depth in rng.choice(grid, count, replace=count > len(grid))]


def _with_distractors(setting: Setting, num_distractors: int) -> Sample:
    fmt, rng, depths = setting.fmt, setting.rng, setting.depths
    count = len(depths) + num_distractors
    keys, values = fmt.keys.draw_distinct(count, rng), fmt.values.draw(count, rng)
    questions = [
        Question(fmt.ask(key), (fmt.lead + value,), depth=float(depth), end=fmt.end)
        for key, value, depth in zip(keys, values, depths, strict=False)
    ]
    all_depths = [*depths, *_random_depths(num_distractors, rng)]
    asked = [[i] for i in range(len(depths))]
    return asked_sample(setting, keys, values, all_depths, questions, asked)


def multi_value(setting: Setting) -> Sample:
    """Four needles with one key; all values are asked for."""
    fmt, rng = setting.fmt, setting.rng
    (key,) = fmt.keys.draw_distinct(1, rng)
    values = fmt.values.draw_distinct(NUM_KEYS, rng)
    prompt = fmt.ask_many([key]) or fmt.ask(key)
    question = _question_of_many(fmt, prompt, [key] * NUM_KEYS, values)
    depths = _random_depths(NUM_KEYS, rng)
    return asked_sample(setting, [key] * NUM_KEYS, values, depths, [question], [[*range(NUM_KEYS)]])


def multi_query(setting: Setting) -> Sample:
    """Four needles; the values of all of them are asked for at once.

    A format without a question for several keys asks one after the other.
    """
    fmt, rng = setting.fmt, setting.rng
    keys = fmt.keys.draw_distinct(NUM_KEYS, rng)
    values = fmt.values.draw_distinct(NUM_KEYS, rng)
    depths = _random_depths(NUM_KEYS, rng)
    prompt = fmt.ask_many(keys)
    if prompt is not None:
        question = _question_of_many(fmt, prompt, keys, values)
        return asked_sample(setting, keys, values, depths, [question], [[*range(NUM_KEYS)]])
    questions = [
        Question(fmt.ask(key), (fmt.lead + value,), end=fmt.end)
        for key, value in zip(keys, values, strict=True)
    ]
    return asked_sample(setting, keys, values, depths, questions, [[i] for i in range(NUM_KEYS)])


def _question_of_many(
    fmt: NeedleFormat, prompt: str, keys: Sequence[str], values: Sequence[str]
) -> Question:
    """Ask for all values; a format of marks answers as it would go on: value, mark, value."""
    between = ", " if fmt.question_many is not None else fmt.end + fmt.ask(keys[0])
    answers = tuple(fmt.lead + value for value in values)
    return Question(prompt, answers, Match.all, end=fmt.end, between=between)


def asked_sample(
    setting: Setting,
    keys: Sequence[str],
    values: Sequence[str],
    depths: Sequence[float],
    questions: Sequence[Question],
    asked: Sequence[Sequence[int]],  # the needles of each question
) -> Sample:
    """Weave needles into the haystack, and look that it has none of them already."""
    fmt = setting.fmt
    needles = [
        Statement(fmt.write(key, value), depth, fmt.is_sentence)
        for key, value, depth in zip(keys, values, depths, strict=True)
    ]
    room = setting.room(questions)
    signs = {fmt.sign(key) for key in keys}
    for _ in range(_MAX_TRIES):
        woven = weave(needles, room, setting, intro=fmt.intro)
        sought = sorted({woven.places[i] for numbers in asked for i in numbers})
        without = replace(woven.pieces, sought, fresh_filler(setting, room), setting)
        kept = set(woven.places) - set(sought)
        filler = "\0".join(piece for i, piece in enumerate(without) if i not in kept)
        if not any(sign in filler for sign in signs):
            break
    else:
        raise L4Error(
            f"the haystack {setting.haystack.name} is full of needles",
            why=f"it holds `{sorted(signs)[0]}` or the like wherever it is opened",
            fix="use another haystack, or longer keys: `--keys letters:4`",
        )
    placed = [
        dataclasses.replace(question, evidence=tuple(woven.places[i] for i in numbers))
        for question, numbers in zip(questions, asked, strict=True)
    ]
    return Sample(setting.task, tuple(woven.pieces), tuple(placed), without)


def multi_key_full(setting: Setting) -> Sample:
    """Nothing but needles, all alike; those at the depths are asked for."""
    return _Full(setting).sample()


def multi_key_uuid(setting: Setting) -> Sample:
    """`multi-key-full` with uuids for keys and values."""
    return multi_key_full(
        dataclasses.replace(setting, fmt=_with_kinds(setting.fmt, "uuid", "uuid"))
    )


class _Full:
    """A text of needles: those nobody asks for stand in runs between those that are asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.fmt, self.rng = setting, setting.fmt, setting.rng
        depths, fmt = setting.depths, setting.fmt
        self.keys = self.fmt.keys.draw_distinct(len(depths), self.rng)
        values = self.fmt.values.draw(len(depths), self.rng)
        self.asked = self._written(self.keys, values)
        self.questions = [
            Question(fmt.ask(key), (fmt.lead + value,), depth=float(depth), end=fmt.end)
            for key, value, depth in zip(self.keys, values, depths, strict=True)
        ]
        fixed = sum(map(setting.count, [self.fmt.intro, *self.asked]))
        self.room = setting.room(self.questions) - fixed
        if self.room < 0:
            setting.refuse(setting.question_tokens(self.questions) + fixed)
        self.order = sorted(range(len(depths)), key=lambda i: depths[i])

    def _written(self, keys: Sequence[str], values: Sequence[str]) -> list[str]:
        close = "\n" if self.fmt.is_sentence else ""
        return [self.fmt.write(key, value) + close for key, value in zip(keys, values, strict=True)]

    def sample(self) -> Sample:
        runs, notes = self._fitting_runs()
        left = self.room - sum(map(self.setting.count, runs))
        rest = odd_filler(left, self.setting) if left else ""
        pieces = [piece for piece in (self.fmt.intro, rest, runs[0]) if piece]
        places = {}
        for i, run in zip(self.order, runs[1:], strict=True):
            places[i] = len(pieces)
            pieces += [self.asked[i], run] if run else [self.asked[i]]
        without = list(pieces)
        for i, place in places.items():
            without[place] = self._other(self.asked[i])
        questions = [
            dataclasses.replace(question, evidence=(places[i],))
            for i, question in enumerate(self.questions)
        ]
        task = self.setting.task
        return Sample(task, tuple(pieces), tuple(questions), tuple(without), notes)

    def _fitting_runs(self) -> tuple[list[str], dict[str, str]]:
        """Write as many needles as fit, in runs before, between and after those asked for."""
        count = self.setting.count
        size = count("".join(self._others(64))) / 64
        needles = self._others(int(self.room / size))
        runs = self._runs(needles)
        for _ in range(_MAX_TRIES):
            left = self.room - sum(map(count, runs))
            if 0 <= left < size:
                break
            # Too many by one if need be: what is over is dropped, what is missing is drawn.
            change = int(left // size)
            if change < 0:
                needles = needles[:change]
            else:
                needles = self._others(len(needles) + change)
            runs = self._runs(needles)
        while sum(map(count, runs)) > self.room:
            needles = needles[:-1]
            runs = self._runs(needles)
        return runs, {"needles": str(len(needles) + len(self.asked))}

    def _others(self, num_needles: int) -> list[str]:
        """Needles nobody asks for, whose keys differ from those that are and from each other."""
        fmt, rng = self.fmt, self.rng
        left = fmt.keys.num_values - len(self.keys)
        if self.setting.repeat_keys and num_needles > left:
            if left < 1:
                fmt.keys.draw_distinct(1, rng, self.keys)  # refuses
            known = set(self.keys)
            keys: list[str] = []
            while len(keys) < num_needles:
                drawn = fmt.keys.draw(num_needles - len(keys), rng)
                keys += [key for key in drawn if key not in known]
        else:
            keys = fmt.keys.draw_distinct(num_needles, rng, self.keys)
        return self._written(keys, fmt.values.draw(num_needles, rng))

    def _runs(self, needles: list[str]) -> list[str]:
        depths = [self.setting.depths[i] for i in self.order]
        ends = [0, *(int(len(needles) * depth / 100) for depth in depths), len(needles)]
        return ["".join(needles[a:b]) for a, b in itertools.pairwise(ends)]

    def _other(self, needle: str) -> str:
        """Another needle of the same length, or else filler."""
        size = self.setting.count(needle)
        known = set(self.keys)
        for _ in range(_MAX_TRIES):
            drawn = self.fmt.keys.draw(_MAX_TRIES, self.rng)
            keys = [key for key in drawn if key not in known]
            for text in self._written(keys, self.fmt.values.draw(len(keys), self.rng)):
                if self.setting.count(text) == size:
                    return text
        return fresh_filler(self.setting, size).take(size)
