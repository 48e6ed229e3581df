"""Prefill with pictures, generation, stopping, scoring: against the model's plain forward."""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import (
    PATCH,
    TOKENS_PER_TILE,
    full_logits,
    random_ids,
    text_model,
    vision_model,
)

from l4cli.errors import L4Error
from l4cli.inference import Engine, Request, SamplingOptions


def plain_greedy(model, ids: list[int], count: int) -> list[int]:
    """Greedy tokens the slow way: a full forward for each."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(full_logits(model, torch.tensor(ids))[-1].argmax()))
    return ids[-count:]


def picture_prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures, of three tiles and of one, between ordinary tokens."""
    tile = [PATCH] * TOKENS_PER_TILE
    ids = [1, 2, 3, 4, 62, *tile, 63, *tile, 5, *tile, 6, 7, 62, *tile, 63, 8, 9, 10]
    return torch.tensor(ids), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_greedy_equals_the_plain_loop():
    model = text_model()
    for length in (1, 7, 8, 13):
        ids = random_ids(length, seed=length).tolist()
        events = list(Engine(model).generate([Request(ids, max_new_tokens=12)]))
        assert [event.token for event in events] == plain_greedy(model, ids, 12)
        assert [event.finish for event in events] == [None] * 11 + ["length"]
        everything = torch.tensor(ids + [event.token for event in events])
        logprobs = full_logits(model, everything).log_softmax(-1)
        for i, event in enumerate(events):
            expected = float(logprobs[length + i - 1, event.token])
            assert event.logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_batch_size", [1, 2, 16])
def test_requests_side_by_side_equal_requests_alone(max_batch_size):
    model = text_model()
    engine = Engine(model)
    requests = [
        Request(random_ids(3, 1), max_new_tokens=4),
        Request(random_ids(9, 2), max_new_tokens=15),
        Request(random_ids(5, 3), max_new_tokens=0),
        Request(random_ids(8, 4), max_new_tokens=7, sampling=SamplingOptions(1.0, seed=5)),
    ]
    answers: dict[int, list[int]] = {}
    for event in engine.generate(requests, max_batch_size=max_batch_size):
        answers.setdefault(event.request, []).append(event.token)
    assert [len(answers.get(i, [])) for i in range(4)] == [4, 15, 0, 7]
    for i in (0, 1, 3):
        assert answers[i] == [event.token for event in engine.generate([requests[i]])]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 11, 100])
def test_pictures_cut_by_prefill_pieces(chunk_size):
    model = vision_model()
    ids, pixels = picture_prompt()
    expected = full_logits(model, ids, pixels)
    read = []
    cache = Engine(model).prefill(ids, pixels, chunk_size=chunk_size, on_progress=read.append)
    torch.testing.assert_close(cache.logits_V, expected[-1], atol=1e-5, rtol=1e-5)
    assert read[-1] == len(ids)
    assert len(read) >= (len(ids) + max(chunk_size, TOKENS_PER_TILE) - 1) // max(chunk_size, 4)
    scores = Engine(model).score(ids, pixels, chunk_size=chunk_size)
    logprobs = expected.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(scores, logprobs, atol=1e-4, rtol=1e-4)


def test_pictures_change_the_answer():
    model = vision_model()
    ids, pixels = picture_prompt()
    engine = Engine(model)
    seen, inverted = engine.prefill(ids, pixels), engine.prefill(ids, -pixels)
    assert not torch.allclose(seen.logits_V, inverted.logits_V)


def test_score_continues_a_cache():
    model = text_model()
    engine = Engine(model)
    ids = random_ids(20)
    expected = full_logits(model, ids).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(engine.score(ids, chunk_size=6), expected, atol=1e-5, rtol=1e-4)
    prefix = engine.prefill(ids[:9])
    for fork in prefix.fork(2):
        scores = engine.score(ids[9:], cache=fork)
        torch.testing.assert_close(scores, expected[8:], atol=1e-5, rtol=1e-4)
    assert len(engine.score(ids[:1])) == 0


def test_stop_tokens_end_an_answer_and_are_reported():
    model = text_model()
    ids = random_ids(6).tolist()
    greedy = plain_greedy(model, ids, 10)
    stop = greedy[4]
    events = list(Engine(model).generate([Request(ids, max_new_tokens=10, stop_ids=(stop,))]))
    assert [event.token for event in events] == greedy[: greedy.index(stop) + 1]
    assert events[-1].finish == "stop"


