"""Scores worked by hand, and pieces encoded apart."""

from __future__ import annotations

import numpy as np
import pytest
from longtexts import tokenizer_of

from l4cli.data.longcontext.sample import Match, Question, Sample, encode_pieces


@pytest.mark.parametrize(
    ("question", "answer", "score"),
    [
        (Question("", (" 123",)), "123;#cd=", 1.0),
        (Question("", ("123",)), "\n 1234", 1.0),
        (Question("", ("123",)), "12", 0.0),
        (Question("", ("123",)), "it is 123", 0.0),
        (Question("", (" One", " two"), Match.all), "ONE, three", 0.5),
        (Question("", ("one", "two"), Match.all), "two and one", 1.0),
        (Question("", ("one", "two"), Match.any), "maybe TWO?", 1.0),
        (Question("", ("one", "two"), Match.any), "three", 0.0),
        (Question("", ("park",), Match.only, labels=("park", "mill")), "The Park. Or mill", 1.0),
        (Question("", ("park",), Match.only, labels=("park", "mill")), "park or mill", 0.0),
        (Question("", ("park",), Match.only, labels=("park", "mill")), "nowhere", 0.0),
        (Question("", (" #7a abcd",), Match.ratio), "#7a abcd", 1.0),
        (Question("", ("#7a abcd",), Match.ratio), "#7a abxy", 0.5),
        (Question("", ("#7a abcd",), Match.ratio), "#8b abcd", 0.0),
        (Question("", ("#7a abcd",), Match.ratio), "", 0.0),
    ],
)
def test_scores_by_hand(question: Question, answer: str, score: float):
    assert question.score(answer) == score


def test_a_right_answer_is_what_scores_fully():
    for match in Match:
        question = Question("?", (" alpha", " beta"), match, labels=("alpha", "beta", "gamma"))
        if match is Match.only:
            question = Question("?", (" alpha",), match, labels=("alpha", "beta"))
        assert question.score(question.target) == 1.0
    assert Question("?", (" a", " b"), Match.all, between=";#k=").target == " a;#k=b"
    assert Question("is:", (" beta",)).num_tokens(tokenizer_of("bytes")) == 8


def test_pieces_are_encoded_apart():
    sample = Sample("x", ("ab", "", "cde"), ())
    ids, offsets = sample.encode(tokenizer_of("bytes"))
    assert ids.tolist() == [97, 98, 99, 100, 101]
    assert offsets.tolist() == [0, 2, 2, 5]
    assert sample.text == "abcde"
    empty, offsets = encode_pieces([], tokenizer_of("bytes"))
    assert (empty.dtype, len(empty), offsets.tolist()) == (np.uint32, 0, [0])
