"""Experts on the host: the same answers, and no more copies than must be.

The "device" is the CPU here: the same code without streams. What is left to a GPU are the waits.
"""

from __future__ import annotations

import pytest
import torch
from tiny_llama4 import full_logits, random_ids, text_model, vision_model

from l4cli.checkpoint import save_model
from l4cli.errors import L4Error
from l4cli.inference import Engine, Request, offload_experts, open_offloaded
from l4cli.inference.offload import ExpertPool, _pinned

CPU = torch.device("cpu")
EXPERT_BYTES = 4 * 3 * 32 * 48  # gate, up and down of a tiny model in fp32
MANY = {"num_local_experts": 8, "num_experts_per_tok": 2}


def tokens_of(model, request: Request) -> list[int]:
    return [event.token for event in Engine(model).generate([request])]


@pytest.mark.parametrize("num_slots", [2, 3, 7, 16, 100])
@pytest.mark.parametrize("changes", [{}, MANY])
def test_answers_are_those_of_the_plain_model(num_slots, changes):
    plain, model = text_model(**changes), text_model(**changes)
    pool = offload_experts(model, CPU, num_slots * EXPERT_BYTES)
    assert pool.num_slots == min(num_slots, 2 * plain.config.text.num_local_experts)
    ids = random_ids(40)
    torch.testing.assert_close(full_logits(model, ids), full_logits(plain, ids))
    request = Request(ids, max_new_tokens=20)
    assert tokens_of(model, request) == tokens_of(plain, request)
    assert len(pool.held) <= pool.num_slots


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("num_slots", [2, 5, 16])
def test_on_a_gpu_copies_arrive_before_they_are_used(num_slots, tmp_path):
    plain, cuda = text_model(**MANY), torch.device("cuda")
    save_model(plain, tmp_path / "m", {})
    model = open_offloaded(tmp_path / "m", cuda, None, num_slots * EXPERT_BYTES)
    plain = plain.to(cuda)
    for seed in range(5):
        ids = random_ids(40, seed).to(cuda)
        torch.testing.assert_close(full_logits(model, ids), full_logits(plain, ids))
    request = Request(random_ids(40), max_new_tokens=40)
    assert tokens_of(model, request) == tokens_of(plain, request)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_memory_is_locked_and_given_back(monkeypatch):
    """The same address again and again: what stays locked cannot be locked twice."""
    monkeypatch.setattr("l4cli.inference.offload._OWN_PAGES", 0)
    room = torch.zeros(2**24)
    for _ in range(3):
        owner = torch.nn.Module()
        assert _pinned(room, owner, torch.cuda.current_stream()) is room
        assert room.is_pinned()
        del owner
        assert not room.is_pinned()


def test_what_fits_is_copied_once():
    model = text_model()
    pool = offload_experts(model, CPU, 8 * EXPERT_BYTES)
    tokens_of(model, Request(random_ids(60), max_new_tokens=10))
    assert pool.num_copies == 8  # two layers of four
    tokens_of(model, Request(random_ids(60, seed=1), max_new_tokens=10))
    assert pool.num_copies == 8


def test_a_layer_that_calls_more_than_fit_goes_through_them_once():
    model = text_model(**MANY)
    pool = offload_experts(model, CPU, 3 * EXPERT_BYTES)
    full_logits(model, random_ids(100))
    assert pool.num_copies == 2 * 8
    full_logits(model, random_ids(100))
    # What was there of the last layer is not of the first; the rest must come again.
    assert pool.num_copies == 2 * 2 * 8


def copies_late(model, num_tokens: int, *, guesses: bool) -> int:
    """How many of the experts called one by one were not there yet."""
    pool = offload_experts(model, CPU, 4 * EXPERT_BYTES)
    for layer in model.model.layers:
        if layer.is_moe and not guesses:
            (hook,) = layer.feed_forward.router._forward_hooks.values()
            hook.following = None
    engine, cache = Engine(model), None
    for token in random_ids(num_tokens).tolist():
        cache = engine.prefill([token], cache=cache)
    return 2 * 2 * num_tokens - pool.num_found


def test_the_next_layer_is_guessed():
    """Where layers add nothing, the second router hears what the first did: no guess is wrong."""

    def silent_model():
        model = text_model(**MANY)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
        return model

    assert copies_late(silent_model(), 40, guesses=True) <= 2 * 40  # those of the first layer
    assert copies_late(silent_model(), 40, guesses=False) > 2.5 * 40


def test_the_longest_unused_goes_and_the_awaited_stay():
    pool = ExpertPool([torch.zeros(2)], 3, CPU)
    experts = {key: [torch.full((2,), float(key[1]))] for key in ((0, i) for i in range(9))}

    def start(*numbers: int) -> list[bool]:
        return [pool.start((0, i), experts[0, i]) for i in numbers]

    assert start(0, 1, 2, 0) == [True] * 4
    assert pool.num_copies == 3
    start(3)  # 1 was not used for longest
    assert [key[1] for key in pool.held] == [2, 0, 3]
    pool.wanted = {(0, 2), (0, 0)}
    start(4)
    assert [key[1] for key in pool.held] == [2, 0, 4]
    pool.wanted = {(0, 2), (0, 0), (0, 4)}
    assert start(5) == [False]
    with pool.using((0, 0)) as (tensor,):
        assert tensor.tolist() == [0.0, 0.0]
    assert start(6) == [True]
    assert [key[1] for key in pool.held] == [2, 4, 6]
    with pool.using((0, 6)) as (tensor,):
        assert tensor.tolist() == [6.0, 6.0]


def test_a_checkpoint_with_pictures(tmp_path):
    plain = vision_model()
    save_model(plain, tmp_path / "m", {})
    model = open_offloaded(tmp_path / "m", CPU, None, 5 * EXPERT_BYTES)
    assert not any("experts." in name for name, _ in model.named_parameters())
    ids = random_ids(20)
    torch.testing.assert_close(full_logits(model, ids), full_logits(plain, ids))
    assert Engine(model).model_id == Engine(plain).model_id


def test_too_little_room_is_refused():
    with pytest.raises(L4Error, match="hold too few experts") as caught:
        offload_experts(text_model(), CPU, 2 * EXPERT_BYTES - 1)
    assert str(2 * EXPERT_BYTES) in str(caught.value.fix)
    with pytest.raises(L4Error, match="cannot offload"):
        offload_experts(text_model(moe_layers=[]), CPU, 10**9)
