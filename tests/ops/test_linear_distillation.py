"""Hard and soft targets against fp64 by plain autograd, and against numbers worked by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l4cli.ops.batch import SparseTargets
from l4cli.ops.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy
from l4cli.ops.distillation import (
    LINEAR_DISTILLATION,
    FullTargets,
    Mixing,
    linear_distillation,
)

M, D, TEACHER_D, V = 20, 8, 6, 23
FIGURES = ("hard_loss", "data_loss", "soft_loss", "soft_weight", "teacher_loss")
MIXINGS = [
    Mixing(
        alpha=alpha, factor=2.5, temperature=tau, adds=adds, gap_scale=scale, hard_from_teacher=t
    )
    for (alpha, adds), tau, scale, t in itertools.product(
        [(0.0, False), (0.3, False), (1.0, False), (0.3, True)],
        [1.0, 2.0],
        [None, 0.7],
        [False, True],
    )
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def student() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, head, labels and weights."""
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25]).repeat(M // 4)
    return normal(M, D), normal(V, D, seed=1), torch.arange(M) * 7 % 19, weights


def full(vocab_size: int = V) -> FullTargets:
    return FullTargets(normal(M, TEACHER_D, seed=2), normal(vocab_size, TEACHER_D, seed=3))


def sparse(tau: float) -> SparseTargets:
    """The label, three more tokens and four of the tail, of a made-up teacher."""
    p = (normal(M, V, seed=4) * 2).div(tau).softmax(-1)
    labels = student()[2].unsqueeze(-1)
    order = p.scatter(-1, labels, 2.0).argsort(-1, descending=True)
    ids = order[:, :8]
    weights = p.gather(-1, ids)
    weights[:, 4:] *= (1 - weights[:, :4].sum(-1, keepdim=True)) / weights[:, 4:].sum(-1, True)
    entropy = -(p * p.log()).sum(-1)
    return SparseTargets(ids, weights, entropy, num_exact=4, temperature=tau)


def in_fp64(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    targets: FullTargets | SparseTargets,
    mixing: Mixing,
) -> dict[str, Tensor]:
    """Token after token, each loss as its formula has it."""
    tau, sums = mixing.temperature, dict.fromkeys(("loss", *FIGURES), torch.zeros(()).double())
    for m, label in enumerate(labels.tolist()):
        logits = weight @ h[m]
        log_p, log_tau = logits.log_softmax(0), (logits / tau).log_softmax(0)
        if isinstance(targets, FullTargets):
            n = min(len(weight), len(targets.weight_VD))
            teacher = targets.weight_VD[:n].double() @ targets.h_MD[m].double()
            p, best = (teacher / tau).softmax(0), int(teacher.argmax())
            soft = sum(p[v] * (p[v].log() - log_tau[v]) for v in range(n))
            p_label = p[label]
        else:
            ids, p = targets.ids_MK[m], targets.weights_MK[m].double()
            best = int(ids[p[: targets.num_exact].argmax()])
            soft = -sum(p[k] * log_tau[ids[k]] for k in range(len(p))) - targets.entropy_M[m]
            p_label = p[0]
        soft = tau**2 * soft
        hard = -log_p[best if mixing.hard_from_teacher else label]
        share = 1.0 if mixing.adds else mixing.alpha
        if mixing.gap_scale is not None:
            gap = float((p_label.log() - log_tau[label]).detach())
            share = share / (1 + math.exp(-gap / mixing.gap_scale))
        loss = (1.0 if mixing.adds else 1 - share) * hard + mixing.factor * share * soft
        rows = (loss, hard, -log_p[label], soft, torch.tensor(share), -p_label.log())
        for name, value in zip(sums, rows, strict=True):
            sums[name] = sums[name] + weights[m].double() * value
    return sums


def assert_near(got: Tensor, want: Tensor, limit: float = 1e-5) -> None:
    scale = max(1.0, float(want.detach().abs().max()))
    assert (got.double() - want.double()).abs().max().item() <= limit * scale


def assert_like_fp64(targets: FullTargets | SparseTargets, mixing: Mixing, chunk: int) -> None:
    h, weight, labels, weights = student()
    leaves = [h.double().requires_grad_(), weight.double().requires_grad_()]
    want = in_fp64(*leaves, labels, weights, targets, mixing)
    want["loss"].backward()
    h.requires_grad_()
    weight.requires_grad_()
    for version in LINEAR_DISTILLATION.versions:
        h.grad = weight.grad = None
        loss, figures = version.load()(h, weight, labels, weights, targets, mixing, chunk)
        assert not figures.requires_grad
        for got, name in zip([loss, *figures], want, strict=True):
            assert_near(got.detach(), want[name].detach())
        loss.backward()
        assert_near(h.grad, leaves[0].grad)
        assert_near(weight.grad, leaves[1].grad)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_full_targets(mixing: Mixing) -> None:
    assert_like_fp64(full(), mixing, chunk=7)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_sparse_targets(mixing: Mixing) -> None:
    assert_like_fp64(sparse(mixing.temperature), mixing, chunk=7)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_rounded_weights_keep_gradient_and_loss_together(tau: float) -> None:
    targets = sparse(tau)
    targets = replace(targets, weights_MK=(targets.weights_MK * 50).round() / 50)
    assert_like_fp64(targets, Mixing(alpha=0.6, temperature=tau), chunk=7)


@pytest.mark.parametrize("vocab_size", [19, 21, 40])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_teacher_with_another_number_of_tokens(vocab_size: int, tau: float) -> None:
    mixing = Mixing(alpha=0.6, temperature=tau, gap_scale=1.0, hard_from_teacher=True)
    assert_like_fp64(full(vocab_size), mixing, chunk=8)


def by_hand() -> tuple[Tensor, Tensor, FullTargets]:
    """One token, where the student has logits 0, log 2, log 5 and the teacher 0, log 3, 0."""
    one = torch.ones(1, 1)
    logits = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    return one, logits, FullTargets(one, torch.tensor([[0.0], [math.log(3)], [0.0]]))


def test_hybrid_by_hand() -> None:
    # Student 1/8 2/8 5/8, teacher 1/5 3/5 1/5, label 0.
    h, weight, targets = by_hand()
    h.requires_grad_()
    weight.requires_grad_()
    mixing = Mixing(factor=2.0, adds=True)
    label, ones = torch.tensor([0]), torch.ones(1)
    got = linear_distillation(h, weight, label, ones, targets, mixing)
    hard = math.log(8)
    soft = 0.2 * math.log(8 / 5) + 0.6 * math.log(12 / 5) + 0.2 * math.log(8 / 25)
    assert got.loss.item() == pytest.approx(hard + 2 * soft, abs=1e-6)
    assert got.hard_loss.item() == pytest.approx(hard, abs=1e-6)
    assert got.soft_loss.item() == pytest.approx(soft, abs=1e-6)
    assert got.soft_weight.item() == 1
    assert got.teacher_loss.item() == pytest.approx(math.log(5), abs=1e-6)
    got.loss.backward()
    # p_S - onehot + 2 (p_S - p_T)
    want = [
        1 / 8 - 1 + 2 * (1 / 8 - 1 / 5),
        2 / 8 + 2 * (2 / 8 - 3 / 5),
        5 / 8 + 2 * (5 / 8 - 1 / 5),
    ]
    assert weight.grad.flatten().tolist() == pytest.approx(want, abs=1e-6)
    assert h.grad.item() == pytest.approx(want[1] * math.log(2) + want[2] * math.log(5), abs=1e-6)


def test_share_of_a_token_by_hand() -> None:
    h, weight, targets = by_hand()
    mixing = Mixing(alpha=0.8, gap_scale=0.5, hard_from_teacher=True)
    got = linear_distillation(h, weight, torch.tensor([2]), torch.ones(1), targets, mixing)
    gap = math.log(1 / 5) - math.log(5 / 8)
    share = 0.8 / (1 + math.exp(-gap / 0.5))
    soft = 0.2 * math.log(8 / 5) + 0.6 * math.log(12 / 5) + 0.2 * math.log(8 / 25)
    assert got.soft_weight.item() == pytest.approx(share, abs=1e-6)
    assert got.hard_loss.item() == pytest.approx(math.log(4), abs=1e-6)  # the teacher's token 1
    assert got.data_loss.item() == pytest.approx(math.log(8 / 5), abs=1e-6)
    assert got.loss.item() == pytest.approx((1 - share) * math.log(4) + share * soft, abs=1e-6)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_the_lead_over_the_targets_before(chunk: int | None, is_sparse: bool) -> None:
    """A plain loop over tokens: the mean gap of up to three before it in its document."""
    targets = sparse(1.0) if is_sparse else full()
    h, weight, labels, _weights = student()
    first = torch.tensor([0, 0, 0, 0, 0, 5, 5, 7] + [8] * (M - 8))
    mixing = Mixing(alpha=0.8, gap_scale=0.5, gap_window=3)
    ones = torch.ones(M)
    got = linear_distillation(h, weight, labels, ones, targets, mixing, chunk, first)
    gaps, total = [], 0.0
    log_p = (h @ weight.T).double().log_softmax(-1)
    teacher = log_of(targets)
    for m in range(M):
        seen = gaps[max(int(first[m]), m - 3) : m]
        lead = (sum(seen) + 4 * 1.0) / (len(seen) + 4)
        total += 0.8 / (1 + math.exp(-lead / 0.5))
        gaps.append(float(teacher[m] - log_p[m, labels[m]]))
    assert got.soft_weight.item() == pytest.approx(total, rel=1e-5)
    assert min(gaps) < -1 < 1 < max(gaps)  # both were ahead somewhere


def log_of(targets: FullTargets | SparseTargets) -> Tensor:
    """log p_T of the labels."""
    if isinstance(targets, SparseTargets):
        return targets.weights_MK[:, 0].log()
    logits = (targets.h_MD @ targets.weight_VD.T).double()
    return logits.log_softmax(-1).gather(-1, student()[2].unsqueeze(-1)).squeeze(-1)


def test_the_tokens_own_label_does_not_move_its_share() -> None:
    """Else the expected target would be neither the teacher's nor the data's."""
    h, weight, labels, _weights = student()
    mixing = Mixing(alpha=0.8, gap_scale=0.5, gap_window=8)
    shares = []
    for last in (0, 1):
        labels = labels.clone()
        labels[-1] = last
        got = linear_distillation(h, weight, labels, torch.ones(M), full(), mixing)
        shares.append(got.soft_weight.item())
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)


