"""Predict the next token, and keep the experts busy while doing so.

in: one model in training and a `Batch`; out: the sum of token losses and that of the balance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from l4cli.ops.batch import Batch
from l4cli.ops.cross_entropy import linear_cross_entropy
from l4cli.training.balance import Watch
from l4cli.training.metrics import LossSum
from l4cli.training.trainee import Trainee


class LanguageModel:
    """The objective of pretraining: every target token weighs what the batch says."""

    def start_step(self, step: int, num_steps: int) -> None:
        """Every step is like the others."""

    def weights(self, batch: Batch) -> dict[str, float]:
        """What each loss is divided by, summed over all micro-batches of a step beforehand."""
        return {
            "loss": float(batch.loss_weight.sum()),
            "balance_loss": float((batch.document_ids != 0).sum()),
        }

    def __call__(self, trainees: Sequence[Trainee], batch: Batch) -> dict[str, LossSum]:
        """Run the model over one micro-batch."""
        (trainee,) = trainees
        return self.run(trainee, batch)[0]

    def run(
        self, trainee: Trainee, batch: Batch, outputs: dict[int, Tensor] | None = None
    ) -> tuple[dict[str, LossSum], Tensor]:
        """The losses of one trainee, and its states h_BTD; `outputs` as in `model.hidden`."""
        model, weights = trainee.model, self.weights(batch)
        watch = None if trainee.balance is None else trainee.balance.watch(batch.document_ids != 0)
        h_BTD = model.hidden(batch, routing=watch, outputs=outputs)
        loss = linear_cross_entropy(
            h_BTD.flatten(0, 1),
            model.lm_head.weight,
            batch.labels.flatten(),
            batch.loss_weight.flatten(),
        )
        losses = {"loss": LossSum(loss, weights["loss"])}
        return losses | balance_losses(watch, weights), h_BTD


def balance_losses(watch: Watch | None, weights: Mapping[str, float]) -> dict[str, LossSum]:
    """What keeps the experts busy, if anything; ends the watch over the pass in any case."""
    loss = None if watch is None else watch.sequence_loss()
    return {} if loss is None else {"balance_loss": LossSum(loss, weights["balance_loss"])}
