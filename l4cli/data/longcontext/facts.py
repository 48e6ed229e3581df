"""Small facts about people, places and things, spread over a long text and put together again.

in: a `Setting`; out: a `Sample` whose question needs one, two or three of the facts
source: BABILong (arXiv 2406.10149) for the idea and the score; bAbI (1502.05698) tasks 1 to 3
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import (
    Setting,
    Statement,
    fresh_filler,
    replace,
    weave,
)

PEOPLE = ("Mara", "Odo", "Tilda", "Ivo", "Runa", "Casper", "Linnea", "Bastian")
PLACES = ("attic", "cellar", "garden", "kitchen", "office", "stable", "library", "workshop")
THINGS = ("lantern", "teapot", "ladder", "violin", "compass", "basket")
_GOING = ("went to", "walked to", "moved to", "hurried to")
_TAKING = ("picked up", "took", "grabbed")
_LEAVING = ("put down", "dropped", "left behind")
# Fewest and most facts, for questions that need one, two or three of them.
_NUM_FACTS = {1: (3, 10), 2: (6, 24), 3: (10, 32)}
_TOKENS_PER_FACT = 12
_MAX_TRIES = 1000


@dataclass
class _World:
    """Who is where, who holds what, and which facts say so."""

    texts: list[str] = field(default_factory=list)
    stays: dict[str, tuple[str, int]] = field(default_factory=dict)  # person: place, fact
    holders: dict[str, tuple[str, int]] = field(default_factory=dict)  # thing: person, fact
    # Of each thing: places one after the other, each with the facts that prove it.
    paths: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)

    def go(self, person: str, place: str, verb: str) -> None:
        fact = self._say(f"{person} {verb} the {place}.")
        self.stays[person] = (place, fact)
        for thing, (holder, taken) in self.holders.items():
            if holder == person:
                self.paths.setdefault(thing, []).append((place, (taken, fact)))

    def take(self, person: str, thing: str, verb: str) -> None:
        self.holders[thing] = (person, self._say(f"{person} {verb} the {thing}."))
        # Taken up where its new holder stands: a place only if it is not known already.
        place, fact = self.stays[person]
        path = self.paths.setdefault(thing, [])
        if not path:
            path.append((place, (fact, self.holders[thing][1])))

    def leave(self, person: str, thing: str, verb: str) -> None:
        self._say(f"{person} {verb} the {thing}.")
        del self.holders[thing]

    def _say(self, text: str) -> int:
        self.texts.append(text)
        return len(self.texts) - 1


def one_fact(setting: Setting) -> Sample:
    """Where a person is."""
    return _facts(setting, 1)


def two_facts(setting: Setting) -> Sample:
    """Where a thing is that somebody carries."""
    return _facts(setting, 2)


def three_facts(setting: Setting) -> Sample:
    """Where a thing was before it came to where it is asked for."""
    return _facts(setting, 3)


def _facts(setting: Setting, num_support: int) -> Sample:
    rng = setting.rng
    least, most = _NUM_FACTS[num_support]
    most = int(np.clip(setting.length // (4 * _TOKENS_PER_FACT), least, most))
    for _ in range(_MAX_TRIES):
        world = _story(int(rng.integers(least, most + 1)), rng, with_things=num_support > 1)
        question = _question(world, num_support, rng)
        if question is not None:
            break
    else:
        raise AssertionError("no story has a question")
    room = setting.room([question])
    depths = np.sort(rng.random(len(world.texts)) * 100).tolist()
    statements = [Statement(text, depth) for text, depth in zip(world.texts, depths, strict=True)]
    woven = weave(statements, room, setting)
    evidence = tuple(woven.places[i] for i in question.evidence)
    without = replace(woven.pieces, sorted(woven.places), fresh_filler(setting, room), setting)
    asked = dataclasses.replace(question, evidence=evidence)
    return Sample(setting.task, tuple(woven.pieces), (asked,), without)


def _story(num_facts: int, rng: np.random.Generator, *, with_things: bool) -> _World:
    world = _World()
    while len(world.texts) < num_facts:
        person = PEOPLE[rng.integers(4 if with_things else len(PEOPLE))]
        place, _ = world.stays.get(person, ("", 0))
        held = [thing for thing, (holder, _) in world.holders.items() if holder == person]
        # Only a thing that lies here, or was never seen, can be taken.
        near = [
            thing
            for thing in THINGS
            if thing not in world.holders
            and (thing not in world.paths or world.paths[thing][-1][0] == place)
        ]
        chance = rng.random()
        if with_things and place and near and not held and chance < 0.5:
            world.take(person, near[rng.integers(len(near))], _pick(_TAKING, rng))
        elif held and chance < 0.15:
            world.leave(person, held[0], _pick(_LEAVING, rng))
        else:
            others = [other for other in PLACES if other != place]
            world.go(person, _pick(others, rng), _pick(_GOING, rng))
    return world


def _pick(words: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _question(world: _World, num_support: int, rng: np.random.Generator) -> Question | None:
    """Ask what the story answers with so many facts; None if it answers nothing."""
    if num_support == 1:
        person = _pick(list(world.stays), rng)
        place, fact = world.stays[person]
        return _asked(f"Where is {person}?", f"{person} is in the", place, (fact,), "")
    moved = [thing for thing, path in world.paths.items() if len(path) >= num_support]
    if not moved:
        return None
    thing = _pick(moved, rng)
    path = world.paths[thing]
    if num_support == 2:
        place, facts = path[-1]
        return _asked(f"Where is the {thing}?", f"The {thing} is in the", place, facts, "")
    visited = [place for place, _ in path]
    ends = [i for i in range(1, len(path)) if visited.count(visited[i]) == 1]
    if not ends:
        return None
    end = ends[int(rng.integers(len(ends)))]
    (before, first), (after, second) = path[end - 1], path[end]
    question = f"Where was the {thing} before it came to the {after}?"
    lead = f"Before the {after} the {thing} was in the"
    return _asked(question, lead, before, tuple(sorted({*first, *second})), after)


def _asked(question: str, lead: str, place: str, facts: tuple[int, ...], named: str) -> Question:
    """A place that the question names is no answer, and is not looked for in one."""
    prompt = f"\nQuestion: {question}\nAnswer: {lead}"
    labels = tuple(label for label in PLACES if label != named)
    return Question(prompt, (f" {place}",), Match.only, facts, labels=labels, end=".")
