"""The loss over hard and soft targets, a chunk of tokens at a time.

in: a student's hidden states and head, labels and their weights; a teacher's states and head, or
a few of its probabilities; out: the weighted sum of both losses, and the figures to log
source: Hinton et al. 2015 (1503.02531); sparse targets as in 2503.16870. Gradients p - target are
made in the forward, in three buffers of a chunk's logits that all chunks share
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l4cli.ops.batch import SparseTargets
from l4cli.ops.choice import REFERENCE, Op, Version
from l4cli.ops.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy, logits_into

_NUM_FIGURES = 5


@dataclass(frozen=True)
class FullTargets:
    """A teacher's states and head, whose softmax is the soft target; nothing of it gets gradients.

    Both vocabularies begin with the same tokens; rows that only one of them has are padding.
    """

    h_MD: Tensor  # [M, D_teacher] at the targets
    weight_VD: Tensor  # [V_teacher, D_teacher]


@dataclass(frozen=True)
class Mixing:
    """How hard and soft targets are weighed at one step."""

    alpha: float = 0.5  # share of the soft targets
    factor: float = 1.0  # soft targets count times this
    temperature: float = 1.0
    adds: bool = False  # hard + factor * soft, whatever alpha
    # Per token: the share times sigmoid(lead / gap_scale); lead: see `_Lead`.
    gap_scale: float | None = None
    gap_window: int = 0  # the lead is a mean over so many targets before the token; 0: its own gap
    hard_from_teacher: bool = False  # the hard target is the teacher's likeliest token

    def shares(self, lead_M1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The share of soft targets, and what hard and soft losses count; no gradients."""
        share_M1 = torch.full_like(lead_M1, 1.0 if self.adds else self.alpha)
        if self.gap_scale is not None:
            share_M1 *= (lead_M1 / self.gap_scale).sigmoid()
        hard_M1 = torch.ones_like(share_M1) if self.adds else 1 - share_M1
        return share_M1, hard_M1, self.factor * share_M1


@dataclass(frozen=True)
class DistillationLoss:
    """Sums over tokens, each times its weight; fp32 scalars, only the first with gradients."""

    loss: Tensor
    hard_loss: Tensor  # -log p_S of the hard target
    data_loss: Tensor  # -log p_S of the label, temperature 1
    soft_loss: Tensor  # tau^2 KL(p_T || p_S), both at temperature tau
    soft_weight: Tensor  # the share of soft targets, before the factor
    teacher_loss: Tensor  # -log p_T of the label, at temperature tau


def linear_distillation(
    h_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    weights_M: Tensor,
    targets: FullTargets | SparseTargets | None,
    mixing: Mixing,
    chunk: int | None = None,
    first_M: Tensor | None = None,
) -> DistillationLoss:
    """Weighted sum of hard cross-entropy and soft divergence of softmax(h @ weight.T).

    All tokens are targets; labels are in both vocabularies. `first_M`: where in M the document of
    a token begins; None: all are of one. shapes: h [M, D], weight [V, D], labels [M], weights [M]
    """
    weights_M = weights_M.float()
    if targets is None:
        wants_teacher = mixing.alpha != 0 or mixing.adds or mixing.hard_from_teacher
        assert not wants_teacher, "no teacher"
        loss = linear_cross_entropy(h_MD, weight_VD, labels_M, weights_M, chunk)
        hard, zero = loss.detach(), torch.zeros_like(loss)
        return DistillationLoss(loss, hard, hard, zero, zero, zero)
    if isinstance(targets, SparseTargets):
        assert targets.temperature == mixing.temperature, "targets of another temperature"
        assert len(targets.ids_MK) == len(labels_M), "a row of targets for each token"
    else:
        assert len(targets.h_MD) == len(labels_M), "a teacher's state for each token"
    run = LINEAR_DISTILLATION.pick(h_MD)
    loss, figures = run(h_MD, weight_VD, labels_M, weights_M, targets, mixing, chunk, first_M)
    return DistillationLoss(loss, *figures.unbind())


