"""Keep experts equally busy: a bias on the choice, a small loss, and figures of the load.

in: router logits and choices of every MoE layer; out: biases for the choice, a loss, metrics
source: auxiliary-loss-free balancing, arXiv 2408.15664 (centred as in torchtitan); the
sequence-level loss of DeepSeek-V3, arXiv 2412.19437 section 2.1.2, with sigmoid scores

The exchange format has no place for a bias, so what is exported must not need one. From half to
four fifths of the steps the bias used in the choice goes linearly to zero (`bias_scale`); from
then on the stored bias is not updated any more, since updates would work against the way down,
and only the loss balances. It arrives where the default decay of the learning rate begins: taking
it away from 80 to 95% of the steps cost a tiny model 1% of held-out loss (two seeds).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("bias", "loss", "both", "none")
ANNEAL_FROM = 0.50  # of all steps: where the bias starts towards zero
ANNEAL_TO = 0.80  # of all steps: where it has arrived


@dataclass(frozen=True)
class BalanceOptions:
    """What `--balance` and its neighbours say."""

    kind: str = "both"  # one of KINDS
    rate: float = 1e-3  # change of a bias per step
    loss_scale: float = 1e-4

    @property
    def uses_bias(self) -> bool:
        return self.kind in ("bias", "both")

    @property
    def uses_loss(self) -> bool:
        return self.kind in ("loss", "both")


def bias_scale(step: int, num_steps: int) -> float:
    """How much of the bias counts in `step` (from 0): 1, then linearly down to 0."""
    start, end = int(num_steps * ANNEAL_FROM), int(num_steps * ANNEAL_TO)
    # Runs of a few steps have no room for a slope; their last step is without bias all the same.
    end = min(end, num_steps - 1)
    if step >= end:
        return 0.0
    return 1.0 if step <= start else (end - step) / (end - start)


@dataclass(frozen=True)
class LayerLoad:
    """How the tokens of one layer were spread over its experts."""

    layer_idx: int
    max_over_mean: float  # 1 is perfect
    num_dead: int  # experts that got nothing


class Balance:
    """Keeps the biases and the counts of a model in training.

    Around each optimizer step: `start_step(...)` and `finish_step()`. Each forward pass gets a
    `Watch` of its own, since several may run at once.
    """

    def __init__(
        self,
        layer_idxs: Sequence[int],
        num_experts: int,
        options: BalanceOptions,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        self.num_experts = num_experts
        self._row = {layer_idx: i for i, layer_idx in enumerate(layer_idxs)}
        shape = (len(layer_idxs), num_experts)
        self.bias_LE = torch.zeros(shape, dtype=torch.float32, device=device)
        self.counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        self._counting = threading.Lock()
        self._scale = 1.0
        self._used_LE = self.bias_LE

    def bias(self, layer_idx: int) -> Tensor | None:
        """What is added to a layer's scores for the choice only, fp32 [E]."""
        if not self.options.uses_bias or self._scale == 0.0:
            return None
        return self._used_LE[self._row[layer_idx]]

    def watch(self, is_token_BT: Tensor) -> Watch:
        """Watch one forward pass; the mask says which of its positions hold tokens."""
        return Watch(self, is_token_BT.to(torch.float32))

    def count(self, layer_idx: int, num_chosen_E: Tensor) -> None:
        """Add to the step's counts; whole numbers, so that the order does not matter."""
        with self._counting:
            self.counts_LE[self._row[layer_idx]] += num_chosen_E.to(torch.int64)

    def start_step(self, step: int, num_steps: int) -> None:
        """Forget the counts, and take the bias that this step is to use."""
        self.counts_LE.zero_()
        # Never up again: a run that is made longer would jump back to the whole bias at once.
        self._scale = min(self._scale, bias_scale(step, num_steps))
        self._used_LE = self.bias_LE * self._scale

    def finish_step(self) -> None:
        """Move every bias towards the mean load: once per optimizer step, from global counts."""
        if not self.options.uses_bias or self._scale < 1.0:
            return
        counts_LE = self.counts_LE.float()
        step_LE = self.options.rate * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE)
        # Centred: a drift common to all experts would change nothing but the numbers' size.
        self.bias_LE += step_LE - step_LE.mean(-1, keepdim=True)

    def load(self) -> list[LayerLoad]:
        """The spread of the step's tokens, by layer."""
        loads = []
        for layer_idx, row in self._row.items():
            counts_E = self.counts_LE[row].tolist()
            mean = sum(counts_E) / len(counts_E)
            ratio = max(counts_E) / mean if mean else 1.0
            loads.append(LayerLoad(layer_idx, ratio, counts_E.count(0)))
        return loads

    def state_dict(self) -> dict[str, Tensor]:
        """The stored biases; they live in `l4/` only, never among the weights."""
        return {"bias": self.bias_LE, "scale": torch.tensor([self._scale], dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.bias_LE.copy_(state["bias"])
        self._scale = float(state["scale"])


class Watch:
    """The `Routing` of one forward pass (see `l4cli.ops.moe`), over once its loss is taken.

    Activation checkpointing runs layers again in the backward pass; by then nothing is recorded,
    so nothing counts twice.
    """

    def __init__(self, balance: Balance, mask_BT: Tensor) -> None:
        self._balance, self._mask_BT = balance, mask_BT
        self._is_over = False
        self._seen: list[tuple[Tensor, Tensor, int]] = []  # logits, choices, experts a token

    def bias(self, layer_idx: int) -> Tensor | None:
        """What is added to a layer's scores for the choice only, fp32 [E]."""
        return self._balance.bias(layer_idx)

    def record(self, layer_idx: int, logits_BTE: Tensor, expert_BTA: Tensor) -> None:
        """Count a layer's choices, and keep what the loss needs."""
        if self._is_over:
            return
        chosen_BTE = torch.zeros_like(logits_BTE).scatter_(-1, expert_BTA, 1.0)
        chosen_BTE *= self._mask_BT.unsqueeze(-1)
        chosen_BE = chosen_BTE.sum(1)
        self._balance.count(layer_idx, chosen_BE.sum(0))
        if self._balance.options.uses_loss:
            # Worked out after the pass: activation checkpointing wants the same tensors saved
            # when it runs a layer again, and then there is nothing to record.
            self._seen.append((logits_BTE, chosen_BE, expert_BTA.shape[-1]))

    def sequence_loss(self) -> Tensor | None:
        """The scaled loss of the pass, summed over layers, each row times its tokens.

        To be divided by the number of tokens. None without a loss or without MoE layers.
        """
        seen, self._seen, self._is_over = self._seen, [], True
        if not seen:
            return None
        losses = [_sequence_loss(logits, chosen, self._mask_BT, k) for logits, chosen, k in seen]
        return self._balance.options.loss_scale * torch.stack(losses).sum()


def _sequence_loss(
    logits_BTE: Tensor, chosen_BE: Tensor, mask_BT: Tensor, num_experts_per_tok: int
) -> Tensor:
    """Sum over rows of tokens * sum_e f_e P_e, which is each row's token count at balance.

    f_e = E / (A tokens) * choices of e; P_e = mean over tokens of e's share of the scores
    """
    num_experts = logits_BTE.shape[-1]
    tokens_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1.0)
    f_BE = chosen_BE * (num_experts / num_experts_per_tok) / tokens_B1
    scores_BTE = logits_BTE.sigmoid()
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    summed_BE = torch.einsum("bte,bt->be", share_BTE, mask_BT)  # tokens * P
    return (f_BE * summed_BE).sum()
