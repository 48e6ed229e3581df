"""Formats of needles: kinds of words, templates, and what is refused."""

from __future__ import annotations

import re

import pytest
from longtexts import seeded

from l4cli.data.longcontext.needles import NeedleFormat, WordKind, format_of, sentence_format
from l4cli.data.longcontext.words import ADJECTIVES, NOUNS
from l4cli.errors import UsageError

SHAPES = {
    "words": r"[a-z]+-[a-z]+",
    "letters:2": "[a-z]{2}",
    "digits:3": "[0-9]{3}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


@pytest.mark.parametrize("kind", SHAPES)
def test_kinds_draw_strings_of_their_shape_that_differ(kind: str):
    words = WordKind.parse(kind).draw_distinct(200, seeded(0))
    assert len(set(words)) == 200
    assert all(re.fullmatch(SHAPES[kind], word) for word in words)
    assert str(WordKind.parse(kind)) == kind
    assert WordKind.parse(kind).draw_distinct(200, seeded(0)) == words


def test_all_keys_of_a_kind_can_be_used_up_and_no_more():
    kind = WordKind.parse("digits:2")
    rest = kind.draw_distinct(97, seeded(0), ["00", "01", "02"])
    assert sorted([*rest, "00", "01", "02"]) == [f"{i:02}" for i in range(100)]
    with pytest.raises(UsageError) as caught:
        kind.draw_distinct(98, seeded(0), ["00", "01", "02"])
    assert "100 different" in caught.value.why
    assert "--keys digits:3" in caught.value.fix


def test_the_word_lists_are_large_and_plain():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) >= 200
        assert all(re.fullmatch("[a-z]+", word) for word in words)


@pytest.mark.parametrize(
    "kind", ["word", "letters", "letters:0", "letters:x", "digits:65", "uuid:3", "words:2", ""]
)
def test_unknown_kinds_are_refused(kind: str):
    with pytest.raises(UsageError):
        WordKind.parse(kind)


def test_a_format_writes_needles_and_questions():
    fmt = NeedleFormat.parse("#{key}={value};", "#{key}=", "letters:2", "digits:3")
    assert fmt.write("ab", "123") == "#ab=123;"
    assert (fmt.ask("ab"), fmt.end, fmt.lead, fmt.sign("ab")) == ("#ab=", ";", "", "#ab=")
    assert not fmt.is_sentence
    assert fmt.ask_many(["ab"]) is None
    usual = sentence_format()
    needle = usual.write("calm-owl", "7654321")
    assert needle == "One of the special magic numbers for calm-owl is: 7654321."
    assert (usual.end, usual.lead, usual.is_sentence) == (".", " ", True)
    assert usual.ask("calm-owl").endswith("is:")
    assert "for a, b and c?" in (usual.ask_many(["a", "b", "c"]) or "")
    turned = NeedleFormat.parse("{value} is of {key}.", "Of {key} is ", "words", "words")
    assert turned.sign("x") == "is of x."


@pytest.mark.parametrize(
    ("needle", "question"),
    [
        ("#{key};", "#{key}="),
        ("{value};", "#{key}="),
        ("{key}{value}{value}", "{key}"),
        ("{key}={value}", "what?"),
        ("{key}={value}{other}", "{key}"),
        ("{key}={value}", "{key}={value}"),
    ],
)
def test_templates_without_their_fields_are_refused(needle: str, question: str):
    with pytest.raises(UsageError):
        NeedleFormat.parse(needle, question, "words", "words")


def test_a_needle_needs_a_question():
    assert format_of(None, None, None, None) == sentence_format()
    assert format_of(None, None, "letters:3", None).keys == WordKind("letters", 3)
    assert format_of("{key} {value}", "{key}", None, "uuid").values == WordKind("uuid")
    for needle, question, missing in (
        ("{key}{value}", None, "question"),
        (None, "{key}", "needle"),
    ):
        with pytest.raises(UsageError) as caught:
            format_of(needle, question, None, None)
        assert f"--{missing}" in caught.value.fix