class _Lead:
    """How far the teacher is ahead of the student at each token, as the targets before it tell.

    gap = log p_T(label) - log p_S(label). One token's gap is noise, and a share that follows the
    token's own label pulls the expected target away from both the teacher's and the data's: the
    mean over a window leaves the token itself out. A document begins with some trust.
    """

    TRUST, NUM_TRUSTED = 1.0, 4  # a lead of so many nats, as if so many tokens had shown it

    def __init__(self, mixing: Mixing, first_M: Tensor) -> None:
        self.window, self.first_M = mixing.gap_window, first_M
        self._gap_M = torch.zeros(len(first_M), dtype=torch.float64, device=first_M.device)

    def of(self, rows: slice, gap_M1: Tensor) -> Tensor:
        """The lead at these rows; their gaps must come in order, all earlier ones before."""
        if self.window == 0:
            return gap_M1
        stop = rows.start + len(gap_M1)
        self._gap_M[rows.start : stop] = gap_M1.flatten()
        low = max(0, rows.start - self.window)
        sum_M = torch.cat([self._gap_M.new_zeros(1), self._gap_M[low:stop].cumsum(0)])
        place_M = torch.arange(rows.start, stop, device=gap_M1.device)
        begin_M = torch.maximum(self.first_M[rows], place_M - self.window).clamp_min(0)
        total_M = sum_M[place_M - low] - sum_M[begin_M - low] + self.TRUST * self.NUM_TRUSTED
        lead_M = total_M / (place_M - begin_M + self.NUM_TRUSTED)
        return lead_M.to(gap_M1.dtype).unsqueeze(-1)


@dataclass(frozen=True)
class _TeacherRows:
    """What the teacher says about a chunk. Divergence: `cross` + `mass` * log sum of the student.

    Either all probabilities of the first tokens, or a few and their ids.
    """

    p_MV: Tensor  # or [M, K]
    ids_MK: Tensor | None
    mass_M1: Tensor
    cross_M1: Tensor  # without the student's log of the sum
    label_log_M1: Tensor
    best_M1: Tensor | None

    def subtract(self, grad_MV: Tensor, scale_M1: Tensor) -> None:
        """Take the scaled probabilities off; overwrites them."""
        scaled = self.p_MV.mul_(scale_M1)
        if self.ids_MK is None:
            grad_MV[:, : scaled.shape[1]].sub_(scaled)
        else:
            grad_MV.scatter_add_(-1, self.ids_MK, scaled.neg_())


class _Workspace:
    """Buffers for one chunk's logits; fresh ones cost page faults on a CPU."""

    def __init__(self, num_buffers: int, size: int, device: torch.device) -> None:
        # Each a tensor of its own: equally aligned, products give teacher and student equal bits.
        self._flat = [
            torch.empty(size, dtype=torch.float32, device=device) for _ in range(num_buffers)
        ]

    def view(self, index: int, num_rows: int, num_columns: int) -> Tensor:
        return self._flat[index][: num_rows * num_columns].view(num_rows, num_columns)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_MD: Tensor,
        weight_VD: Tensor,
        labels_M: Tensor,
        weights_M: Tensor,
        targets: FullTargets | SparseTargets,
        mixing: Mixing,
        lead: _Lead,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        cast_VD = weight_VD.to(h_MD.dtype)
        if isinstance(targets, FullTargets):
            # Tokens the student lacks are padding: left out before the teacher's softmax.
            teacher_VD = targets.weight_VD[: len(weight_VD)].to(targets.h_MD.dtype)
            targets = FullTargets(targets.h_MD, teacher_VD)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dh_MD = torch.empty_like(h_MD) if needs_grad else None
        dweight_VD = torch.zeros_like(weight_VD) if needs_grad else None
        sums = torch.zeros(1 + _NUM_FIGURES, dtype=torch.float32, device=h_MD.device)
        # The student's logits, its softmax where the teacher's logits were, the teacher's softmax.
        num_buffers = 3 if isinstance(targets, FullTargets) else 2
        size = min(chunk, len(h_MD)) * len(weight_VD)
        work = _Workspace(num_buffers, size, h_MD.device)
        for start in range(0, len(h_MD), chunk):
            rows = slice(start, start + chunk)
            logits_MV = work.view(0, len(labels_M[rows]), len(weight_VD))
            logits_into(logits_MV, h_MD[rows], cast_VD)
            losses_CM, grad_MV = _losses_and_gradient(
                logits_MV, labels_M[rows], weights_M[rows], rows, targets, mixing, lead, work
            )
            sums += (losses_CM * weights_M[rows]).sum(-1)
            if dh_MD is None or dweight_VD is None:
                continue
            grad_MV = grad_MV.to(h_MD.dtype)
            torch.mm(grad_MV, cast_VD, out=dh_MD[rows])
            if dweight_VD.dtype == grad_MV.dtype:
                dweight_VD.addmm_(grad_MV.T, h_MD[rows])
            else:
                dweight_VD.add_(grad_MV.T @ h_MD[rows])
        ctx.save_for_backward(dh_MD, dweight_VD)
        figures = sums[1:].clone()
        ctx.mark_non_differentiable(figures)
        return sums[0].clone(), figures

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh_MD, dweight_VD = ctx.saved_tensors
        scale = grads[0]
        nothing = (None,) * 6
        return dh_MD * scale.to(dh_MD.dtype), dweight_VD * scale, *nothing


