"""A long chat with the same request made several times: say the answer to one of them again.

in: a `Setting`; out: a `Sample` that is scored by similarity, and only after the right first word
source: MRCR as OpenAI published it, by its description
"""

from __future__ import annotations

import numpy as np

from l4cli.data.longcontext.fitting import Built, fill, without
from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.needles import WordKind
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import Setting
from l4cli.data.longcontext.words import NOUNS
from l4cli.text import load_tokenizer

NUM_SAME = 4
FORMS = ("poem", "letter", "story", "speech", "riddle", "prayer", "song", "report")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_ANSWER_BYTES = 160


def requests(setting: Setting, num_same: int = NUM_SAME) -> Sample:
    """The i-th of four answers to the same request, word for word."""
    rng = setting.rng
    seed = int(rng.integers(2**62))
    texts = _texts(num_same, np.random.default_rng(seed))
    form, topic = FORMS[rng.integers(len(FORMS))], NOUNS[rng.integers(len(NOUNS))]
    chosen = int(rng.integers(num_same))
    (sign,) = WordKind("letters", 10).draw(1, rng)

    def build(number: int) -> Built:
        inner = np.random.default_rng([seed, 1])
        # Drawn turn by turn, so that more turns go on where fewer ended.
        others = [_other(form, topic, inner) for _ in range(number)]
        written = _texts(number, np.random.default_rng([seed, 2]))
        turns = [_turn(*ask, text) for ask, text in zip(others, written, strict=True)]
        places = np.sort(np.random.default_rng([seed, 3]).random(num_same)) * (number + 1)
        evidence: list[int] = []
        for i, place in enumerate(places.astype(int).tolist()):
            turns.insert(place + i, _turn(form, topic, texts[i]))
            evidence.append(place + i)
        return Built(turns, [[evidence[chosen]]])

    prompt = (
        f"User: Say {sign} and then repeat the {ORDINALS[chosen]} {form} about the {topic}, "
        "word for word and with nothing else.\nAssistant:"
    )
    answer = f" {sign} {texts[chosen]}"
    built = fill(build, [Question(prompt, (answer,), Match.ratio)], setting)
    question = Question(prompt, (answer,), Match.ratio, tuple(built.evidence[0]), end="\n")
    return Sample(setting.task, tuple(built.pieces), (question,), without(built, setting))


def _texts(count: int, rng: np.random.Generator) -> list[str]:
    """Short texts that differ from one another."""
    filler = Haystack.generated().filler(0, load_tokenizer("bytes"), rng)
    texts = (filler.take_units(_ANSWER_BYTES)[0] for _ in range(count))
    return [" ".join(text.split()) for text in texts]


def _other(form: str, topic: str, rng: np.random.Generator) -> tuple[str, str]:
    """Something else to ask for: never the form and topic at hand."""
    while True:
        asked = FORMS[rng.integers(len(FORMS))], NOUNS[rng.integers(len(NOUNS))]
        if asked != (form, topic):
            return asked


def _turn(form: str, topic: str, text: str) -> str:
    return f"User: Write a {form} about the {topic}.\nAssistant: {text}\n"
