"""What one forward pass is given: tokens, where documents and chunks end, pixels.

in: packed rows with document ids; out: a `Batch` with the borders every attention layer needs
source: DESIGN "Packed shards"; chunk borders as in HF Llama4 `chunked_attention`
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Runs of consecutive flat positions (row * T + t) inside which attention is causal.

    Padding is in none of them. All tensors are int64 and live on the CPU: attention plans
    its gathers from them once per batch.
    """

    document_starts: Tensor  # [documents]
    document_lengths: Tensor  # [documents]
    local_starts: Tensor  # [documents x chunks]
    local_lengths: Tensor  # [documents x chunks]

    @classmethod
    def from_document_ids(
        cls, document_ids_BT: Tensor, attention_chunk_size: int | None
    ) -> Segments:
        """Find the runs of equal, non-zero ids in each row, then cut them into chunks."""
        ids_BT = document_ids_BT.cpu()
        is_start_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        is_start_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
        starts = is_start_BT.flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([ids_BT.numel()])])
        is_document = ids_BT.flatten()[starts] != 0
        starts, lengths = starts[is_document], (ends - starts)[is_document]
        if attention_chunk_size is None:
            return cls(starts, lengths, starts, lengths)
        return cls(starts, lengths, *_chunks(starts, lengths, attention_chunk_size))


def _chunks(starts: Tensor, lengths: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Cut each run into pieces of `chunk_size`; the last piece of a run may be shorter."""
    num_pieces = (lengths + chunk_size - 1) // chunk_size
    owner = torch.arange(len(starts)).repeat_interleave(num_pieces)
    first_piece = num_pieces.cumsum(0) - num_pieces
    offset = (torch.arange(len(owner)) - first_piece[owner]) * chunk_size
    return starts[owner] + offset, (lengths[owner] - offset).clamp(max=chunk_size)


@dataclass(frozen=True)
class SparseTargets:
    """What a teacher predicts at the targets of a batch: a few tokens and their probabilities.

    Targets are the flat positions with a loss weight, in order. Column 0 is the label, the next
    `num_exact - 1` are the likeliest other tokens, likeliest first; the rest are drawn from the
    remaining ones and weighted so that the expectation is the teacher's distribution.
    """

    ids_MK: Tensor  # int64
    weights_MK: Tensor  # float32, a row adds up to 1; 0 where a column is not used
    entropy_M: Tensor  # float32, nats, of the whole distribution
    num_exact: int
    temperature: float = 1.0  # the logits were divided by

    def to(self, device: torch.device | str) -> SparseTargets:
        """Move the tensors."""
        return replace(
            self,
            ids_MK=self.ids_MK.to(device),
            weights_MK=self.weights_MK.to(device),
            entropy_M=self.entropy_M.to(device),
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed rows."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, the next token of the same document; arbitrary at weight 0
    loss_weight: Tensor  # [B, T] float32, 0 where there is no target
    document_ids: Tensor  # [B, T] int32, 0 is padding
    position_ids: Tensor  # [B, T] int64, from 0 in each document
    segments: Segments | None  # None where a cache knows what was read before
    pixel_values: Tensor | None = None  # [tiles, 3, H, W] float32, all pictures in order
    teacher: SparseTargets | None = None  # from a cache

    def to(self, device: torch.device | str) -> Batch:
        """Move the tensors of the forward pass; borders stay on the CPU."""
        pixels = self.pixel_values
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            loss_weight=self.loss_weight.to(device),
            document_ids=self.document_ids.to(device),
            position_ids=self.position_ids.to(device),
            pixel_values=None if pixels is None else pixels.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
        )

    @classmethod
    def from_tokens(
        cls,
        input_ids_BT: Tensor,
        pixel_values: Tensor | None = None,
        attention_chunk_size: int | None = None,
        first_position: int = 0,
    ) -> Batch:
        """Take each row as one document, every next token as a target of weight one."""
        num_rows, length = input_ids_BT.shape
        device = input_ids_BT.device
        document_ids_BT = torch.ones(num_rows, length, dtype=torch.int32, device=device)
        # Rows are told apart by the row border, so that id 1 everywhere is enough.
        positions_T = torch.arange(first_position, first_position + length, device=device)
        labels_BT = input_ids_BT.roll(-1, dims=1)
        loss_weight_BT = torch.ones(num_rows, length, device=device)
        loss_weight_BT[:, -1:] = 0
        return cls(
            input_ids_BT,
            labels_BT,
            loss_weight_BT,
            document_ids_BT,
            positions_T.expand(num_rows, length),
            Segments.from_document_ids(document_ids_BT, attention_chunk_size),
            pixel_values,
        )

    @classmethod
    def continuing(
        cls, input_ids_BT: Tensor, position_ids_BT: Tensor, pixel_values: Tensor | None = None
    ) -> Batch:
        """Tokens that go on where a cache ends; nothing to learn from."""
        nothing = torch.zeros_like(input_ids_BT)
        weights = nothing.float()
        return cls(input_ids_BT, nothing, weights, nothing, position_ids_BT, None, pixel_values)