def test_temperature_by_hand() -> None:
    # Logits 0 and log 16 for the student, 0 and log 81 for the teacher; at 2: 1/5 4/5, 1/10 9/10.
    one = torch.ones(1, 1)
    weight = torch.tensor([[0.0], [math.log(16)]]).requires_grad_()
    targets = FullTargets(one, torch.tensor([[0.0], [math.log(81)]]))
    mixing = Mixing(alpha=0.25, temperature=2.0)
    got = linear_distillation(one, weight, torch.tensor([0]), torch.ones(1), targets, mixing)
    soft = 4 * (0.1 * math.log(5 / 10) + 0.9 * math.log(9 / 8))
    assert got.loss.item() == pytest.approx(0.75 * math.log(17) + 0.25 * soft, abs=1e-6)
    assert got.teacher_loss.item() == pytest.approx(math.log(10), abs=1e-6)
    got.loss.backward()
    want = 0.75 * (1 / 17 - 1) + 0.25 * 2 * (1 / 5 - 1 / 10)
    assert weight.grad.flatten().tolist() == pytest.approx([want, -want], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_an_equal_teacher_gives_no_gradient(dtype: torch.dtype, tau: float) -> None:
    h, weight, labels, weights = student()
    h, weight = h.to(dtype).requires_grad_(), (3 * weight).requires_grad_()
    mixing = Mixing(alpha=1.0, factor=0.7, temperature=tau)
    got = linear_distillation(h, weight, labels, weights, FullTargets(h, weight), mixing, chunk=6)
    got.loss.backward()
    assert not h.grad.any()
    assert not weight.grad.any()
    assert abs(got.loss.item()) <= 1e-5


@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_an_equal_teacher_leaves_the_hard_half(tau: float) -> None:
    h, weight, labels, weights = student()
    h.requires_grad_()
    mixing = Mixing(alpha=1.0, factor=3.0, temperature=tau, gap_scale=0.5)  # sigmoid(0) is 1/2
    linear_distillation(h, weight, labels, weights, FullTargets(h, weight), mixing).loss.backward()
    mixed, h.grad = h.grad, None
    linear_cross_entropy(h, weight, labels, weights).backward()
    assert_near(mixed, h.grad / 2)


@pytest.mark.parametrize("mixing", [Mixing(alpha=0.4, gap_scale=1.0), Mixing(temperature=2.0)])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_chunk_changes_nothing(mixing: Mixing, is_sparse: bool) -> None:
    targets = sparse(mixing.temperature) if is_sparse else full()
    results = []
    for chunk in (1, 6, M, 100, None):
        h, weight, labels, weights = student()
        h.requires_grad_()
        weight.requires_grad_()
        got = linear_distillation(h, weight, labels, weights, targets, mixing, chunk)
        got.loss.backward()
        figures = torch.stack([getattr(got, name) for name in FIGURES])
        results.append((got.loss.detach(), figures, h.grad, weight.grad))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_near(got, want, 2e-6)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_bf16_loses_no_more_than_the_plain_version(is_sparse: bool, tau: float) -> None:
    h, weight, labels, weights = student()
    low = h.bfloat16()
    targets = sparse(tau) if is_sparse else FullTargets(full().h_MD.bfloat16(), full().weight_VD)
    mixing = Mixing(alpha=0.5, temperature=tau)

    def gradients(h: Tensor, name: str, targets: FullTargets | SparseTargets) -> list[Tensor]:
        leaves = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
        run = LINEAR_DISTILLATION.named(name).load()
        run(*leaves, labels, weights, targets, mixing, 7)[0].backward()
        return [leaf.grad for leaf in leaves]

    in_fp32 = targets
    if isinstance(targets, FullTargets):
        in_fp32 = FullTargets(targets.h_MD.float(), targets.weight_VD)
    exact = gradients(low.float(), "reference", in_fp32)
    plain, ours = gradients(low, "reference", targets), gradients(low, "chunked", targets)
    assert [grad.dtype for grad in ours] == [torch.bfloat16, torch.float32]
    for got, other, want in zip(ours, plain, exact, strict=True):
        error, allowed = ((x.float() - want).norm() for x in (got, other))
        assert error <= 2 * allowed + 1e-6 * want.norm()


@pytest.mark.parametrize("kind", ["full", "sparse", "none"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_no_token_is_no_loss_and_no_gradient(kind: str, tau: float) -> None:
    h = torch.empty(0, D, requires_grad=True)
    weight = normal(V, D).requires_grad_()
    nothing = torch.empty(0)
    targets = {
        "full": FullTargets(torch.empty(0, TEACHER_D), normal(V, TEACHER_D)),
        "sparse": SparseTargets(
            torch.empty(0, 4, dtype=torch.long), torch.empty(0, 4), nothing, 2, tau
        ),
        "none": None,
    }[kind]
    mixing = Mixing(alpha=0.0 if targets is None else 0.5, temperature=tau)
    got = linear_distillation(h, weight, nothing.long(), nothing, targets, mixing)
    got.loss.backward()
    assert got.loss.item() == 0
    assert all(getattr(got, name).item() == 0 for name in FIGURES)
    assert h.grad.shape == (0, D)
    assert not weight.grad.any()


def test_the_share_follows_who_is_ahead() -> None:
    _, _, labels, weights = student()
    heads = torch.eye(V)
    knows, errs = 40 * heads[labels], 40 * heads[(labels + 1) % V]
    mixing = Mixing(alpha=0.9, gap_scale=1.0)
    total = weights.sum().item()
    ahead = linear_distillation(errs, heads, labels, weights, FullTargets(knows, heads), mixing)
    behind = linear_distillation(knows, heads, labels, weights, FullTargets(errs, heads), mixing)
    assert ahead.soft_weight.item() == pytest.approx(0.9 * total, rel=1e-6)
    assert behind.soft_weight.item() < 1e-15 * total
    assert behind.loss.item() == pytest.approx(behind.data_loss.item(), abs=1e-6)


def sparse_result(targets: SparseTargets, mixing: Mixing) -> list[Tensor]:
    h, weight, labels, weights = student()
    h.requires_grad_()
    weight.requires_grad_()
    got = linear_distillation(h, weight, labels, weights, targets, mixing)
    got.loss.backward()
    return [*(getattr(got, name).detach() for name in ("loss", *FIGURES)), h.grad, weight.grad]


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_unused_columns_and_tokens_drawn_twice(tau: float) -> None:
    targets, mixing = sparse(tau), Mixing(temperature=tau, hard_from_teacher=True)
    want = sparse_result(targets, mixing)
    ids, weights = targets.ids_MK, targets.weights_MK
    unused = replace(
        targets,
        ids_MK=torch.cat([ids, torch.zeros(M, 2, dtype=torch.long)], -1),
        weights_MK=torch.cat([weights, torch.zeros(M, 2)], -1),
    )
    twice = replace(
        targets,
        ids_MK=torch.cat([ids, ids[:, 4:]], -1),
        weights_MK=torch.cat([weights[:, :4], weights[:, 4:] / 2, weights[:, 4:] / 2], -1),
    )
    for other in (unused, twice):
        for got, same in zip(sparse_result(other, mixing), want, strict=True):
            assert_near(got, same, 2e-6)


class Logits(TorchDispatchMode):
    """Watches every operation for new storages that could hold a chunk of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() >= 2 * CHUNK_ELEMENTS:
                self.sizes[leaf.data_ptr()] = leaf.untyped_storage().nbytes()
                self.kept.append(leaf)
        return out


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_few_chunks_of_logits_whatever_the_number_of_tokens(kind: str, tau: float) -> None:
    num_tokens, vocab_size = 200, 2**15  # four chunks, the last one shorter
    h, weight = normal(num_tokens, 4).requires_grad_(), normal(vocab_size, 4).requires_grad_()
    labels, ones = torch.arange(num_tokens), torch.ones(num_tokens)
    targets: FullTargets | SparseTargets = FullTargets(normal(num_tokens, 4), normal(vocab_size, 4))
    if kind == "sparse":
        targets = SparseTargets(labels[:, None], ones[:, None], 0 * ones, 1, tau)
    with Logits() as logits:
        mixing = Mixing(temperature=tau, gap_scale=1.0)
        linear_distillation(h, weight, labels, ones, targets, mixing).loss.backward()
    assert len(logits.sizes) == (3 if kind == "full" else 2)
    assert max(logits.sizes.values()) <= 4 * CHUNK_ELEMENTS


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_all_tokens_as_sparse_targets_equal_the_full_teacher(tau: float) -> None:
    targets = full()
    p = (targets.h_MD @ targets.weight_VD.T / tau).softmax(-1)
    labels = student()[2].unsqueeze(-1)
    ids = p.scatter(-1, labels, 2.0).argsort(-1, descending=True)
    entropy = -(p * p.log()).sum(-1)
    listed = SparseTargets(ids, p.gather(-1, ids), entropy, num_exact=V, temperature=tau)
    mixing = Mixing(alpha=0.6, temperature=tau, gap_scale=0.8, hard_from_teacher=True)
    results = []
    for kind in (targets, listed):
        h, weight, _, weights = student()
        h.requires_grad_()
        weight.requires_grad_()
        got = linear_distillation(h, weight, labels.flatten(), weights, kind, mixing)
        got.loss.backward()
        figures = torch.stack([getattr(got, name) for name in ("loss", *FIGURES)]).detach()
        results.append((figures, h.grad, weight.grad))
    for got, want in zip(*results, strict=True):
        assert_near(got, want)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    h, weight, labels, weights = student()
    got = linear_distillation(h, weight, labels, weights, None, Mixing(alpha=0.0))
    want = linear_cross_entropy(h, weight, labels, weights)
    assert torch.equal(got.loss, want)
    assert torch.equal(got.data_loss, want)
    assert got.soft_weight.item() == 0
    for mixing in (Mixing(), Mixing(alpha=0.0, adds=True), Mixing(0.0, hard_from_teacher=True)):
        with pytest.raises(AssertionError, match="no teacher"):
            linear_distillation(h, weight, labels, weights, None, mixing)


def test_targets_of_another_temperature_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="temperature"):
        linear_distillation(*student(), sparse(2.0), Mixing(temperature=1.0))


def test_nothing_of_the_teacher_gets_gradients_and_no_input_changes() -> None:
    h, weight, labels, weights = student()
    teacher = [x.clone().requires_grad_() for x in (full().h_MD, full().weight_VD)]
    listed = sparse(1.0)
    before = [x.clone() for x in (listed.ids_MK, listed.weights_MK, listed.entropy_M)]
    for targets in (FullTargets(*teacher), listed):
        linear_distillation(
            h.requires_grad_(), weight, labels, weights, targets, Mixing()
        ).loss.backward()
    assert all(x.grad is None for x in teacher)
    after = (listed.ids_MK, listed.weights_MK, listed.entropy_M)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert weight.grad is None