def _losses_and_gradient(
    logits_MV: Tensor,
    labels_M: Tensor,
    weights_M: Tensor,
    rows: slice,
    targets: FullTargets | SparseTargets,
    mixing: Mixing,
    lead: _Lead,
    work: _Workspace,
) -> tuple[Tensor, Tensor]:
    """Each token's loss and figures, [1 + figures, M], and the gradient of the logits."""
    tau, label_M1 = mixing.temperature, labels_M.unsqueeze(-1)
    if isinstance(targets, FullTargets):
        teacher = _full_rows(logits_MV, label_M1, targets, rows, mixing, work)
    else:
        teacher = _sparse_rows(logits_MV, targets, rows, tau)
    hard_M1 = label_M1
    if mixing.hard_from_teacher:
        assert teacher.best_M1 is not None
        hard_M1 = teacher.best_M1
    at_label_M1, at_hard_M1 = logits_MV.gather(-1, label_M1), logits_MV.gather(-1, hard_M1)

    p_MV = work.view(1, *logits_MV.shape)
    log_sum_M1 = log_sum_tau_M1 = _softmax_into(p_MV, logits_MV, tau)
    if tau != 1:
        top_M1 = logits_MV.amax(-1, keepdim=True)
        exp_MV = logits_MV.sub_(top_M1).mul_(tau).exp_()
        sum_M1 = exp_MV.sum(-1, keepdim=True)
        log_sum_M1 = sum_M1.log() + tau * top_M1

    data_loss_M1, hard_loss_M1 = log_sum_M1 - at_label_M1, log_sum_M1 - at_hard_M1
    soft_loss_M1 = tau**2 * (teacher.cross_M1 + teacher.mass_M1 * log_sum_tau_M1)
    gap_M1 = teacher.label_log_M1 + log_sum_tau_M1 - at_label_M1 / tau
    share_M1, a_hard_M1, a_soft_M1 = mixing.shares(lead.of(rows, gap_M1))
    loss_M1 = a_hard_M1 * hard_loss_M1 + a_soft_M1 * soft_loss_M1
    figures = [hard_loss_M1, data_loss_M1, soft_loss_M1, share_M1, -teacher.label_log_M1]
    losses_CM = torch.cat([loss_M1, *figures], dim=-1).T

    # Scales are equal on both sides of p_S - p_T: where the probabilities are equal, it is zero.
    weight_M1 = weights_M.unsqueeze(-1)
    hard_scale_M1, soft_scale_M1 = weight_M1 * a_hard_M1, weight_M1 * (tau * a_soft_M1)
    if tau == 1:
        p_MV.mul_(weight_M1 * (a_hard_M1 + a_soft_M1 * teacher.mass_M1))
    else:
        p_MV.mul_(soft_scale_M1 * teacher.mass_M1)
    teacher.subtract(p_MV, soft_scale_M1)
    if tau != 1:
        p_MV.add_(exp_MV.mul_(hard_scale_M1 / sum_M1))
    p_MV.scatter_add_(-1, hard_M1, -hard_scale_M1)
    return losses_CM, p_MV


def _softmax_into(p_MV: Tensor, logits_MV: Tensor, tau: float) -> Tensor:
    """softmax(logits / tau); leaves logits divided by tau; the log of the sum of exponentials.

    Teacher and student both come through here, so that equal logits give equal bits.
    """
    if tau != 1:
        logits_MV.mul_(1 / tau)
    torch.softmax(logits_MV, -1, out=p_MV)
    # The largest probability is 1 / sum(exp(logits - top)).
    return logits_MV.amax(-1, keepdim=True) - p_MV.amax(-1, keepdim=True).log()


def _full_rows(
    logits_MV: Tensor,
    label_M1: Tensor,
    targets: FullTargets,
    rows: slice,
    mixing: Mixing,
    work: _Workspace,
) -> _TeacherRows:
    shape = len(logits_MV), len(targets.weight_VD)
    teacher_MV, p_MV = work.view(1, *shape), work.view(2, *shape)
    logits_into(teacher_MV, targets.h_MD[rows], targets.weight_VD)
    log_sum_M1 = _softmax_into(p_MV, teacher_MV, mixing.temperature)
    label_log_M1 = teacher_MV.gather(-1, label_M1) - log_sum_M1
    best_M1 = teacher_MV.argmax(-1, keepdim=True) if mixing.hard_from_teacher else None
    ahead_MV = teacher_MV.sub_(logits_MV[:, : shape[1]], alpha=1 / mixing.temperature)
    cross_M1 = ahead_MV.mul_(p_MV).sum(-1, keepdim=True) - log_sum_M1
    mass_M1 = torch.ones_like(cross_M1)
    return _TeacherRows(p_MV, None, mass_M1, cross_M1, label_log_M1, best_M1)


