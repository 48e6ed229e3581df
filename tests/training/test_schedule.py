"""Learning rates worked by hand."""

from __future__ import annotations

import math

import pytest

from l4cli.training.schedule import Schedule


def test_wsd_warms_up_stays_and_decays() -> None:
    schedule = Schedule("wsd", 1.0, 0.1, num_steps=20, num_warmup=4, decay_frac=0.2)
    assert [schedule.lr(t) for t in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [schedule.lr(t) for t in range(4, 16)] == [1.0] * 12
    tail = [0.1 + 0.9 * (1 - math.sqrt(p)) for p in (0.2, 0.4, 0.6, 0.8)]
    assert [schedule.lr(t) for t in range(16, 20)] == pytest.approx(tail)
    assert schedule.lr(20) == 0.1
    assert schedule.first_decay_step == 16


def test_wsd_linear_tail() -> None:
    schedule = Schedule("wsd", 2.0, 0.0, 9, 0, 1 / 3, "linear")
    rates = [schedule.lr(t) for t in range(9)]
    assert rates == pytest.approx([2.0] * 6 + [1.5, 1.0, 0.5])


def test_cosine_and_linear_head_for_the_minimum() -> None:
    cosine = Schedule("cosine", 1.0, 0.0, 4, 1)
    half = math.sqrt(0.5) / 2
    assert [cosine.lr(t) for t in range(5)] == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half, 0])
    linear = Schedule("linear", 1.0, 0.5, 4, 1)
    assert [linear.lr(t) for t in range(5)] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])


def test_constant_never_decays() -> None:
    schedule = Schedule("constant", 3.0, 0.0, 4, 2)
    assert [schedule.lr(t) for t in range(4)] == [1.5, 3.0, 3.0, 3.0]
    assert schedule.first_decay_step == 4


def test_warmup_longer_than_the_run() -> None:
    schedule = Schedule("wsd", 1.0, 0.0, 3, 10)
    assert [schedule.lr(t) for t in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_a_longer_run_has_its_decay_later() -> None:
    schedule = Schedule("wsd", 1.0, 0.0, 10, 0)
    assert schedule.first_decay_step == 8
    assert schedule.with_steps(20).first_decay_step == 16
