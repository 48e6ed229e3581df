"""What is kept of a teacher's distribution: against a plain loop, and unbiased over many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from l4cli.data.teacher_entries import (
    ZERO_CODE,
    decode_entries,
    decode_entropy,
    encode_entries,
    encode_entropy,
    row_uniforms,
)
from l4cli.errors import L4Error
from l4cli.ops.sparse_targets import Entries, sparse_targets

D = 8


def states(num: int, vocab_size: int, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    h_MD = torch.randn(num, D, generator=generator) * scale
    weight_VD = torch.randn(vocab_size, D, generator=generator)
    labels_M = torch.randint(0, vocab_size, (num,), generator=generator)
    return h_MD, weight_VD, labels_M, torch.rand(num, generator=generator, dtype=torch.float64)


def kept(h_MD, weight_VD, labels_M, uniforms_M, num_exact=4, num_drawn=6, **options) -> Entries:
    sizes = {"num_exact": num_exact, "num_drawn": num_drawn, "uniforms_M": uniforms_M}
    return sparse_targets(h_MD, weight_VD, labels_M, **{"temperature": 1.0, **sizes, **options})


def weights_of(entries: Entries, num_exact: int) -> torch.Tensor:
    """The weights without the rounding of a file: exact ones, then shares of what is left."""
    counts_MN = entries.counts_MN.double()
    exact_MX = entries.probabilities_MX.double()
    rest_M1 = 1 - exact_MX.sum(-1, keepdim=True)
    drawn_MN = rest_M1 * counts_MN / counts_MN.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([exact_MX, drawn_MN], dim=1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_is_the_plain_loop(temperature) -> None:
    """One token at a time, in double precision, drawing with a while loop."""
    h_MD, weight_VD, labels_M, uniforms_M = states(40, 50, scale=0.7)
    found = kept(h_MD, weight_VD, labels_M, uniforms_M, temperature=temperature, chunk=7)
    for m in range(40):
        logits = [float(h_MD[m].double() @ row.double()) / temperature for row in weight_VD]
        total = sum(math.exp(x) for x in logits)
        p = [math.exp(x) / total for x in logits]
        label = int(labels_M[m])
        others = sorted((v for v in range(50) if v != label), key=lambda v: -p[v])[:3]
        tail = [0.0 if v in (label, *others) else p[v] for v in range(50)]
        counts: dict[int, int] = {}
        for i in range(6):
            point, v, reached = (float(uniforms_M[m]) + i) / 6 * sum(tail), 0, tail[0]
            while reached <= point:
                v += 1
                reached += tail[v]
            counts[v] = counts.get(v, 0) + 1
        drawn = list(counts)
        assert found.ids_MK[m].tolist() == [label, *others, *drawn, *[0] * (6 - len(drawn))]
        assert found.counts_MN[m].tolist() == [*counts.values(), *[0] * (6 - len(drawn))]
        want = torch.tensor([p[v] for v in (label, *others)])
        torch.testing.assert_close(found.probabilities_MX[m], want, rtol=2e-5, atol=1e-8)
        entropy = -sum(x * math.log(x) for x in p)
        assert float(found.entropy_M[m]) == pytest.approx(entropy, abs=1e-5)


def test_chunks_and_padding_rows_of_the_head_do_not_matter() -> None:
    h_MD, weight_VD, labels_M, uniforms_M = states(30, 64)
    whole = kept(h_MD, weight_VD, labels_M, uniforms_M)
    padded_VD = torch.cat([weight_VD, torch.full((16, D), 9.0)])
    for chunk in (1, 8, None):
        parts = kept(h_MD, padded_VD, labels_M, uniforms_M, vocab_size=64, chunk=chunk)
        assert torch.equal(parts.ids_MK, whole.ids_MK)
        assert torch.equal(parts.counts_MN, whole.counts_MN)
        torch.testing.assert_close(parts.probabilities_MX, whole.probabilities_MX)
    none = kept(h_MD[:0], weight_VD, labels_M[:0], uniforms_M[:0])
    assert none.ids_MK.shape == (0, 10)
    assert none.counts_MN.shape == (0, 6)


def test_mean_over_draws_is_the_distribution_and_its_gradient() -> None:
    """100,000 draws of each of 6 tokens, through the codes of the file: within 1 percent.

    The mean weights are within 1 percent of the teacher in total variation and for each token of
    probability 0.02 or more, and within 5 standard errors for every token; the student's gradient
    over the logits, p_S - w, within 1 percent of p_S - p in norm.
    """
    num_draws, num_exact, num_drawn, vocab_size = 100_000, 4, 16, 100
    h_MD, weight_VD, labels_M, _ = states(6, vocab_size, seed=3, scale=0.6)
    p_MV = (h_MD.double() @ weight_VD.double().T).softmax(-1)
    student_MV = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(1))
    student_MV = student_MV.double().softmax(-1)
    assert (p_MV.gather(1, labels_M[:, None]) < 0.1).any()
    for m in range(6):
        uniforms = row_uniforms(5, "digest", m, num_draws)
        found = kept(
            h_MD[m].expand(num_draws, D),
            weight_VD,
            labels_M[m].expand(num_draws),
            torch.from_numpy(uniforms[:, 0]),
            num_exact,
            num_drawn,
        )
        entries = encode_entries(
            found.ids_MK.numpy(),
            found.probabilities_MX.numpy(),
            found.counts_MN.numpy(),
            uniforms[:, 1],
        )
        ids, weights = decode_entries(entries, num_exact)
        assert np.abs(weights.sum(1) - 1).max() < 1e-6
        mean_V = np.bincount(ids.ravel(), weights.ravel(), minlength=vocab_size) / num_draws
        p_V = p_MV[m].numpy()
        assert 0.5 * np.abs(mean_V - p_V).sum() < 0.01
        assert np.abs(mean_V / p_V - 1)[p_V >= 0.02].max() < 0.01
        # A drawn token has weight r / m or nothing, an exact one moves by at most 1 / 512.
        step = max(1 - float(p_MV[m, found.ids_MK[0, :4]].sum()), 0) / num_drawn
        error_V = np.sqrt((p_V * step + (p_V / 512) ** 2) / num_draws)
        assert (np.abs(mean_V - p_V) < 5 * error_V).all()
        gradient, wanted = student_MV[m].numpy() - mean_V, student_MV[m].numpy() - p_V
        assert np.linalg.norm(gradient - wanted) < 0.01 * np.linalg.norm(wanted)


def test_every_draw_hits_the_tail_as_often_as_its_share_says() -> None:
    """Systematic draws: a token with share s of the tail gets floor or ceil of m s, no other."""
    h_MD, weight_VD, labels_M, uniforms_M = states(200, 30, seed=4)
    found = kept(h_MD, weight_VD, labels_M, uniforms_M, num_exact=3, num_drawn=20)
    p_MV = (h_MD.double() @ weight_VD.double().T).softmax(-1)
    tail_MV = p_MV.scatter(1, found.ids_MK[:, :3], 0)
    expected_MV = 20 * tail_MV / tail_MV.sum(-1, keepdim=True)
    counts_MV = torch.zeros(200, 30, dtype=torch.int64)
    counts_MV.scatter_add_(1, found.ids_MK[:, 3:], found.counts_MN)
    assert (counts_MV.sum(1) == 20).all()
    assert ((counts_MV - expected_MV).abs() < 1 + 1e-4).all()
    assert (counts_MV.gather(1, found.ids_MK[:, :3]) == 0).all()


def test_extreme_shifts_and_tails_hit_a_token_of_the_tail() -> None:
    """The last point must not fall off the end, nor on a token without probability."""
    vocab_size = 1000
    logits_V = torch.full((vocab_size,), -200.0)  # underflows to probability 0
    logits_V[3], logits_V[10], logits_V[500], logits_V[700] = 5.0, 4.0, -10.0, -14.0
    weight_VD = torch.zeros(vocab_size, D)
    weight_VD[:, 0] = logits_V
    h_MD = torch.zeros(3, D)
    h_MD[:, 0] = 1
    uniforms_M = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    labels_M = torch.full((3,), 3)
    found = kept(h_MD, weight_VD, labels_M, uniforms_M, num_exact=2, num_drawn=9)
    assert found.ids_MK[:, :2].tolist() == [[3, 10]] * 3
    for m in range(3):
        used = found.counts_MN[m] > 0
        assert set(found.ids_MK[m, 2:][used].tolist()) <= {500, 700}
        assert int(found.counts_MN[m].sum()) == 9


def test_unused_columns() -> None:
    """A vocabulary smaller than the columns, and a tail that is empty."""
    h_MD, weight_VD, labels_M, uniforms_M = states(20, 5)
    found = kept(h_MD, weight_VD, labels_M, uniforms_M, num_exact=8, num_drawn=3)
    assert [sorted(row) for row in found.ids_MK[:, :5].tolist()] == [[0, 1, 2, 3, 4]] * 20
    assert (found.ids_MK[:, 5:] == 0).all()
    assert (found.probabilities_MX[:, 5:] == 0).all()
    assert (found.counts_MN == 0).all()
    torch.testing.assert_close(found.probabilities_MX.sum(1), torch.ones(20))
    entries = encode_entries(
        found.ids_MK.numpy(),
        found.probabilities_MX.numpy(),
        found.counts_MN.numpy(),
        uniforms_M.numpy(),
    )
    _, weights = decode_entries(entries, 8)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert (weights[:, 5:] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad) -> None:
    h_MD, weight_VD, labels_M, uniforms_M = states(4, 20)
    weight_VD[7] = 0
    weight_VD[7, 0], h_MD[:, 0] = bad, 1.0
    with pytest.raises(L4Error, match="not finite"):
        kept(h_MD, weight_VD, labels_M, uniforms_M)


def test_bf16_states_are_those_of_fp32_products() -> None:
    h_MD, weight_VD, labels_M, uniforms_M = states(16, 40)
    found = kept(h_MD.bfloat16(), weight_VD, labels_M, uniforms_M)
    p_MV = (h_MD.bfloat16() @ weight_VD.bfloat16().T).float().softmax(-1)
    want = p_MV.gather(1, found.ids_MK[:, :4])
    torch.testing.assert_close(found.probabilities_MX, want, rtol=1e-5, atol=1e-8)


def test_codes_are_unbiased_and_worked_by_hand() -> None:
    # exp(-1/512) = 0.998049: 0.999 lies between it and 1, at 0.4874 of the way up.
    p = np.full((100_000, 1), 0.999, np.float32)
    uniforms = (np.arange(100_000) + 0.5) / 100_000
    codes = encode_entries(np.zeros((100_000, 1), np.int64), p, None, uniforms)[:, 0]
    assert set(codes.tolist()) == {0, 1}
    assert abs(np.mean(codes == 0) - 0.48744) < 2e-4
    for value in (1.0, 0.73, 1e-3, 3e-9, 1.3e-14, 5e-15, 0.0):
        column = np.full((100_000, 2), value, np.float64)
        column[:, 1] = 1 - value  # so that nothing is normalised
        ids = np.tile(np.array([5, 6]), (100_000, 1))
        entries = encode_entries(ids, column, np.zeros((100_000, 0), np.int64), uniforms)
        code = (entries[:, 0] & ZERO_CODE).astype(np.float64)
        decoded = np.where(code == ZERO_CODE, 0, np.exp(-code / 512))
        assert abs(decoded.mean() - value) <= 1e-4 * value
        assert (entries >> 14 == ids).all()


def test_the_order_of_label_and_likeliest_is_kept() -> None:
    """However close they are, and whatever the rounding."""
    rng = np.random.default_rng(0)
    first = rng.uniform(0.01, 0.5, 20_000)
    ratio = np.exp(rng.normal(0, 1e-3, 20_000))
    ratio[:100] = 1.0
    p = np.stack([first * ratio, first, first * 0.9999], axis=1)
    ids = np.tile(np.array([1, 2, 3]), (20_000, 1))
    entries = encode_entries(ids, p, np.ones((20_000, 0), np.int64), rng.random(20_000))
    codes = (entries & ZERO_CODE).astype(np.int64)
    is_first = p[:, 0] >= p[:, 1]
    assert 0.3 < is_first.mean() < 0.7
    assert ((codes[:, 0] <= codes[:, 1]) == is_first).all()
    assert (codes[:, 1] <= codes[:, 2]).all()


def test_without_draws_the_rest_is_scaled_to_one() -> None:
    """As for an endpoint that tells a few likely tokens: three of four columns, by hand."""
    ids = np.array([[9, 4, 7, 0]])
    p = np.array([[0.25, 0.5, 0.05, 0.0]])
    entries = encode_entries(ids, p, None, np.array([0.5]))
    assert entries[0, 3] == ZERO_CODE
    found, weights = decode_entries(entries, 4)
    assert found.tolist() == [[9, 4, 7, 0]]
    np.testing.assert_allclose(weights[0], np.array([0.25, 0.5, 0.05, 0]) / 0.8, rtol=3e-3)
    assert weights.sum() == pytest.approx(1, abs=1e-6)


def test_entropy_codes_are_unbiased() -> None:
    uniforms = (np.arange(50_000) + 0.5) / 50_000
    for nats in (0.0, 1e-4, 0.02, 1.7, 8.3, 12.4766):
        codes = encode_entropy(np.full(50_000, nats), uniforms)
        decoded = decode_entropy(codes)
        assert abs(decoded.mean(dtype=np.float64) - nats) < 1e-5 + 1e-5 * nats
        assert np.abs(decoded - nats).max() < 0.07  # a step is 2 sqrt(nats / 5200)


def test_uniforms_are_a_rows_own() -> None:
    first = row_uniforms(0, "a" * 64, 3, 100)
    assert first.shape == (100, 2)
    assert first.min() >= 0
    assert first.max() < 1
    np.testing.assert_array_equal(first, row_uniforms(0, "a" * 64, 3, 100))
    others = [row_uniforms(1, "a" * 64, 3, 100), row_uniforms(0, "b" * 64, 3, 100)]
    others.append(row_uniforms(0, "a" * 64, 4, 100))
    assert all((first != other).all() for other in others)
