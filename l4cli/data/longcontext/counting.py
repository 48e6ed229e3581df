"""Words to count: which ones come most often in a long list, or in a coded text.

in: a `Setting`; out: a `Sample` whose question wants the most frequent words
source: RULER (arXiv 2404.06654), tasks cwe and fwe, by their definitions
"""

from __future__ import annotations

import string
from collections.abc import Collection

import numpy as np

from l4cli.data.longcontext.fitting import Built, fill
from l4cli.data.longcontext.needles import WordKind
from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.data.longcontext.weaving import Setting
from l4cli.data.longcontext.words import ADJECTIVES, NOUNS, VERBS
from l4cli.errors import UsageError

NUM_COMMON = 10
# How often common and other words come; fewer where the text is short.
_FREQUENCIES = ((30, 3), (20, 2), (10, 1))
_EXAMPLE_SHARE = 8  # an example is given where it takes no more than this part of the text
_ALPHA = 2.0  # of the zeta distribution
_ZETA = np.pi**2 / 6  # its sum for this alpha
_TOKENS_PER_WORD = 50  # of the text, for each word of the coded vocabulary
_LEAST_CODED = 200  # words of coded text in which the first ranks differ clearly
_SYLLABLES = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
_LIST_INTRO = "Some words come more often than others in this numbered list. Watch for them.\n"
_CODED_INTRO = "In this coded text, count how often each word comes; the dots mean nothing.\n"


def common_words(setting: Setting) -> Sample:
    """The ten most common words of a numbered list."""
    for most, least in _FREQUENCIES[:-1]:
        try:
            return word_list(setting, NUM_COMMON, most, least)
        except UsageError:  # too short a text for so many words
            continue
    return word_list(setting, NUM_COMMON, *_FREQUENCIES[-1])


def word_list(
    setting: Setting, num_common: int, often: int, seldom: int, *, with_example: bool = True
) -> Sample:
    """Some words of a list come `often`, all others come `seldom`."""
    rng = setting.rng
    seed = int(rng.integers(2**62))
    room = setting.length - setting.reserve
    words = distinct_words(num_common + NUM_COMMON + 8, rng)
    common, example = words[:num_common], words[num_common:]
    intro = _LIST_INTRO
    shown = _example(example, num_common)
    if with_example and setting.count(shown) * _EXAMPLE_SHARE <= room:
        intro += shown

    def build(number: int) -> Built:
        inner = np.random.default_rng(seed)
        others = distinct_words(number, inner, without=words)
        drawn = np.repeat(np.arange(num_common + number), [often] * num_common + [seldom] * number)
        return Built([intro, _numbered([*common, *others], inner.permutation(drawn))], [[1]])

    (question,) = questions = [_question(common)]
    built = fill(build, questions, setting, least=2 * num_common)
    asked = Question(question.prompt, question.answers, Match.all, tuple(built.evidence[0]))
    notes = {"frequencies": f"{often} and {seldom}"}
    return Sample(setting.task, tuple(built.pieces), (asked,), None, notes)


def _question(common: list[str]) -> Question:
    count = len(common)
    words, verb = ("word", "is") if count == 1 else (f"{count} words", "are")
    prompt = (
        f"\nWhich {words} {verb} the most common in the list above? "
        f"The most common {words} in the list {verb}:"
    )
    return Question(prompt, tuple(f" {word}" for word in common), Match.all)


def _example(words: list[str], num_common: int) -> str:
    """A short list of other words, with its answer."""
    common, others = words[:num_common], words[num_common : num_common + 8]
    order = [*common, *others[:4], *reversed(common), *others[4:], *common]
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(order, start=1))
    question = _question(common)
    return f"An example:\n{listed}{question.prompt}{question.target}\nThe list:\n"


def _numbered(words: list[str], order: np.ndarray) -> str:
    return " ".join([f"{i}. {words[k]}" for i, k in enumerate(order.tolist(), start=1)])


def distinct_words(
    count: int, rng: np.random.Generator, without: list[str] | None = None
) -> list[str]:
    """Plain words where there are enough, pairs of words, or else words made of syllables."""
    known = set(without or ())
    plain = [word for word in dict.fromkeys(ADJECTIVES + NOUNS + VERBS) if word not in known]
    if count <= len(plain):
        return [plain[i] for i in rng.permutation(len(plain))[:count].tolist()]
    return distinct_names(count, rng, known)


def distinct_names(count: int, rng: np.random.Generator, without: Collection[str]) -> list[str]:
    """Pairs of words where there are enough, else words made of syllables."""
    pairs = WordKind("words")
    if count + len(without) <= pairs.num_values:
        return pairs.draw_distinct(count, rng, sorted(without))
    base = len(_SYLLABLES)
    numbers = rng.choice(base**4, count, replace=False).tolist()
    return [
        _SYLLABLES[i % base]
        + _SYLLABLES[i // base % base]
        + _SYLLABLES[i // base**2 % base]
        + _SYLLABLES[i // base**3]
        for i in numbers
    ]


def frequent_words(setting: Setting) -> Sample:
    """The three most frequent words of a coded text, whose frequencies fall with their rank."""
    rng = setting.rng
    seed, num_words = int(rng.integers(2**62)), max(8, setting.length // _TOKENS_PER_WORD)
    words = _coded(num_words, rng)
    shares = np.arange(1, num_words + 1, dtype=float) ** -_ALPHA / _ZETA
    words[0] = "..."  # the most frequent one is no word

    def build(number: int) -> Built:
        counts = np.floor(shares * number).astype(np.int64)
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_words), counts))
        text = " ".join([words[i] for i in order.tolist()])
        return Built([_CODED_INTRO, text], [[1]])

    answers = tuple(f" {word}" for word in words[1:4])
    prompt = (
        "\nWhich three coded words come most often in the text above? "
        "The three most frequent coded words are:"
    )
    question = Question(prompt, answers, Match.all)
    built = fill(build, [question], setting, least=_LEAST_CODED)
    asked = Question(prompt, answers, Match.all, tuple(built.evidence[0]))
    return Sample(setting.task, tuple(built.pieces), (asked,))


def _coded(count: int, rng: np.random.Generator) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        letters = rng.integers(26, size=(count - len(words), 6))
        table = np.frombuffer(string.ascii_lowercase.encode(), np.uint8)
        data = table[letters].tobytes().decode()
        words |= dict.fromkeys(data[i : i + 6] for i in range(0, len(data), 6))
    return list(words)
