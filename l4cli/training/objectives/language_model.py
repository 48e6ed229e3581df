"""Predict the next token, and keep the experts busy while doing so.

in: one model in training and a `Batch`; out: the sum of token losses and that of the balance
"""

from __future__ import annotations

from collections.abc import Sequence

from l4cli.ops.batch import Batch
from l4cli.ops.cross_entropy import linear_cross_entropy
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
        model, weights = trainee.model, self.weights(batch)
        watch = None if trainee.balance is None else trainee.balance.watch(batch.document_ids != 0)
        h_BTD = model.hidden(batch, routing=watch)
        loss = linear_cross_entropy(
            h_BTD.flatten(0, 1),
            model.lm_head.weight,
            batch.labels.flatten(),
            batch.loss_weight.flatten(),
        )
        losses = {"loss": LossSum(loss, weights["loss"])}
        # Taken even when unused: it also ends the watch over this forward pass.
        balance_loss = None if watch is None else watch.sequence_loss()
        if balance_loss is not None:
            losses["balance_loss"] = LossSum(balance_loss, weights["balance_loss"])
        return losses