def _sparse_rows(
    logits_MV: Tensor, targets: SparseTargets, rows: slice, tau: float
) -> _TeacherRows:
    ids_MK, p_MK = targets.ids_MK[rows], targets.weights_MK[rows].clone()
    chosen_MK = logits_MV.gather(-1, ids_MK) / tau
    entropy_M1 = targets.entropy_M[rows].unsqueeze(-1)
    cross_M1 = -(p_MK * chosen_MK).sum(-1, keepdim=True) - entropy_M1
    mass_M1 = p_MK.sum(-1, keepdim=True)
    return _TeacherRows(p_MK, ids_MK, mass_M1, cross_M1, *_label_and_best(targets, rows))


def _label_and_best(targets: SparseTargets, rows: slice) -> tuple[Tensor, Tensor]:
    """log p_T of the label, and the likeliest of the tokens whose probability is exact."""
    exact_MK = targets.weights_MK[rows, : targets.num_exact]
    tiny = torch.finfo(torch.float32).tiny
    best_M1 = exact_MK.argmax(-1, keepdim=True)
    return exact_MK[:, :1].clamp_min(tiny).log(), targets.ids_MK[rows].gather(-1, best_M1)


def _chunked(
    h_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    weights_M: Tensor,
    targets: FullTargets | SparseTargets,
    mixing: Mixing,
    chunk: int | None,
    first_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // len(weight_VD))
    lead = _Lead(mixing, torch.zeros_like(labels_M) if first_M is None else first_M)
    args = (h_MD, weight_VD, labels_M, weights_M, targets, mixing, lead, chunk)
    return _LinearDistillation.apply(*args)


def reference_linear_distillation(
    h_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    weights_M: Tensor,
    targets: FullTargets | SparseTargets,
    mixing: Mixing,
    chunk: int | None = None,
    first_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All logits at once, gradients by autograd."""
    tau, label_M1 = mixing.temperature, labels_M.unsqueeze(-1)
    logits_MV = (h_MD @ weight_VD.to(h_MD.dtype).T).float()
    log_p_MV, log_tau_MV = logits_MV.log_softmax(-1), (logits_MV / tau).log_softmax(-1)
    if isinstance(targets, SparseTargets):
        label_log_M1, best_M1 = _label_and_best(targets, slice(None))
        chosen_MK = log_tau_MV.gather(-1, targets.ids_MK)
        cross_M1 = -(targets.weights_MK * chosen_MK).sum(-1, keepdim=True)
        divergence_M1 = cross_M1 - targets.entropy_M.unsqueeze(-1)
    else:
        teacher_VD = targets.weight_VD.detach()[: len(weight_VD)].to(targets.h_MD.dtype)
        teacher_MV = (targets.h_MD.detach() @ teacher_VD.T).float()
        teacher_log_MV = (teacher_MV / tau).log_softmax(-1)
        label_log_M1 = teacher_log_MV.gather(-1, label_M1)
        best_M1 = teacher_MV.argmax(-1, keepdim=True)
        ahead_MV = teacher_log_MV - log_tau_MV[:, : len(teacher_VD)]
        divergence_M1 = (teacher_log_MV.exp() * ahead_MV).sum(-1, keepdim=True)
    soft_loss_M1 = tau**2 * divergence_M1
    data_loss_M1 = -log_p_MV.gather(-1, label_M1)
    hard_M1 = best_M1 if mixing.hard_from_teacher else label_M1
    hard_loss_M1 = -log_p_MV.gather(-1, hard_M1)
    gap_M1 = (label_log_M1 - log_tau_MV.gather(-1, label_M1)).detach()
    lead = _Lead(mixing, torch.zeros_like(labels_M) if first_M is None else first_M)
    share_M1, a_hard_M1, a_soft_M1 = mixing.shares(lead.of(slice(0, len(h_MD)), gap_M1))
    loss_M1 = a_hard_M1 * hard_loss_M1 + a_soft_M1 * soft_loss_M1
    figures = [hard_loss_M1, data_loss_M1, soft_loss_M1, share_M1, -label_log_M1]
    figures_MC = torch.cat(figures, dim=-1).detach()
    return (loss_M1.squeeze(-1) * weights_M).sum(), weights_M @ figures_MC


LINEAR_DISTILLATION = Op(
    "linear_distillation",
    [
        Version("chunked", lambda: _chunked, "gradients in the forward, 24 MiB of logits at once"),
        Version(REFERENCE, lambda: reference_linear_distillation, "all logits at once"),
    ],
)
