"""A teacher's tokens and ours, matched by their bytes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from l4cli.posttraining.soft_targets import TokenMatcher, entropies
from l4cli.text import ChatTokens, Tokenizer, load_tokenizer, render_chat
from l4cli.text.loading import ranked_tokenizer
from l4cli.text.token_logprobs import TokenLogprobs
from l4cli.text.training import train_vocabulary

TEXT = "the answer is that the other answers are not the answer, and neither is this one\n\n\n"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A vocabulary of pieces of words."""
    return ranked_tokenizer(train_vocabulary([TEXT * 20], 400), name="words")


def chat_of(tokenizer: Tokenizer, content: str) -> ChatTokens:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    return render_chat(tokenizer, messages, add_generation_prompt=False)


def said_by(tokenizer: Tokenizer, text: str, *more: bytes) -> TokenLogprobs:
    """Each token at 0.5, the byte before it in the alphabet at 0.25."""
    tokens = [tokenizer.token_bytes(i) for i in tokenizer.encode(text).tolist()] + list(more)
    tops = [((t, math.log(0.5)), (bytes([t[0] ^ 1]), math.log(0.25))) for t in tokens]
    return TokenLogprobs(tuple(tokens), (math.log(0.5),) * len(tokens), tuple(tops))


def test_every_token_of_the_answer_is_found(words: Tokenizer) -> None:
    content = "the answer is 7 \u20ac \U0001f600."
    chat = chat_of(words, content)
    soft = TokenMatcher(words, 4).match(chat, content, said_by(words, content))
    assert soft is not None
    targets = np.flatnonzero(chat.loss_mask)
    assert soft.positions_M.tolist() == targets[:-1].tolist()  # not of the end of the turn
    assert any(len(words.token_bytes(int(i))) > 2 for i in soft.ids_MK[:, 0])
    for position, ids, p in zip(soft.positions_M, soft.ids_MK, soft.probabilities_MK, strict=True):
        assert ids[0] == chat.ids[position]
        other = bytes([words.token_bytes(int(ids[0]))[0] ^ 1])
        assert words.token_bytes(int(ids[1])) == other
        assert p.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert soft.shown_M.tolist() == pytest.approx([0.75] * len(ids_of(soft)))
    assert entropies(soft.probabilities_MK)[0] == pytest.approx(
        -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    )


def ids_of(soft: object) -> np.ndarray:
    found = soft.ids_MK  # type: ignore[attr-defined]
    assert isinstance(found, np.ndarray)
    return found


def test_thoughts_before_and_an_end_after_are_no_part_of_the_answer(words: Tokenizer) -> None:
    content = "the answer is 7."
    chat = chat_of(words, content)
    thoughts = said_by(words, "<think>the answer is 7.</think>")
    spoken = said_by(words, content, b"</s>")
    both = TokenLogprobs(
        thoughts.tokens + spoken.tokens,
        thoughts.logprobs + spoken.logprobs,
        thoughts.top + spoken.top,
    )
    soft = TokenMatcher(words, 4).match(chat, content, both)
    assert soft is not None
    assert soft.positions_M.tolist() == np.flatnonzero(chat.loss_mask).tolist()
    assert soft.ids_MK[-1, 0] == words.eot_id


def test_thoughts_that_are_kept_are_learned_as_data(words: Tokenizer) -> None:
    content = "the answer is 7."
    chat = chat_of(words, f"<think>\nthe answer\n</think>\n\n{content}")
    soft = TokenMatcher(words, 4).match(chat, content, said_by(words, content))
    assert soft is not None
    assert len(soft.positions_M) == len(words.encode(content))
    assert soft.positions_M[-1] == len(chat.ids) - 2


@pytest.mark.parametrize("content", ["the answer is 7.", "\nthe answer"])
def test_other_cuts_give_nothing(words: Tokenizer, content: str) -> None:
    """Nothing at all rather than something in the wrong place."""
    bytewise = load_tokenizer("bytes")
    chat = chat_of(words, content)
    assert TokenMatcher(words, 4).match(chat, content, said_by(bytewise, content)) is None
    said = said_by(words, content)
    shorter = TokenLogprobs(said.tokens[1:], said.logprobs[1:], said.top[1:])
    assert TokenMatcher(words, 4).match(chat, content, shorter) is None
    if content.startswith("\n"):  # its first token is shared with the header
        assert TokenMatcher(words, 4).match(chat, content, said) is None


def test_a_column_is_used_once_and_the_likeliest_come_first() -> None:
    tokenizer = load_tokenizer("bytes")
    chat = chat_of(tokenizer, "x")
    top = ((b"a", -3.0), (b"b", -2.0), (b"b", -2.5), (b"x", -1.0), (b"zz", -0.5), (b"c", -4.0))
    said = TokenLogprobs((b"x",), (-1.0,), (top,))
    soft = TokenMatcher(tokenizer, 3).match(chat, "x", said)
    assert soft is not None
    assert [tokenizer.token_bytes(int(i)) for i in soft.ids_MK[0]] == [b"x", b"b", b"a"]
    weights = np.exp([-1.0, -2.0, -3.0])
    assert soft.probabilities_MK[0].tolist() == pytest.approx(weights / weights.sum())


def test_a_token_drawn_against_all_odds_is_not_impossible() -> None:
    tokenizer = load_tokenizer("bytes")
    said = TokenLogprobs((b"x",), (-9999.0,), (((b"y", -0.01),),))
    soft = TokenMatcher(tokenizer, 3).match(chat_of(tokenizer, "x"), "x", said)
    assert soft is not None
    assert 0 < soft.probabilities_MK[0, 0] < 1e-8
    assert soft.probabilities_MK.sum() == pytest.approx(1)


def test_special_tokens_are_known_by_name() -> None:
    tokenizer = load_tokenizer("bytes")
    said = TokenLogprobs((b"x",), (-0.7,), (((b"<|eot|>", -0.7),),))
    soft = TokenMatcher(tokenizer, 2).match(chat_of(tokenizer, "x"), "x", said)
    assert soft is not None
    assert soft.ids_MK[0].tolist() == [tokenizer.encode("x").item(), tokenizer.eot_id]


def test_entropies_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), 20)
    p[3] = [1, 0, 0, 0, 0, 0]
    for row, entropy in zip(p, entropies(p), strict=True):
        wanted = -sum(x * math.log(x) for x in row if x > 0)
        assert entropy == pytest.approx(wanted, abs=1e-12)
    assert list(itertools.islice(entropies(p), 3, 4)) == [0]
