"""Questions that share no word with what answers them.

in: a `Setting`; out: `Sample`s that need what everybody knows, or a table taught in training
source: NoLiMa (arXiv 2502.05167) for the idea; associations and texts are our own
"""

from __future__ import annotations

from functools import cache

import numpy as np

from l4cli.data.longcontext.associations import ASSOCIATIONS, PEOPLE
from l4cli.data.longcontext.retrieval import asked_sample
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import (
    Setting,
    Statement,
    fresh_filler,
    replace,
    weave,
)
from l4cli.errors import UsageError

NUM_ALIASES = 64
_TABLE_SEED = 20_260_401  # of the one table that training teaches and tests ask


def aliases(setting: Setting) -> Sample:
    """A person at each depth, described in one way and asked for in another."""
    rng, depths = setting.rng, setting.depths
    most = min(len(ASSOCIATIONS), len(PEOPLE))
    if len(depths) > most:
        why = f"there are {most} things to ask about"
        raise UsageError(f"`{setting.task}` at {len(depths)} depths", why=why, fix="ask at fewer")
    # What is asked about one person must not be true of another.
    chosen: dict[str, str] = {}
    for i in rng.permutation(len(ASSOCIATIONS)).tolist():
        said, asked = ASSOCIATIONS[i]
        chosen.setdefault(asked, said)
    names = [PEOPLE[i] for i in rng.permutation(len(PEOPLE)).tolist()]
    facts = list(zip(names, chosen.items(), depths, strict=False))
    statements = [Statement(f"{name} {said}.", depth) for name, (_, said), depth in facts]
    questions = [
        Question(
            f"\nQuestion: Which person {asked}?\nAnswer: It is",
            (f" {name}",),
            Match.only,
            depth=float(depth),
            labels=PEOPLE,
            end=".",
        )
        for name, (asked, _), depth in facts
    ]
    room = setting.room(questions)
    woven = weave(statements, room, setting)
    without = replace(woven.pieces, sorted(woven.places), fresh_filler(setting, room), setting)
    placed = [
        Question(q.prompt, q.answers, q.match, (place,), q.depth, q.labels, q.end)
        for q, place in zip(questions, woven.places, strict=True)
    ]
    return Sample(setting.task, tuple(woven.pieces), tuple(placed), without)


@cache
def alias_table() -> tuple[tuple[str, str], ...]:
    """Pairs of names for the same key: how it is asked for, how the text has it. Always the same.

    Two capital letters each, so that no key of small letters is one.
    """
    numbers = np.random.default_rng(_TABLE_SEED).permutation(26 * 26)[: 2 * NUM_ALIASES].tolist()
    words = [chr(65 + i // 26) + chr(65 + i % 26) for i in numbers]
    return tuple(zip(words[::2], words[1::2], strict=True))


def taught_aliases(setting: Setting) -> Sample:
    """A needle at each depth whose key is another name of the one that is asked for."""
    fmt, rng, depths = setting.fmt, setting.rng, setting.depths
    if len(depths) > NUM_ALIASES:
        why = f"the table has {NUM_ALIASES} pairs"
        raise UsageError(f"`{setting.task}` at {len(depths)} depths", why=why, fix="ask at fewer")
    table = alias_table()
    pairs = [table[i] for i in rng.permutation(NUM_ALIASES)[: len(depths)].tolist()]
    values = fmt.values.draw(len(pairs), rng)
    questions = [
        Question(fmt.ask(asked), (fmt.lead + value,), depth=float(depth), end=fmt.end)
        for (asked, _), value, depth in zip(pairs, values, depths, strict=True)
    ]
    keys = [held for _, held in pairs]
    return asked_sample(setting, keys, values, depths, questions, [[i] for i in range(len(keys))])
