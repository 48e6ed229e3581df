"""Which rows belong to which expert, found on the device: nothing here waits for the GPU.

in: the expert of every slot (token m's a-th choice is slot m * A + a); out: `Groups`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Slots sorted by expert. Experts without a slot are empty ranges."""

    slots: Tensor  # int32 [R]: the slot of each sorted row
    ends: Tensor  # int32 [E]: one past each expert's last row
    top_k: int

    @classmethod
    def from_choices(cls, expert_MA: Tensor, num_experts: int) -> Groups:
        """Sort the slots, keeping the order of tokens within an expert."""
        flat_R = expert_MA.flatten()
        slots = flat_R.argsort(stable=True).to(torch.int32)
        # Not bincount: on CUDA it waits for the device to know how long its answer is.
        counts = torch.zeros(num_experts, dtype=torch.int32, device=flat_R.device)
        counts.scatter_add_(0, flat_R.long(), torch.ones_like(slots))
        return cls(slots, counts.cumsum(0, dtype=torch.int32), expert_MA.shape[1])

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_experts(self) -> int:
        return len(self.ends)

    def summed(self, y_RD: Tensor) -> Tensor:
        """Add up what slots give each token: its own are neighbours. shapes: -> [M, D]"""
        return y_RD if self.top_k == 1 else y_RD.unflatten(0, (-1, self.top_k)).sum(1)

    def tile_ends(self, block: int) -> Tensor:
        """One past each expert's last tile of `block` rows, int32 [E]."""
        counts = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        return ((counts + block - 1) // block).cumsum(0, dtype=torch.int32)

    def max_tiles(self, block: int) -> int:
        """How many tiles there are at most, whatever the counts: known without the device."""
        partial = min(self.num_experts, self.num_rows)
        return self.num_rows // block + partial
