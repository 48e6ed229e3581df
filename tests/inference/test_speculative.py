"""Guessing ahead changes nothing: the same tokens, the same distribution, the same cache."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_llama4 import CHUNK, PATCH, full_logits, random_ids, text_model

from l4cli.inference import CacheOptions, Engine, Request, SamplingOptions
from l4cli.inference.drafts import Draft, LookupDrafter, ModelDrafter, longest_match
from l4cli.inference.kept import part_tensors
from l4cli.inference.layer_cache import LayerCache
from l4cli.inference.sampler import Sampler
from l4cli.inference.speculative import Speculation, step_cost, verify

NONE = torch.empty(0, dtype=torch.int64)


class Stubborn:
    """Guesses the same tokens whatever is said."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def follow(self, ids_T) -> None:
        """What was read does not matter."""

    def add(self, tokens) -> None:
        """Neither does this."""

    def draft(self, count, sampler) -> Draft:
        tokens = self.tokens[:count]
        return Draft(tokens, [None] * len(tokens))


class Liar:
    """Guesses badly, and for ever."""

    def __init__(self, seed: int = 0, num_ids: int = 60) -> None:
        self.random, self.num_ids = np.random.default_rng(seed), num_ids

    def follow(self, ids_T) -> None:
        """What was read does not matter."""

    def add(self, tokens) -> None:
        """Neither does this."""

    def draft(self, count, sampler) -> Draft:
        tokens = self.random.integers(0, self.num_ids, count).tolist()
        return Draft(tokens, [None] * count)


def noisy_copy(model, amount: float):
    """A draft that often agrees with the model."""
    other = text_model(**{"max_position_embeddings": 2048})
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * amount * weight.std().nan_to_num(0))
    return other


def written(engine: Engine, request: Request, speculation: Speculation | None = None) -> list[int]:
    return [event.token for event in engine.generate([request], speculation=speculation)]


def drafters(model) -> dict:
    return {
        "alike": ModelDrafter(Engine(noisy_copy(model, 0.05))),
        "equal": ModelDrafter(Engine(noisy_copy(model, 0.0))),
        "other": ModelDrafter(Engine(text_model(seed=5, max_position_embeddings=2048))),
        "lookup": LookupDrafter(),
        "liar": Liar(),
    }


@pytest.mark.parametrize("name", ["alike", "equal", "other", "lookup", "liar"])
def test_greedy_writes_the_same_tokens(name):
    model = text_model(max_position_embeddings=2048)
    engine, drafter = Engine(model), drafters(model)[name]
    for length, count, penalty in ((1, 30, 1.0), (5, 3, 1.0), (19, 16, 1.3)):
        sampling = SamplingOptions(repetition_penalty=penalty)
        ids = random_ids(length, seed=length)
        request = Request(ids, max_new_tokens=count, sampling=sampling)
        expected = written(engine, request)
        for num_tokens in (None, 3):
            speculation = Speculation(drafter, num_tokens)
            assert written(engine, request, speculation) == expected
            if name == "equal" and num_tokens == 3 and count == 30:
                # Of eight tokens some lie too near to a border for three guesses.
                assert speculation.accepted_per_step > 1.2


KINDS = {
    "fp32": CacheOptions("fp32"),
    "bf16": CacheOptions("bf16"),
    "int8": CacheOptions("int8"),
    "int4": CacheOptions("int4"),
    "sparse": CacheOptions(sparse_topk=2),
    "sparse int8": CacheOptions("int8", sparse_topk=2),
}


