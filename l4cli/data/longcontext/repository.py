"""A repository of small files whose functions call one another: follow a call to its number.

in: a `Setting`; out: a `Sample` whose answer stands at the end of a chain across files
"""

from __future__ import annotations

import numpy as np

from l4cli.data.longcontext.counting import distinct_names
from l4cli.data.longcontext.fitting import Built, fill, without
from l4cli.data.longcontext.needles import WordKind
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import Setting
from l4cli.data.longcontext.words import NOUNS

NUM_FILES = 4  # of the chain that is asked for
_ACTIONS = ("read", "write", "find", "load", "count", "check", "make", "fetch", "parse", "build")


def code(setting: Setting) -> Sample:
    """What a function returns that calls three others, each in a file of its own."""
    rng = setting.rng
    seed = int(rng.integers(2**62))
    modules = WordKind("words").draw_distinct(NUM_FILES, rng)
    chain, number = _chain(modules, rng)
    first, function = modules[0].replace("-", "_"), _defined(chain[0])

    def build(count: int) -> Built:
        inner = np.random.default_rng(seed)
        names = distinct_names(count, inner, modules)
        files: list[str] = []
        while len(files) < len(names):
            size = int(inner.integers(1, NUM_FILES + 2))
            files += _chain(names[len(files) : len(files) + size], inner)[0]
        files += chain
        order = inner.permutation(len(files)).tolist()
        places = [order.index(len(files) - NUM_FILES + i) for i in range(NUM_FILES)]
        return Built([files[i] for i in order], [places])

    prompt = f"\nWhat number does `{function}()` of `{first}.py` return? It returns"
    answer = f" {number}"
    built = fill(build, [Question(prompt, (answer,), Match.any)], setting)
    question = Question(prompt, (answer,), Match.any, tuple(built.evidence[0]), end=".")
    return Sample(setting.task, tuple(built.pieces), (question,), without(built, setting))


def _chain(names: list[str], rng: np.random.Generator) -> tuple[list[str], int]:
    """One file for each name: its function calls that of the next, and the last has a number."""
    modules = [name.replace("-", "_") for name in names]
    functions = [
        f"{_ACTIONS[rng.integers(len(_ACTIONS))]}_{NOUNS[rng.integers(len(NOUNS))]}"
        for _ in modules
    ]
    number = int(rng.integers(10_000, 100_000))
    files = [f"# {modules[-1]}.py\ndef {functions[-1]}():\n    return {number}\n\n"]
    for i in reversed(range(len(modules) - 1)):
        files.append(
            f"# {modules[i]}.py\nfrom {modules[i + 1]} import {functions[i + 1]}\n\n"
            f"def {functions[i]}():\n    return {functions[i + 1]}()\n\n"
        )
    return files[::-1], number


def _defined(file: str) -> str:
    return file.partition("def ")[2].partition("(")[0]