def test_a_cache_continues_without_new_tokens():
    model = text_model()
    engine = Engine(model)
    ids = random_ids(11).tolist()
    cache = engine.prefill(ids)
    events = list(engine.generate([Request([], cache=cache, max_new_tokens=5)]))
    assert [event.token for event in events] == plain_greedy(model, ids, 5)
    assert cache.tokens == ids + [event.token for event in events[:-1]]


def test_experts_of_every_position_read():
    model = text_model(num_experts_per_tok=2)
    request = Request(random_ids(9), max_new_tokens=4, wants_experts=True)
    plain = Request(random_ids(5), max_new_tokens=4)
    events = [e for e in Engine(model).generate([request, plain]) if e.request == 0]
    assert [tuple(event.experts.shape) for event in events] == [(9, 2, 2)] + [(1, 2, 2)] * 3
    seen = torch.cat([event.experts for event in events])
    everything = [*request.tokens.tolist(), *(event.token for event in events[:-1])]
    whole = next(Engine(model).generate([Request(everything, wants_experts=True)])).experts
    assert torch.equal(seen, whole)


def test_the_context_has_an_end():
    model = text_model(max_position_embeddings=20)
    engine = Engine(model)
    with pytest.raises(L4Error, match="21 tokens are needed, the model has room for 20"):
        engine.prefill(random_ids(21))
    with pytest.raises(L4Error, match="21 tokens are needed"):
        list(engine.generate([Request(random_ids(20))]))
    events = list(engine.generate([Request(random_ids(17), max_new_tokens=100)]))
    assert len(events) == 3
    assert events[-1].finish == "context"
    assert Engine(model, max_context=30).prefill(random_ids(25)).num_tokens == 25


def test_what_cannot_be_read_is_refused():
    engine = Engine(vision_model())
    ids, pixels = picture_prompt()
    with pytest.raises(L4Error, match="3 tiles of 4 tokens for 16 placeholder"):
        engine.prefill(ids, pixels[:3])
    with pytest.raises(L4Error, match="0 tiles"):
        engine.prefill(ids)
    with pytest.raises(L4Error, match="token id 64 is outside the vocabulary of 64"):
        engine.prefill([1, 64])
    with pytest.raises(L4Error, match="no picture encoder"):
        Engine(text_model()).prefill([1, 2], pixels[:1])


def test_stopping_between_pieces_leaves_a_usable_cache():
    model = text_model()
    engine = Engine(model)
    ids = random_ids(20)

    def stop_after_ten(num_read: int) -> None:
        if num_read >= 10:
            raise InterruptedError

    cache = engine.prefill(ids[:1])
    with pytest.raises(InterruptedError):
        engine.prefill(ids[1:], cache=cache, chunk_size=3, on_progress=stop_after_ten)
    assert cache.num_tokens == 13
    assert cache.logits_V is None
    engine.prefill(ids[13:], cache=cache)
    torch.testing.assert_close(cache.logits_V, full_logits(model, ids)[-1], atol=1e-5, rtol=1e-5)


def test_bf16_decoding_stays_close_to_the_bf16_forward():
    model = text_model(dtype=torch.bfloat16)
    ids = random_ids(19)
    exact = full_logits(text_model(), ids).double()
    plain_error = (full_logits(model, ids).double() - exact).abs().mean()
    cache, logits = None, []
    for token in ids.tolist():
        cache = Engine(model).prefill([token], cache=cache)
        logits.append(cache.logits_V)
    assert (torch.stack(logits).double() - exact).abs().mean() <= 2 * plain_error


def test_padding_rows_and_the_placeholder_are_never_chosen():
    ids, pixels = picture_prompt()
    sampling = SamplingOptions(temperature=100.0)
    request = Request(ids, pixels, max_new_tokens=60, sampling=sampling)
    engine = Engine(vision_model(), num_token_ids=20)
    assert all(event.token < 20 for event in engine.generate([request]))
    drawn = {event.token for event in Engine(vision_model()).generate([request])}
    assert PATCH not in drawn
    assert max(drawn) > 20
