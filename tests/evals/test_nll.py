"""Bits per byte by position, against one plain pass, and trends of curves drawn by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cli.tiny_chat import tiny_config

from l4cli.evals.needle import nll
from l4cli.inference import Engine
from l4cli.model import build_model
from l4cli.text import load_tokenizer

TOKENIZER = load_tokenizer("bytes")


def test_a_run_in_pieces_costs_what_one_pass_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(replace(tiny_config(), vision=None), seed=0)
    engine = Engine(model, num_token_ids=TOKENIZER.vocab_size, max_context=1 << 40)
    documents = [TOKENIZER.encode(text) for text in ("def f():\n", "    return 1\n" * 9, "f()\n")]
    monkeypatch.setattr(nll, "SCORED_AT_ONCE", 17)
    heard: list[int] = []
    found = nll.tally(engine, TOKENIZER.bos_id, documents, TOKENIZER.num_bytes(), heard.append)
    ids = torch.tensor([TOKENIZER.bos_id, *np.concatenate(documents).tolist()])
    with torch.no_grad():
        plain = model(ids[None])[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found.nats_T, -plain.numpy(), atol=1e-4)
    assert found.bytes_T.tolist() == [1] * (len(ids) - 1)
    assert heard[-1] == len(ids) - 1
    expected = float(-plain.double().sum()) / math.log(2) / (len(ids) - 1)
    assert found.bits_per_byte(0, len(ids) - 1) == pytest.approx(expected, rel=1e-5)


def test_without_bos_the_first_token_is_given() -> None:
    model = build_model(replace(tiny_config(), vision=None), seed=0)
    engine = Engine(model, num_token_ids=TOKENIZER.vocab_size, max_context=1 << 40)
    ids = TOKENIZER.encode("some text")
    found = nll.tally(engine, None, [ids], TOKENIZER.num_bytes())
    assert found.nats_T[0] == 0
    assert found.bytes_T.tolist() == [0, *[1] * 8]
    np.testing.assert_allclose(found.nats_T[1:], -engine.score(ids).numpy(), atol=1e-5)


def drawn(slope: float, length: int = 1 << 14, noise: float = 0.2) -> nll.Tally:
    """A curve that changes by `slope` bits with every doubling of the position."""
    bits = 3 + slope * np.log2(np.arange(1, length + 1))
    bits += noise * np.random.default_rng(0).standard_normal(length)
    return nll.Tally((bits * math.log(2)).astype(np.float32), np.ones(length, np.int64))


def test_a_falling_curve_falls_by_its_slope() -> None:
    found = nll.curve(drawn(-0.05))
    assert found["slope"] == pytest.approx(-0.05, abs=0.005)
    assert found["slope_low"] < found["slope"] < found["slope_high"] < 0
    assert found["falls"]
    assert not nll.curve(drawn(0.0))["falls"]
    assert not nll.curve(drawn(0.05))["falls"]


def test_a_start_that_any_context_helps_is_no_fall() -> None:
    found = drawn(0.0)
    found.nats_T[:200] += 5  # before any context
    assert not nll.curve(found)["falls"]


def test_buckets_cover_the_run_once_and_hold_its_means() -> None:
    found = drawn(-0.1, length=1000)
    for kind, edges in (("doubling", [0, 128, 256, 512, 1000]), ("linear", None)):
        buckets = nll.curve(found)[kind]
        if edges is not None:
            assert [b["first"] for b in buckets] + [1000] == edges
        assert [b["end"] for b in buckets[:-1]] == [b["first"] for b in buckets[1:]]
        assert (buckets[0]["first"], buckets[-1]["end"]) == (0, 1000)
        for b in buckets:
            mean = found.nats_T[b["first"] : b["end"]].astype(float).mean() / math.log(2)
            assert b["bits_per_byte"] == pytest.approx(mean, rel=1e-6)


def test_a_short_run_is_not_judged() -> None:
    assert nll.curve(drawn(-1, length=5))["falls"] is None


def test_documents_are_cut_to_the_length() -> None:
    documents = [np.arange(5), np.arange(7), np.arange(3)]
    assert [len(ids) for ids in nll.cut_to_length(documents, 9)] == [5, 4]
    assert [len(ids) for ids in nll.cut_to_length(documents, 12)] == [5, 7]
