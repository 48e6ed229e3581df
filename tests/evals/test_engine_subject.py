"""What a model says to a sample: checked answers against plain greedy decoding, shared reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cli.tiny_chat import tiny_config

from l4cli.data.longcontext.sample import Match, Question, Sample
from l4cli.evals.needle.engine_subject import EngineSubject, Frame
from l4cli.inference import Engine
from l4cli.model import build_model
from l4cli.text import load_tokenizer

TOKENIZER = load_tokenizer("bytes")


def engine(seed: int = 0) -> Engine:
    model = build_model(replace(tiny_config(), vision=None), seed=seed)
    letters = torch.from_numpy(TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz").astype(np.int64))
    with torch.no_grad():  # says letters only, far enough apart that rounding does not choose
        spoken = model.lm_head.weight[letters] * 50
        model.lm_head.weight.zero_()
        model.lm_head.weight[letters] = spoken
    return Engine(model, num_token_ids=TOKENIZER.vocab_size, max_context=1 << 40)


def plain_greedy(engine: Engine, ids: list[int], num_tokens: int) -> list[int]:
    """The whole text through the model again for every token, no cache."""
    written: list[int] = []
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids + written]))[0, -1].clone()
        logits[TOKENIZER.vocab_size :] = float("-inf")
        written.append(int(logits.argmax()))
    return written


def sample_for(prompts: list[str], answers: list[str]) -> Sample:
    questions = tuple(
        Question(prompt, (answer,), evidence=(1,))
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    return Sample("single", ("grass " * 20, "#ab=12;", " sky" * 10), questions)


def test_checked_answers_are_those_of_greedy_decoding() -> None:
    tested = engine()
    subject = EngineSubject(tested, TOKENIZER)
    prompts = ["\nwho?", "\n#ab=", " then", "\nThe key is ", "#####", "\n7 + 8 = "]
    context = [TOKENIZER.bos_id, *TOKENIZER.encode(sample_for([], []).text).tolist()]
    greedy = [
        plain_greedy(tested, context + TOKENIZER.encode(prompt).tolist(), 4) for prompt in prompts
    ]
    texts = [TOKENIZER.decode(ids) for ids in greedy]
    assert len(set(texts)) >= 2, texts
    assert subject.read(sample_for(prompts, texts)).answers == texts
    # One byte changed in each: told apart, and what is told is what the model would write.
    sample = sample_for(prompts, [text[:2] + "~" + text[3:] for text in texts])
    answers = subject.read(sample).answers
    assert answers == [text[:3] for text in texts]
    assert not any(q.score(a) for q, a in zip(sample.questions, answers, strict=True))


def test_free_answers_are_written_side_by_side() -> None:
    tested = engine(1)
    sizes: list[int] = []
    tested.model.lm_head.register_forward_hook(lambda _, inputs, out: sizes.append(len(inputs[0])))
    prompts = [f"\nwho is {name}?" for name in "abcde"]
    base = sample_for(prompts, ["here"] * 5)
    free = replace(base, questions=tuple(replace(q, match=Match.any) for q in base.questions))
    answers = EngineSubject(tested, TOKENIZER).read(free).answers
    longest = max(len(TOKENIZER.encode(answer)) for answer in answers)
    assert longest > 5
    assert sizes.count(5) + sizes.count(4) + sizes.count(3) + sizes.count(2) >= longest - 2
    # One row at a time: the text, each question, and at most the end of the longest answer.
    assert sizes.count(1) <= 1 + 5 + 2


def test_free_answers_are_greedy_and_share_the_reading() -> None:
    tested = engine(1)
    subject = EngineSubject(tested, TOKENIZER)
    prompts = ["\nwho?", "\nwhere is it?"]
    base = sample_for(prompts, ["here", "there"])
    free = replace(base, questions=tuple(replace(q, match=Match.any) for q in base.questions))
    context = [TOKENIZER.bos_id, *TOKENIZER.encode(base.text).tolist()]
    for answer, question in zip(subject.read(free).answers, free.questions, strict=True):
        ids = context + TOKENIZER.encode(question.prompt).tolist()
        room = subject._room(question)
        written = plain_greedy(tested, ids, room)
        stop = next((i for i, t in enumerate(written) if t in TOKENIZER.stop_ids), room)
        assert answer == TOKENIZER.decode(written[:stop])


def test_tokens_and_straddles_count_what_stands_before() -> None:
    subject = EngineSubject(engine(), TOKENIZER)  # chunks of 16
    for num_filler in range(16):
        pieces = ("." * num_filler, "#ab=12;", "." * 9)
        sample = Sample("single", pieces, (Question("\n#ab=", ("12",), evidence=(1,)),))
        reading = subject.read(sample)
        assert reading.num_tokens == 1 + num_filler + 7 + 9 + 5 + 2
        first, last = 1 + num_filler, num_filler + 7
        assert reading.is_straddled == [first // 16 != last // 16]


def test_chat_puts_the_turns_around_text_and_question() -> None:
    frame = Frame.of(TOKENIZER, is_chat=True)
    text = TOKENIZER.decode(np.concatenate([frame.before, TOKENIZER.encode("T"), frame.after]))
    assert text == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nT<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_question_alone_can_be_asked(is_chat: bool) -> None:
    subject = EngineSubject(engine(), TOKENIZER, is_chat=is_chat)
    sample = Sample("single", (), (Question("\n#ab=", ("12",)),))
    reading = subject.read(sample)
    assert len(reading.answers) == 1
    assert reading.is_straddled == [False]
