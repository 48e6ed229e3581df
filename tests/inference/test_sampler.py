"""Each filter by hand, the whole order against transformers, the draw by its frequencies."""

from __future__ import annotations

import math

import pytest
import torch

from l4cli.errors import UsageError
from l4cli.inference.sampler import (
    Sampler,
    SamplingOptions,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    shape_logits,
)

NONE = torch.empty(0, dtype=torch.int64)
# Probabilities 0.5, 0.25, 0.125, 0.125, in a mixed order.
LOGITS = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


def test_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0])
    seen = torch.tensor([True, True, False, False])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [1.0, -4.0, 2.0, -2.0]


def test_top_k_keeps_ties_with_the_last():
    assert kept(keep_top_k(LOGITS, 1)) == [1]
    assert kept(keep_top_k(LOGITS, 2)) == [1, 3]
    assert kept(keep_top_k(LOGITS, 3)) == [0, 1, 2, 3]
    assert kept(keep_top_k(LOGITS, 99)) == [0, 1, 2, 3]


def test_top_p_keeps_the_fewest_that_reach_it():
    assert kept(keep_top_p(LOGITS, 1e-9)) == [1]
    assert kept(keep_top_p(LOGITS, 0.5)) == [1]
    assert kept(keep_top_p(LOGITS, 0.51)) == [1, 3]
    assert kept(keep_top_p(LOGITS, 0.76)) in ([0, 1, 3], [1, 2, 3])
    assert kept(keep_top_p(LOGITS, 0.9)) == [0, 1, 2, 3]


def test_top_p_beyond_the_first_candidates():
    logits = torch.zeros(5000)
    assert len(kept(keep_top_p(logits, 0.9))) == pytest.approx(4500, abs=2)
    assert len(kept(keep_top_p(logits, 0.01))) == pytest.approx(50, abs=1)


def test_min_p_is_relative_to_the_likeliest():
    assert kept(keep_min_p(LOGITS, 0.2)) == [0, 1, 2, 3]
    assert kept(keep_min_p(LOGITS, 0.3)) == [1, 3]
    assert kept(keep_min_p(LOGITS, 0.6)) == [1]


def test_same_survivors_as_transformers():
    process = pytest.importorskip("transformers").generation.logits_process
    generator = torch.Generator().manual_seed(0)
    for round_ in range(50):
        logits = 4 * torch.randn(1, 400, generator=generator)
        seen = torch.randint(0, 400, (1, 30), generator=generator)
        options = SamplingOptions(
            temperature=0.3 + 0.05 * round_,
            top_k=5 + 3 * round_,
            top_p=0.5 + 0.009 * round_,
            min_p=0.001 * round_,
            repetition_penalty=1 + 0.02 * round_,
        )
        chain = process.LogitsProcessorList(
            [
                process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
                process.TemperatureLogitsWarper(options.temperature),
                process.TopKLogitsWarper(options.top_k),
                process.TopPLogitsWarper(options.top_p),
                process.MinPLogitsWarper(options.min_p),
            ]
        )
        expected = chain(seen, logits.clone())[0]
        is_seen = torch.zeros(400, dtype=torch.bool)
        is_seen[seen[0]] = True
        got = shape_logits(logits[0], is_seen if round_ else None, options)
        torch.testing.assert_close(got, expected)


def test_draws_follow_the_probabilities_and_the_seed():
    options = SamplingOptions(temperature=1.0, seed=7)
    sampler = Sampler(options, [], NONE, LOGITS)
    drawn = [sampler.choose(LOGITS) for _ in range(4000)]
    counts = torch.bincount(torch.tensor([token for token, _ in drawn]), minlength=4) / 4000
    torch.testing.assert_close(counts, LOGITS.exp(), atol=0.03, rtol=0)
    for token, logprob in drawn[:20]:
        assert logprob == pytest.approx(float(LOGITS[token]), abs=1e-6)
    again = Sampler(options, [], NONE, LOGITS)
    assert [again.choose(LOGITS)[0] for _ in range(100)] == [token for token, _ in drawn[:100]]
    other = Sampler(SamplingOptions(temperature=1.0, seed=8), [], NONE, LOGITS)
    assert [other.choose(LOGITS)[0] for _ in range(100)] != [token for token, _ in drawn[:100]]


def test_a_tiny_temperature_is_nearly_greedy():
    options = SamplingOptions(temperature=1e-40)
    logits = torch.tensor([3.0, 5.0, 4.0])
    assert Sampler(options, [], NONE, logits).choose(logits)[0] == 1


def test_temperature_zero_is_greedy_and_the_penalty_still_holds():
    assert Sampler(SamplingOptions(), [], NONE, LOGITS).choose(LOGITS) == (
        1,
        pytest.approx(-math.log(2)),
    )
    logits = torch.tensor([3.0, 2.9, 0.0, 0.0])
    sampler = Sampler(SamplingOptions(repetition_penalty=1.1), [], NONE, LOGITS)
    assert [sampler.choose(logits)[0] for _ in range(3)] == [0, 1, 0]
    sampler = Sampler(SamplingOptions(repetition_penalty=1.1), [0], NONE, LOGITS)
    assert sampler.choose(logits)[0] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(UsageError, match="cannot sample"):
        SamplingOptions(**wrong)


def test_some_ids_are_never_chosen():
    for options in (SamplingOptions(), SamplingOptions(temperature=5.0)):
        sampler = Sampler(options, [], torch.tensor([1, 3]), LOGITS)
        drawn = {sampler.choose(LOGITS) for _ in range(50)}
        assert {token for token, _ in drawn} <= {0, 2}
        assert all(logprob == pytest.approx(math.log(0.125)) for _, logprob in drawn)
