"""Many requests side by side say what each says alone; nobody waits long, nothing is read twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_llama4 import CHUNK, PATCH, random_ids, text_model, vision_model

from l4cli.inference import CacheOptions, Engine, Request, SamplingOptions
from l4cli.inference.generation import READ_BESIDE, Generation
from l4cli.inference.sampler import Sampler, choose_all
from l4cli.inference.shared_prefix import SharedPrefixes, common_length

NONE = torch.empty(0, dtype=torch.int64)
LONG = {"max_position_embeddings": 4096}


class Counted:
    """A model that notes how many tokens each pass reads; all else is the model's."""

    def __init__(self, model) -> None:
        self.model, self.passes = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, batch, *args, **kwargs):
        self.passes.append(tuple(batch.input_ids.shape))
        return self.model.hidden(batch, *args, **kwargs)


def counting_engine(**changes) -> tuple[Engine, list[tuple[int, int]]]:
    engine = Engine(text_model(**LONG | changes))
    engine.model = Counted(engine.model)
    return engine, engine.model.passes


def answers(engine: Engine, requests: list[Request], size: int = 16) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for event in engine.generate(requests, max_batch_size=size):
        found.setdefault(event.request, []).append(event.token)
    return found


def wide_margins(engine: Engine, request: Request) -> bool:
    """Whether no greedy choice is so near that rounding could turn it."""
    cache, smallest = engine.prefill(request.tokens), 1.0
    for _ in range(request.max_new_tokens):
        best, second = cache.logits_V.topk(2).values.tolist()
        smallest = min(smallest, best - second)
        engine.prefill([int(cache.logits_V.argmax())], cache=cache)
    return smallest > 1e-4


SAMPLINGS = (
    SamplingOptions(),
    SamplingOptions(1.0),
    SamplingOptions(0.7, top_k=9, top_p=0.9),
    SamplingOptions(repetition_penalty=1.4),
)


@pytest.mark.parametrize("size", [3, 32])
def test_a_crowd_says_what_each_says_alone(size):
    """Prompts and answers of all lengths, all samplings.

    Rows of one pass and passes of one row round differently, by about 1e-6 here; a draw or a
    choice turns only where it lies as near to a border, and at these seeds none does.
    """
    engine = Engine(text_model(**LONG))
    begin = random_ids(70, seed=99)
    requests = []
    for i in range(12):
        own = random_ids(1 + 5 * i % 23, seed=i)
        ids = torch.cat([begin, own]) if i % 3 == 0 else own
        sampling = SamplingOptions(**{**vars(SAMPLINGS[i % 4]), "seed": i})
        requests.append(Request(ids, max_new_tokens=1 + 7 * i % 19, sampling=sampling))
    together = answers(engine, requests, size)
    for i, request in enumerate(requests):
        assert together[i] == answers(engine, [request])[0], i
        assert len(together[i]) == request.max_new_tokens


def test_in_fp32_too_where_margins_are_wide():
    engine = Engine(text_model(**LONG))
    requests = [Request(random_ids(3 + i, seed=i), max_new_tokens=10) for i in range(8)]
    clear = [i for i, request in enumerate(requests) if wide_margins(engine, request)]
    assert len(clear) >= 6
    together = answers(engine, requests)
    for i in clear:
        assert together[i] == answers(engine, [requests[i]])[0]


def test_who_waits_joins_when_another_ends():
    engine, passes = counting_engine()
    counts = (12, 2, 2, 2, 2, 2)
    requests = [Request(random_ids(4, i), max_new_tokens=n) for i, n in enumerate(counts)]
    assert {i: len(told) for i, told in answers(engine, requests, 2).items()} == dict(
        enumerate(counts)
    )
    steps = [rows for rows, length in passes if length == 1]
    # The first row is never alone while others wait: 11 steps of its own hold all the others'.
    assert len(steps) == 11
    assert steps[:5] == [2] * 5
    assert max(steps) == 2


def test_short_prompts_are_read_in_one_pass():
    """Each goes to its own cache, some after a past, across the borders of chunks."""
    engine, passes = counting_engine()
    requests = [Request(random_ids(3 + 4 * i, seed=i), max_new_tokens=6) for i in range(6)]
    past = engine.prefill(random_ids(21, seed=50))
    requests += [
        Request(random_ids(5 + i, seed=20 + i), cache=fork, max_new_tokens=6)
        for i, fork in enumerate(past.fork(3))
    ]
    passes.clear()
    together = answers(engine, requests)
    lengths = [len(request.tokens) for request in requests]
    assert [length for _, length in passes if length > 1] == [sum(lengths)]
    for i, request in enumerate(requests):
        ids = [*past.tokens] * (i >= 6) + request.tokens.tolist()
        assert together[i] == answers(engine, [Request(ids, max_new_tokens=6)])[0]


def test_a_long_prompt_stalls_nobody_for_long():
    engine, passes = counting_engine()
    requests = [
        Request(random_ids(5), max_new_tokens=12),
        Request(random_ids(4 * READ_BESIDE - 100, seed=1), max_new_tokens=2),
    ]
    answers(engine, requests)
    between, longest = 0, 0
    is_running = False
    for _, length in passes:
        is_step = length == 1
        is_running = is_running or is_step
        between = 0 if is_step else between + length
        longest = max(longest, between) if is_running else longest
    assert 0 < longest <= READ_BESIDE
    assert [length for _, length in passes if length > 5].count(READ_BESIDE) == 3
    alone = answers(Engine(engine.model.model), requests[1:])
    assert answers(engine, requests)[1] == alone[0]


