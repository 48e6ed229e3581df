"""Reports and a log: answers that need two of many documents, or a count of many lines.

in: a `Setting`; out: `Sample`s whose texts are nothing but such records
"""

from __future__ import annotations

import numpy as np

from l4cli.data.longcontext.counting import distinct_names, distinct_words
from l4cli.data.longcontext.fitting import Built, fill, without
from l4cli.data.longcontext.needles import WordKind
from l4cli.data.longcontext.people import full_names
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import Setting
from l4cli.data.longcontext.words import ADJECTIVES, NOUNS

GATES = ("north", "south", "east", "west", "river", "garden", "harbor", "tower")
_WHAT_HAPPENS = ("opened", "closed", "painted", "inspected")
_NUM_USERS = 24
_COUNTS = (2, 9)  # how often the one who is asked about opens a gate: one digit
_MINUTES_A_DAY = 24 * 60


def documents(setting: Setting) -> Sample:
    """Who leads the project that another one waits for: two reports of many."""
    rng = setting.rng
    seed = int(rng.integers(2**62))
    first, second = WordKind("words").draw_distinct(2, rng)

    def build(count: int) -> Built:
        inner = np.random.default_rng(seed)
        leads = full_names(2, np.random.default_rng([seed, 1]))
        others = distinct_names(count, inner, [first, second])
        leads += full_names(count, inner, without=leads)
        projects = [first, second, *others]
        # The second one waits for another, as all do, and nobody waits for itself.
        waits = [second, *(projects[(i + 1) % len(projects)] for i in range(1, len(projects)))]
        texts = [
            _report(project, lead, awaited, inner)
            for project, lead, awaited in zip(projects, leads, waits, strict=True)
        ]
        order = inner.permutation(len(texts)).tolist()
        return Built([texts[i] for i in order], [[order.index(0), order.index(1)]])

    answer = " " + full_names(2, np.random.default_rng([seed, 1]))[1]
    prompt = f"\nWho leads the project that project {first} waits for? Its lead is"
    built = fill(build, [Question(prompt, (answer,), Match.any)], setting, least=1)
    question = Question(prompt, (answer,), Match.any, tuple(built.evidence[0]), end=".")
    return Sample(setting.task, tuple(built.pieces), (question,), without(built, setting))


def _report(project: str, lead: str, awaited: str, rng: np.random.Generator) -> str:
    noun, adjective = NOUNS[rng.integers(len(NOUNS))], ADJECTIVES[rng.integers(len(ADJECTIVES))]
    return (
        f"Report on project {project}\nIts lead is {lead}. It builds a {adjective} {noun} and has "
        f"spent {rng.integers(10, 99)} percent of its budget. It waits for project {awaited}.\n\n"
    )


def activity(setting: Setting) -> Sample:
    """How often somebody opened a gate, and which one last, by a log."""
    rng = setting.rng
    seed = int(rng.integers(2**62))
    user, *others = distinct_words(1 + _NUM_USERS, rng)
    count = int(rng.integers(_COUNTS[0], _COUNTS[1] + 1))
    opened = [GATES[i] for i in rng.integers(len(GATES), size=count).tolist()]
    done = [("opened", gate) for gate in opened]
    for _ in range(3):  # and does other things as well
        verb = _WHAT_HAPPENS[1 + rng.integers(len(_WHAT_HAPPENS) - 1)]
        done.insert(int(rng.integers(len(done) + 1)), (verb, GATES[rng.integers(len(GATES))]))

    def build(number: int) -> Built:
        total = number + len(done)
        inner = np.random.default_rng(seed)
        own = dict(zip(np.sort(inner.permutation(total)[: len(done)]).tolist(), done, strict=True))
        minutes = np.cumsum(inner.integers(1, 9, size=total)).tolist()
        who, what, where = (
            inner.integers(size, size=total).tolist()
            for size in (len(others), len(_WHAT_HAPPENS), len(GATES))
        )
        pieces, waiting, held = [], [], []
        for i, minute in enumerate(minutes):
            if i not in own:
                event = (others[who[i]], _WHAT_HAPPENS[what[i]], GATES[where[i]])
                waiting.append(_line(minute, *event))
                continue
            if waiting:
                pieces.append("".join(waiting))
                waiting = []
            held.append(len(pieces))
            pieces.append(_line(minute, user, *own[i]))
        return Built(pieces + (["".join(waiting)] if waiting else []), [held])

    questions = [
        _question(f"\nHow many times did {user} open a gate? Times:", str(count), "0123456789"),
        _question(f"\nWhich gate did {user} open last? The gate is:", opened[-1], GATES),
    ]
    built = fill(build, questions, setting)
    evidence = tuple(built.evidence[0])
    asked = [
        Question(q.prompt, q.answers, q.match, evidence, labels=q.labels, end=q.end)
        for q in questions
    ]
    return Sample(setting.task, tuple(built.pieces), tuple(asked), without(built, setting))


def _line(minute: int, user: str, verb: str, gate: str) -> str:
    day, rest = divmod(minute, _MINUTES_A_DAY)
    return f"day {day + 1} {rest // 60:02}:{rest % 60:02} {user} {verb} the {gate} gate\n"


def _question(prompt: str, answer: str, labels: tuple[str, ...] | str) -> Question:
    return Question(prompt, (f" {answer}",), Match.only, labels=tuple(labels), end=".")