@pytest.mark.parametrize("chunk_size", [None, 24])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_forked", [False, True])
def test_what_is_taken_back_was_never_there(kind, chunk_size, is_forked, monkeypatch):
    """Bit for bit: keys read one by one, with and without wrong ones in between."""
    monkeypatch.setattr("l4cli.inference.layer_cache.BLOCK", 256)
    monkeypatch.setattr("l4cli.inference.kept.BLOCK", 256)
    generator = torch.Generator().manual_seed(0)
    length = 560
    q, k, v = (torch.randn(length, heads, 8, generator=generator) for heads in (4, 2, 2))
    wrong = torch.randn(length, 2, 8, generator=generator)
    plain, guessed = (LayerCache(chunk_size, KINDS[kind]) for _ in range(2))
    start = 120
    plain.store(k[:start], v[:start])
    guessed.store(k[:start], v[:start])
    if is_forked:
        plain, guessed = plain.share(), guessed.share()
    num_undone, last = 0, slice(length - 1, length)
    for i in range(start, length - 1):
        count = min(guessed.undoable, i % 6)
        guessed.store(wrong[i : i + count], wrong[i : i + count])
        guessed.take_back(len(wrong[i : i + count]))
        num_undone += count
        for cache in (plain, guessed):
            cache.store(k[i : i + 1], v[i : i + 1])
    assert num_undone > 800
    assert guessed.num_tokens == plain.num_tokens
    assert len(guessed.parts()) == len(plain.parts())
    for part, same in zip(guessed.parts(), plain.parts(), strict=True):
        pairs = zip(part_tensors(part), part_tensors(same), strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs)
    outs = [cache.attend(q[last], k[last], v[last]) for cache in (plain, guessed)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_over_every_kind_of_cache(kind, monkeypatch):
    """Across the ends of a block and of groups of codes."""
    monkeypatch.setattr("l4cli.inference.layer_cache.BLOCK", 256)
    monkeypatch.setattr("l4cli.inference.kept.BLOCK", 256)
    model = text_model(max_position_embeddings=2048)
    engine = Engine(model, cache_options=KINDS[kind])
    cache = engine.prefill(random_ids(245))
    forks = cache.fork(3)
    expected = written(engine, Request([], cache=forks[0], max_new_tokens=24))
    drafter = ModelDrafter(Engine(model, cache_options=KINDS[kind]))
    for fork, guessing in zip(forks[1:], (Liar(), drafter), strict=True):
        request = Request([], cache=fork, max_new_tokens=24)
        assert written(engine, request, Speculation(guessing, 4)) == expected


def test_there_is_no_room_where_something_is_lost():
    model = text_model(max_position_embeddings=2048)
    engine = Engine(model)
    cache = engine.prefill(random_ids(1))
    rooms = []
    for token in random_ids(2 * CHUNK).tolist():
        rooms.append(cache.undoable)
        engine.prefill([token], cache=cache)
    assert rooms == [6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0, 7]
    whole = Engine(text_model(attention_chunk_size=None), cache_options=CacheOptions("int8"))
    cache = whole.prefill(random_ids(100))
    assert cache.undoable == 128 + 128 - 100 - 1


@pytest.mark.parametrize("finish", ["stop", "length", "context", "left"])
@pytest.mark.parametrize("name", ["equal", "lookup", "liar"])
def test_wherever_an_answer_ends_the_cache_holds_what_was_told(finish, name):
    model = text_model(max_position_embeddings=30 if finish == "context" else 2048)
    engine, ids = Engine(model), random_ids(9)
    drafter = drafters(text_model(max_position_embeddings=2048))[name]
    expected = written(engine, Request(ids, max_new_tokens=24))
    for end in (1, 2, 11):
        stop = expected[end] if finish == "stop" else -1
        cache = engine.prefill(ids)
        count = end + 1 if finish == "length" else 24
        request = Request([], cache=cache, max_new_tokens=count, stop_ids=(stop,))
        told = []
        for event in engine.generate([request], speculation=Speculation(drafter, 4)):
            told.append(event)
            assert cache.tokens == [*ids.tolist(), *(event.token for event in told[:-1])] or (
                event.finish is None
            )
            if finish == "left" and len(told) == end + 1:
                break
        tokens = [event.token for event in told]
        wanted = expected[: expected.index(stop) + 1] if finish == "stop" else expected
        assert tokens == wanted[: len(tokens)]
        assert told[-1].finish == (None if finish == "left" else finish)
        assert cache.tokens == [*ids.tolist(), *tokens[:-1]]
        logits = full_logits(model, torch.tensor([*ids.tolist(), *tokens[:-1]]))[-1]
        torch.testing.assert_close(cache.logits_V, logits, atol=1e-4, rtol=1e-4)
        # And it can be gone on from.
        engine.prefill(tokens[-1:], cache=cache)


def chi_square_bound(degrees: int) -> float:
    """What a true sample stays below 9,999 times of 10,000 (Wilson-Hilferty)."""
    share = 2 / (9 * degrees)
    return degrees * (1 - share + 3.72 * math.sqrt(share)) ** 3


SAMPLINGS = {
    "plain": SamplingOptions(0.7),
    "filtered": SamplingOptions(0.6, top_k=6, top_p=0.95, min_p=0.02),
    "penalised": SamplingOptions(0.7, repetition_penalty=1.5, top_k=8),
}


def exact_probabilities(model, ids: list[int], options: SamplingOptions, length: int) -> dict:
    """Of every continuation of so many tokens, by enumeration over full forwards."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for past, share in found.items():
            logits = full_logits(model, torch.tensor([*ids, *past]))[-1]
            sampler = Sampler(options, [*ids, *past], NONE, logits)
            probs = sampler.shaped(logits).double().softmax(-1)
            for token in probs.nonzero().flatten().tolist():
                longer[(*past, token)] = share * float(probs[token])
        found = longer
    return found


def chi_square(expected: dict, counts: dict) -> tuple[float, int]:
    """The statistic and its degrees of freedom; rare outcomes are counted together."""
    num_samples = sum(counts.values())
    cells = [(num_samples * share, counts[tokens]) for tokens, share in expected.items()]
    often = [cell for cell in cells if cell[0] >= 5]
    rare = [sum(column) for column in zip(*(cell for cell in cells if cell[0] < 5), strict=True)]
    often += [tuple(rare)] if rare else []
    return sum((seen - wanted) ** 2 / wanted for wanted, seen in often), len(often) - 1


def at_position(found: dict, position: int) -> dict:
    sums: dict[int, float] = {}
    for tokens, amount in found.items():
        sums[tokens[position]] = sums.get(tokens[position], 0) + amount
    return sums


CASES = [
    ("alike", "filtered"),
    ("other", "penalised"),
    ("lookup", "plain"),
    ("stubborn", "penalised"),
]


@pytest.mark.parametrize(("name", "sampling"), CASES)
def test_samples_are_from_the_model_s_distribution(name, sampling):
    """Three tokens, so that all of a guess, a part of it and none of it are taken."""
    small = {"vocab_size": 12, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    model = text_model(seed=3, **small)
    # After a 2 the lookup guesses 3, after a 3 then 2.
    ids, options = [2, 3, 2], SAMPLINGS[sampling]
    expected = exact_probabilities(model, ids, options, 3)
    draft = text_model(seed=3 if name == "alike" else 8, **small)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.mul_(0.9)
    engine = Engine(model)
    likely = [max(found, key=found.get) for found in (at_position(expected, i) for i in (1, 2))]
    drafter = {"lookup": LookupDrafter(), "stubborn": Stubborn(likely)}.get(
        name, ModelDrafter(Engine(draft))
    )
    counts: dict[tuple[int, ...], int] = dict.fromkeys(expected, 0)
    speculation = Speculation(drafter, 2)
    num_samples = 500 if name in ("alike", "other") else 1000
    for seed, fork in enumerate(engine.prefill(ids).fork(num_samples)):
        seeded = replace(options, seed=seed)
        request = Request([], cache=fork, max_new_tokens=3, sampling=seeded)
        counts[tuple(written(engine, request, speculation))] += 1
    assert 0 < speculation.num_accepted < speculation.num_drafted
    for found in (lambda x: x, *(lambda x, i=i: at_position(x, i) for i in range(3))):
        statistic, degrees = chi_square(found(expected), found(counts))
        assert degrees >= 3
        assert statistic < chi_square_bound(degrees)


def test_one_position_by_hand():
    """p = (.5, .3, .2), q = (.2, .2, .6): of q's third token a third stands, the rest is p - q."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    sampler = Sampler(SamplingOptions(1.0, seed=3), [], NONE, p)
    logits = torch.stack([p.log(), p.log()])
    firsts = [verify(sampler, logits, Draft([2], [q]))[0] for _ in range(4000)]
    stood = [tokens for tokens in firsts if len(tokens) == 2]
    assert all(tokens[0] == 2 for tokens in stood)
    assert len(stood) / 4000 == pytest.approx(1 / 3, abs=0.03)
    redrawn = [tokens[0] for tokens in firsts if len(tokens) == 1]
    assert redrawn.count(0) / len(redrawn) == pytest.approx(0.75, abs=0.03)
    assert redrawn.count(1) / len(redrawn) == pytest.approx(0.25, abs=0.03)
    # A guess that is certain has q = 1.
    sure = [verify(sampler, logits, Draft([0], [None]))[0][0] for _ in range(4000)]
    for token in range(3):
        assert sure.count(token) / 4000 == pytest.approx(float(p[token]), abs=0.03)


def test_matches_by_plain_search():
    random = np.random.default_rng(0)
    for _ in range(300):
        ids = random.integers(0, 4, random.integers(1, 40)).astype(np.uint32)
        best = None
        for end, length in itertools.product(range(1, len(ids)), range(2, 17)):
            is_match = length <= end and np.array_equal(ids[end - length : end], ids[-length:])
            if is_match and (best is None or (length, end) > best):
                best = (length, end)
        assert longest_match(ids) == (None if best is None else best[1])


def test_what_repeats_is_looked_up_whole():
    drafter = LookupDrafter(never=[9])
    drafter.follow(torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 5]))
    sampler = Sampler(SamplingOptions(), [], NONE, torch.zeros(12))
    assert drafter.draft(4, sampler).tokens == []
    drafter.add([1, 2, 3])
    assert drafter.draft(4, sampler).tokens == [5, 1, 2, 3]
    drafter.add([4])
    assert drafter.draft(4, sampler).tokens == []  # an id that no answer holds
    drafter.add([7, 8, 7, 8])
    assert drafter.draft(5, sampler).tokens == [7, 8, 7, 8, 7]
    assert drafter.draft(0, sampler).tokens == []