@pytest.mark.parametrize("shared", [CHUNK * 9, CHUNK * 9 + 3])
def test_a_common_beginning_is_read_once(shared):
    engine, passes = counting_engine()
    begin = random_ids(shared, seed=7)
    requests = [
        Request(torch.cat([begin, random_ids(3 + i, seed=i)]), max_new_tokens=9) for i in range(5)
    ]
    together = answers(engine, requests)
    num_read = sum(length for _, length in passes if length > 1)
    assert num_read == shared + sum(3 + i for i in range(5))
    for i, request in enumerate(requests):
        assert together[i] == answers(engine, [request])[0]


def test_beginnings_within_beginnings():
    """Two books with one preface, three questions each; one prompt is another's beginning."""
    engine, passes = counting_engine()
    preface = random_ids(100, seed=1)
    books = [torch.cat([preface, random_ids(150, seed=2 + i)]) for i in range(2)]
    prompts = [torch.cat([book, random_ids(4, seed=10 + j)]) for j in range(3) for book in books]
    prompts += [books[0], books[1]]
    requests = [Request(ids, max_new_tokens=3) for ids in prompts]
    together = answers(engine, requests, 4)
    assert sum(length for _, length in passes if length > 1) == 100 + 2 * 150 + 6 * 4
    for i, request in enumerate(requests):
        assert together[i] == answers(engine, [request])[0]


def test_the_same_prompt_with_many_seeds_is_read_once():
    engine, passes = counting_engine()
    ids = random_ids(90)
    requests = [
        Request(ids, max_new_tokens=4, sampling=SamplingOptions(1.0, seed=i)) for i in range(6)
    ]
    together = answers(engine, requests)
    assert [length for _, length in passes if length > 1] == [90]
    assert len({tuple(tokens) for tokens in together.values()}) > 1


def test_what_is_known_is_given_up_when_nobody_waits_for_it():
    engine = Engine(text_model(**LONG))
    begins = [random_ids(80, seed=i) for i in range(2)]
    requests = [
        Request(torch.cat([begins[i // 2], random_ids(3, seed=i)]), max_new_tokens=2)
        for i in range(4)
    ]
    generation = Generation(engine, requests, 1)
    most = 0
    for _ in generation.events():
        most = max(most, len(generation.shared.trunks))
    assert most == 1
    assert generation.shared.trunks == []


def test_only_plain_text_is_shared():
    """Pictures are the same ids whatever they show; an own cache is an own past."""
    model = vision_model()
    engine = Engine(model)
    ids = torch.tensor([*range(40), *range(40), 62, *[PATCH] * 4, 63, 5])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    requests = [
        Request(ids, pixels[i : i + 1], max_new_tokens=4, wants_experts=True) for i in range(2)
    ]
    requests.append(Request(ids[:80], cache=engine.prefill([1, 2]), max_new_tokens=4))
    shared = SharedPrefixes(list(enumerate(requests)))
    assert [shared.begin(i) for i in range(3)] == [(None, [])] * 3
    told = list(engine.generate(requests))
    firsts = [next(e for e in told if e.request == i) for i in range(2)]
    assert [len(event.experts) for event in firsts] == [len(ids)] * 2
    assert firsts[0].logprob != firsts[1].logprob


def test_common_length():
    random = np.random.default_rng(0)
    for length in (0, 1, 63, 64, 65, 200):
        begin = random.integers(0, 9, length)
        one = np.concatenate([begin, [1], random.integers(0, 9, 5)])
        other = np.concatenate([begin, [2], random.integers(0, 9, 90)])
        assert common_length(one, other) == common_length(other, one) == length
        assert common_length(begin, one) == length


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_rows_over_other_kinds_of_cache(kv_dtype):
    model = text_model(**LONG)
    engine = Engine(model, cache_options=CacheOptions(kv_dtype))
    begin = random_ids(250)
    requests = [
        Request(torch.cat([begin, random_ids(2 + i, seed=i)]), max_new_tokens=12) for i in range(3)
    ]
    together = answers(engine, requests)
    for i, request in enumerate(requests):
        alone = answers(Engine(model, cache_options=CacheOptions(kv_dtype)), [request])[0]
        assert len(together[i]) == len(alone) == 12
        if kv_dtype == "bf16":  # codes depend on where the tail of a fork begins
            assert together[i] == alone


def test_drawing_for_all_is_drawing_for_each():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 300, generator=generator)
    never = torch.tensor([7, 9])

    def samplers() -> list[Sampler]:
        return [
            Sampler(SamplingOptions(**{**vars(SAMPLINGS[i % 4]), "seed": i}), [1], never, logits[0])
            for i in range(12)
        ]

    together, alone = samplers(), samplers()
    for _ in range(5):
        drawn = choose_all(together, logits)
        for (token, logprob), sampler, logits_V in zip(drawn, alone, logits, strict=True):
            expected = sampler.choose(logits_V)
            assert token == expected[0]
            assert logprob == pytest.approx(expected[1], abs=1e-5)
