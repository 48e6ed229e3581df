"""Plain readers of texts: each finds the answers of one task in the text and the prompt alone."""

from __future__ import annotations

import re
from collections import Counter

from l4cli.data.longcontext.aliases import alias_table
from l4cli.data.longcontext.asked_again import ORDINALS
from l4cli.data.longcontext.associations import ASSOCIATIONS


def _named(pattern: str, prompt: str) -> tuple[str, ...]:
    found = re.search(pattern, prompt)
    assert found is not None, prompt
    return found.groups()


def tracking(text: str, prompt: str) -> list[str]:
    (value,) = _named(r"the value (\d+),", prompt)
    held = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text))
    names = []
    for name in held:
        end = name
        while end in held:
            end = held[end]
        if end == value:
            names.append(name)
    return names


def common_words(text: str, prompt: str) -> list[str]:
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", text.rpartition("The list:\n")[2]))
    return [word for word, _ in counts.most_common(10)]


def frequent_words(text: str, prompt: str) -> list[str]:
    coded = text[text.index("the dots mean nothing.") + 23 :]
    counts = Counter(word for word in coded.split() if word != "...")
    (_, second), (_, third) = counts.most_common(4)[2:]
    assert second > third  # no tie
    return [word for word, _ in counts.most_common(3)]


def qa(text: str, prompt: str) -> list[str]:
    (name,) = _named(r"town was (.+) born\?", prompt)
    return re.findall(rf"{name} was born in (\w+)", text)


def qa_hops(text: str, prompt: str) -> list[str]:
    thing, town = _named(r"built the (\w+) of (\w+)\?", prompt)
    pattern = (
        rf"The town of {town} has \d+ thousand people\. Its \w+ {thing} was built by (\w+ \w+),"
    )
    return [
        town for name in re.findall(pattern, text) for town in qa(text, f"town was {name} born?")
    ]


def facts(text: str, prompt: str) -> list[str]:
    """Play the story, and remember where everything has been."""
    at: dict[str, str] = {}
    hands: dict[str, str] = {}
    seen: dict[str, list[str]] = {}
    for who, did, what in re.findall(
        r"([A-Z][a-z]+) (went to|walked to|moved to|hurried to|picked up|took|grabbed|put down"
        r"|dropped|left behind) the (\w+)\.",
        text,
    ):
        if did.endswith(" to"):
            at[who] = what
            for thing, holder in hands.items():
                if holder == who:
                    seen[thing].append(what)
        elif did in ("picked up", "took", "grabbed"):
            assert what not in hands
            assert what not in seen or seen[what][-1] == at[who]  # it lies where it was left
            hands[what] = who
            seen.setdefault(what, [at[who]])
        else:
            assert hands.pop(what) == who
    if found := re.search(r"Where was the (\w+) before it came to the (\w+)\?", prompt):
        thing, place = found.groups()
        path = seen.get(thing, [])
        assert path.count(place) == 1 or not path
        return [path[path.index(place) - 1]] if path else []
    if found := re.search(r"Where is the (\w+)\?", prompt):
        return seen.get(found[1], [])[-1:]
    (person,) = _named(r"Where is (\w+)\?", prompt)
    return [at[person]] if person in at else []


def aliases(text: str, prompt: str) -> list[str]:
    (asked,) = _named(r"Which person (.+)\?", prompt)
    ways = [said for said, other in ASSOCIATIONS if other == asked]
    return [name for said in ways for name in re.findall(rf"(\w+) {re.escape(said)}\.", text)]


def taught_aliases(text: str, prompt: str) -> list[str]:
    (asked,) = _named(r"give for (\w+)\?", prompt)
    held = dict(alias_table())[asked]
    return re.findall(rf"numbers for {held} is: (\d+)\.", text)


def requests(text: str, prompt: str) -> list[str]:
    sign, ordinal, form, topic = _named(r"Say (\w+) .* the (\w+) (\w+) about the (\w+),", prompt)
    turns = re.findall(r"User: (.*)\nAssistant: (.*)\n", text)
    same = [said for asked, said in turns if asked == f"Write a {form} about the {topic}."]
    place = ORDINALS.index(ordinal)
    return [f"{sign} {same[place]}"] if len(same) == 4 else []


def code(text: str, prompt: str) -> list[str]:
    function, module = _named(r"`(\w+)\(\)` of `(\w+)\.py`", prompt)
    files = dict(re.findall(r"^# (\w+)\.py\n((?:.+\n|\n(?!#))*)", text, re.MULTILINE))
    for _ in range(3):
        if f"def {function}():" not in files.get(module, ""):
            return []
        module, function = _named(r"from (\w+) import (\w+)", files[module])
        assert f"return {function}()" not in files.get(module, "")
    number = re.search(rf"def {function}\(\):\n    return (\d+)\n", files.get(module, ""))
    return [number[1]] if number else []


def documents(text: str, prompt: str) -> list[str]:
    (project,) = _named(r"that project (\S+) waits for", prompt)
    leads = dict(re.findall(r"Report on project (\S+)\nIts lead is (\w+ \w+)\.", text))
    waits = dict(re.findall(r"Report on project (\S+)\n.*It waits for project (\S+)\.", text))
    return [leads[waits[project]]] if project in waits else []


def activity(text: str, prompt: str) -> list[str]:
    (user,) = _named(r"did (\w+) open", prompt)
    opened, last = [], (0, "")
    for day, time, who, did, gate in re.findall(
        r"^day (\d+) (\d\d:\d\d) (\w+) (\w+) the (\w+) gate$", text, re.MULTILINE
    ):
        assert (int(day), time) > last
        last = (int(day), time)
        if (who, did) == (user, "opened"):
            opened.append(gate)
    if not opened:
        return []
    return [str(len(opened))] if "How many" in prompt else [opened[-1]]


SOLVERS = {
    "tracking": tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
    "qa": qa,
    "qa-hops": qa_hops,
    "facts": facts,
    "facts-2": facts,
    "facts-3": facts,
    "aliases": aliases,
    "aliases-taught": taught_aliases,
    "requests": requests,
    "code": code,
    "documents": documents,
    "activity": activity,
}
