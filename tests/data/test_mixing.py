"""Mixing: what a spec means, exact shares, permutations, and the state of a mixture."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from l4cli.data.mixing import Mixture, Part, parse_mixture, permuted, whole_weights
from l4cli.errors import UsageError


def test_specs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "run:3"):
        Path(name).mkdir()
    assert parse_mixture(["a/", "b"]) == [Part(Path("a")), Part(Path("b"))]
    assert parse_mixture(["a/:0.7", "b:3"]) == [
        Part(Path("a"), Fraction(7, 10)),
        Part(Path("b"), Fraction(3)),
    ]
    # A folder whose own name ends in a colon and digits.
    assert parse_mixture(["run:3"]) == [Part(Path("run:3"))]
    assert parse_mixture(["run:3:0.5"]) == [Part(Path("run:3"), Fraction(1, 2))]
    assert parse_mixture(["run:4"]) == [Part(Path("run"), Fraction(4))]
    assert parse_mixture(["C:none"]) == [Part(Path("C:none"))]
    assert parse_mixture(["a:1e-3"]) == [Part(Path("a"), Fraction(1, 1000))]
    assert parse_mixture(["a:1e999999999"]) == [Part(Path("a:1e999999999"))]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], "no data"),
        (["a:0.5", "b"], "`b` has no weight"),
        (["a:0", "b:1"], "weight 0"),
        (["a:-1", "b:1"], "weight -1"),
        (["a", "./a/"], "named twice"),
        (["a:1", "a:2"], "named twice"),
    ],
)
def test_bad_specs(specs, words) -> None:
    with pytest.raises(UsageError) as caught:
        parse_mixture(specs)
    assert words in caught.value.what
    assert caught.value.exit_code == 2


def test_weights_are_normalised_exactly() -> None:
    parts = [Part(Path("a"), Fraction("0.7")), Part(Path("b"), Fraction("0.3"))]
    assert whole_weights(parts, [5, 1000]) == [7, 3]
    assert whole_weights([Part(Path("a")), Part(Path("b"))], [20, 50]) == [2, 5]


def test_shares_hold_at_every_sample() -> None:
    mixture = Mixture([7, 3, 1], [1000, 10, 5], seed=0)
    for n in range(1, 2000):
        mixture.draw()
        shares = [n * weight / 11 for weight in (7, 3, 1)]
        assert all(abs(c - s) < 1 for c, s in zip(mixture.counts, shares, strict=True))
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.integers(1, 100, 12).tolist()
        mixture = Mixture(weights, [9] * 12, seed=0)
        for n in range(1, 300):
            mixture.draw()
            shares = [n * weight / sum(weights) for weight in weights]
            assert max(c - s for c, s in zip(mixture.counts, shares, strict=True)) < 1
            assert max(s - c for c, s in zip(mixture.counts, shares, strict=True)) < 2


def test_without_weights_an_epoch_sees_every_row_once() -> None:
    sizes = [13, 1, 40]
    weights = whole_weights([Part(Path(n)) for n in "abc"], sizes)
    mixture = Mixture(weights, sizes, seed=5)
    for epoch in range(3):
        seen = []
        for _ in range(sum(sizes)):
            dataset, its_epoch, place = mixture.draw()
            assert its_epoch == epoch
            seen.append((dataset, mixture.row(dataset, its_epoch, place)))
        assert sorted(seen) == [(d, row) for d, size in enumerate(sizes) for row in range(size)]


def test_state_is_the_counts() -> None:
    mixture = Mixture([2, 5], [7, 9], seed=1)
    first = [mixture.draw() for _ in range(100)]
    other = Mixture([2, 5], [7, 9], seed=1)
    for _ in range(37):
        other.draw()
    resumed = Mixture([2, 5], [7, 9], seed=1)
    resumed.counts = list(other.counts)
    assert [resumed.draw() for _ in range(63)] == first[37:]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 255, 256, 257, 4097])
def test_permutation_is_one(size) -> None:
    assert sorted(permuted(i, size, "0/0/0") for i in range(size)) == list(range(size))


def test_permutation_is_far_from_order_and_differs() -> None:
    size = 3000
    one = np.array([permuted(i, size, "0/0/0") for i in range(size)])
    for key in ("0/0/1", "0/1/0", "1/0/0"):
        other = np.array([permuted(i, size, key) for i in range(size)])
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.08
        assert (one == other).sum() < 12  # one agreement is expected by chance
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.08
    steps = np.diff(one) % size
    assert np.bincount(steps, minlength=size).max() < 12  # no step is preferred


def test_every_place_is_reached_evenly() -> None:
    """Chi-squared over keys: where place 0 goes, for a size that is no power of two."""
    size, num = 11, 4000
    counts = np.bincount([permuted(0, size, f"{key}") for key in range(num)], minlength=size)
    chi_squared = ((counts - num / size) ** 2 / (num / size)).sum()
    assert chi_squared < 29.6  # 10 degrees of freedom, p = 0.001


def test_no_shuffle_keeps_the_order() -> None:
    mixture = Mixture([1], [4], seed=9, shuffle=False)
    assert [mixture.row(*mixture.draw()) for _ in range(6)] == [0, 1, 2, 3, 0, 1]