def test_a_draft_reads_around_pictures():
    draft = ModelDrafter(Engine(text_model()), [PATCH])
    draft.follow(torch.tensor([1, 62, PATCH, PATCH, 63, 5]))
    assert draft.cache.tokens == [1, 62, 63, 5]
    draft.add([7, PATCH])
    assert draft.ids == [1, 62, 63, 5, 7]


def test_a_draft_with_another_number_of_rows():
    """Padding above the tokenizer's ids may differ between two models of one vocabulary."""
    model = text_model(max_position_embeddings=2048)
    engine = Engine(model, num_token_ids=50)
    for vocab_size in (56, 64, 96):
        other = text_model(seed=2, vocab_size=vocab_size, max_position_embeddings=2048)
        drafter = ModelDrafter(Engine(other, num_token_ids=50))
        for options in (SamplingOptions(), SamplingOptions(1.0, seed=4)):
            request = Request(random_ids(9) % 50, max_new_tokens=30, sampling=options)
            tokens = written(engine, request, Speculation(drafter, 3))
            assert max(tokens) < 50
            if options.temperature == 0:
                assert tokens == written(engine, request)


def test_a_full_draft_falls_silent():
    model = text_model(max_position_embeddings=2048)
    drafter = ModelDrafter(Engine(text_model(max_position_embeddings=30)))
    request = Request(random_ids(9), max_new_tokens=60)
    speculation = Speculation(drafter, 3)
    assert written(Engine(model), request, speculation) == written(Engine(model), request)
    assert drafter.cache.num_tokens <= 30
    long = Request(random_ids(50), max_new_tokens=5)
    assert written(Engine(model), long, speculation) == written(Engine(model), long)


