"""Several students learn from the data and from one teacher, whose forward pass they share.

in: trainees, a `Batch`, a teacher (a model, a trainee, or what the batch brings from a cache);
out: each student's losses over its hard and its soft targets, and the weights between them
source: codistillation as Llama 4's description has it; arXiv 1804.03235 for a teacher in training
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l4cli.ops.batch import Batch, Segments, SparseTargets
from l4cli.ops.distillation import FullTargets, Mixing, linear_distillation
from l4cli.training.balance import Watch
from l4cli.training.hidden_match import HiddenMatch
from l4cli.training.metrics import LossSum
from l4cli.training.objectives.language_model import LanguageModel, balance_losses
from l4cli.training.soft_share import StudentLoss
from l4cli.training.trainee import Trainee

_FIGURES = ("hard_loss", "data_loss", "soft_loss", "soft_weight", "teacher_loss")


@dataclass(frozen=True)
class _Taught:
    """What the teacher says about one micro-batch."""

    targets: FullTargets | SparseTargets | None
    states: Mapping[int, Tensor]  # of the layers that students match


@dataclass(frozen=True)
class _Places:
    """Where the targets of a micro-batch stand, the same for every student."""

    index_M: Tensor  # of all positions
    first_M: Tensor  # among the targets: where the document of each begins


class Distillation:
    """The objective of `l4 distill`; `losses` are those of the students, in their order.

    `teacher`: a model that is not trained. With `codistills` the first trainee is the teacher: it
    learns from the data alone, and what it says is passed on without gradients. Without either,
    batches bring a cache's targets, or no student needs a teacher.
    """

    def __init__(
        self,
        losses: Sequence[StudentLoss],
        teacher: Any = None,
        *,
        codistills: bool = False,
        attention_chunk_size: int | None = None,  # that batches are cut by
    ) -> None:
        assert teacher is None or not codistills
        self.losses, self.teacher, self.codistills = list(losses), teacher, codistills
        self.attention_chunk_size = attention_chunk_size
        self._step, self._num_steps = 0, 1

    def start_step(self, step: int, num_steps: int) -> None:
        """Take the step from which the weights between the targets follow."""
        self._step, self._num_steps = step, num_steps

    def weights(self, batch: Batch) -> dict[str, float]:
        """What each loss is divided by, by its name without the trainee's."""
        weights = LanguageModel().weights(batch)
        return {**weights, "hidden_loss": weights["balance_loss"]}

    def __call__(self, trainees: Sequence[Trainee], batch: Batch) -> dict[str, LossSum]:
        """Run the teacher once, and every student, over one micro-batch."""
        losses: dict[str, LossSum] = {}
        students = trainees[1:] if self.codistills else trainees
        index_M = (batch.loss_weight.flatten() != 0).nonzero().flatten()
        places = _Places(index_M, _document_starts(batch, index_M))
        taught, own = self._teach(trainees, batch, index_M)
        losses |= own
        for student, rule in zip(students, self.losses, strict=True):
            found = self._learn(student, rule, batch, taught, places)
            losses |= {_named(student, name): loss for name, loss in found.items()}
        return losses

    def _teach(
        self, trainees: Sequence[Trainee], batch: Batch, index_M: Tensor
    ) -> tuple[_Taught, dict[str, LossSum]]:
        """What the teacher says, and its own losses where it is in training."""
        layers = {
            layer
            for trainee in trainees
            if isinstance(trainee.extra, HiddenMatch)
            for layer in trainee.extra.teacher_layers
        }
        states = dict.fromkeys(layers, index_M)  # filled in by the pass
        if self.codistills:
            teacher = trainees[0]
            own = self._batch_for(teacher.model, batch)
            found, h_BTD = LanguageModel().run(teacher, own, states)
            losses = {_named(teacher, name): loss for name, loss in found.items()}
            return _Taught(_full(teacher.model, h_BTD.detach(), index_M), states), losses
        if self.teacher is None:
            return _Taught(batch.teacher, {}), {}
        with torch.no_grad():
            own = self._batch_for(self.teacher, batch)
            h_BTD = self.teacher.hidden(own, outputs=states)
        return _Taught(_full(self.teacher, h_BTD, index_M), states), {}

    def _learn(
        self,
        student: Trainee,
        rule: StudentLoss,
        batch: Batch,
        taught: _Taught,
        places: _Places,
    ) -> dict[str, LossSum]:
        index_M = places.index_M
        weights = self.weights(batch)
        watch: Watch | None = None
        if student.balance is not None:
            watch = student.balance.watch(batch.document_ids != 0)
        match = student.extra if isinstance(student.extra, HiddenMatch) else None
        states = dict.fromkeys(match.student_layers, index_M) if match else None
        own = self._batch_for(student.model, batch)
        h_BTD = student.model.hidden(own, routing=watch, outputs=states)
        # Whatever other students read: alone or beside them, it computes the same bits.
        targets = taught.targets if rule.reads_predictions else None
        found = linear_distillation(
            h_BTD.flatten(0, 1)[index_M],
            student.model.lm_head.weight,
            batch.labels.flatten()[index_M],
            batch.loss_weight.flatten()[index_M],
            targets,
            self._mixing(student, rule),
            first_M=places.first_M,
        )
        figures = {
            name: getattr(found, name)
            for name in _FIGURES
            if targets is not None or name in ("hard_loss", "data_loss")
        }
        losses = {"loss": LossSum(found.loss, weights["loss"], figures)}
        losses |= balance_losses(watch, weights)
        if match is not None and states is not None:
            token_M = (batch.document_ids.flatten() != 0).nonzero().flatten()
            distance = match(states, taught.states, token_M)
            burning = rule.is_burning_in(self._step, self._num_steps)
            weight = 0.0 if burning else rule.match_weight
            losses["hidden_loss"] = LossSum(distance * weight, weights["hidden_loss"])
        return losses

    def _mixing(self, student: Trainee, rule: StudentLoss) -> Mixing:
        schedule = student.schedule
        share = rule.soft_share(
            self._step, self._num_steps, lambda step: schedule.lr(step) / schedule.peak_lr
        )
        burning = rule.is_burning_in(self._step, self._num_steps)
        by_token = rule.share if share and rule.loss == "hybrid" else None
        return Mixing(
            alpha=1.0 if share is None else share,
            factor=rule.factor,
            temperature=rule.temperature,
            adds=share is None,
            gap_scale=None if by_token is None else by_token.gap_scale,
            gap_window=0 if by_token is None else by_token.window,
            hard_from_teacher=rule.hard_from_teacher and not burning,
        )

    def _batch_for(self, model: Any, batch: Batch) -> Batch:
        """The batch with the chunk borders of this model's attention."""
        chunk = model.config.text.attention_chunk_size
        if chunk == self.attention_chunk_size:
            return batch
        return replace(batch, segments=Segments.from_document_ids(batch.document_ids, chunk))


def _document_starts(batch: Batch, index_M: Tensor) -> Tensor:
    """Where among the targets the first one of the same document stands."""
    row_M = index_M // batch.input_ids.shape[1]
    document_M = batch.document_ids.flatten()[index_M]
    is_first_M = torch.ones_like(index_M, dtype=torch.bool)
    is_first_M[1:] = (row_M[1:] != row_M[:-1]) | (document_M[1:] != document_M[:-1])
    place_M = torch.arange(len(index_M), device=index_M.device)
    return torch.where(is_first_M, place_M, 0).cummax(0).values if len(index_M) else index_M


def _full(teacher: Any, h_BTD: Tensor, index_M: Tensor) -> FullTargets:
    return FullTargets(h_BTD.flatten(0, 1)[index_M], teacher.lm_head.weight.detach())


def _named(trainee: Trainee, name: str) -> str:
    return f"{trainee.name}/{name}" if trainee.name else name