def test_turns_go_on_and_begin_anew():
    model = text_model(max_position_embeddings=2048)
    engine, drafter = Engine(model), drafters(model)["equal"]
    cache = engine.prefill(random_ids(30))
    for turn in range(3):
        request = Request(random_ids(7, seed=turn), cache=cache, max_new_tokens=12)
        everything = torch.tensor([*cache.tokens, *request.tokens.tolist()])
        plain = written(engine, Request(everything, max_new_tokens=12))
        speculation = Speculation(drafter, 3)
        assert written(engine, request, speculation) == plain
        assert speculation.num_accepted or turn
    fresh = Request(random_ids(21, seed=9), max_new_tokens=12)
    assert written(engine, fresh, Speculation(drafter, 3)) == written(engine, fresh)


def test_experts_of_what_stayed():
    model = text_model(num_experts_per_tok=2, max_position_embeddings=2048)
    engine = Engine(model)
    request = Request(random_ids(9), max_new_tokens=30, wants_experts=True)
    plain = list(engine.generate([request]))
    for drafter in (Liar(), LookupDrafter()):
        events = list(engine.generate([request], speculation=Speculation(drafter, 3)))
        pairs = zip(events, plain, strict=True)
        assert all(torch.equal(mine.experts, other.experts) for mine, other in pairs)


def test_how_many_guesses_pay():
    config = text_model().config
    free = Speculation(LookupDrafter(), cost=lambda count: 1 + 0.01 * count)
    dear = Speculation(LookupDrafter(), cost=lambda count: 1 + 2 * count)
    assert free.wanted() > 4
    assert dear.wanted() == 1  # it is tried, now and then
    for _ in range(60):
        free.learn(4, 0)
        dear.learn(1, 0)
    assert free.wanted() <= 1
    assert dear.wanted() == 0
    for _ in range(60):
        free.learn(4, 4)
    assert free.wanted() > 8
    cost = step_cost(config, None)
    assert cost(0) == pytest.approx(1)
    assert 1 < cost(1) < cost(2) < 2.5
    assert step_cost(config, config)(1) == pytest.approx(cost(1) + 1)
