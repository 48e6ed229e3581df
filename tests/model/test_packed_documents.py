"""Packed documents behave as the same documents alone."""

from __future__ import annotations

import oracle
import torch

from l4cli.ops.batch import Batch, Segments
from l4cli.ops.cross_entropy import linear_cross_entropy

CHUNK = 8


def packed_batch(rows: list[list[list[int]]], length: int) -> Batch:
    """Rows of documents, padded at the end, as the loader would build them."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels, documents, positions = ids.clone(), ids.int(), ids.clone()
    weight = torch.zeros(len(rows), length)
    for row, texts in enumerate(rows):
        start = 0
        for number, text in enumerate(texts, 1):
            end = start + len(text)
            ids[row, start:end] = torch.tensor(text)
            labels[row, start : end - 1] = torch.tensor(text[1:])
            weight[row, start : end - 1] = 1
            documents[row, start:end] = number
            positions[row, start:end] = torch.arange(len(text))
            start = end
    segments = Segments.from_document_ids(documents, CHUNK)
    return Batch(ids, labels, weight, documents, positions, segments)


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    h_MD = model.hidden(batch).flatten(0, 1)
    weights_M = batch.loss_weight.flatten()
    return linear_cross_entropy(h_MD, model.lm_head.weight, batch.labels.flatten(), weights_M)


def documents(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, 490, (n,), generator=generator).tolist() for n in lengths]


def test_packed_loss_and_gradients_equal_documents_alone() -> None:
    model = oracle.ours(oracle.text_oracle())
    texts = documents([3, 19, 8, 1, 30, 17, 9, 5])
    packed = packed_batch([texts[:4], [texts[4], texts[6]], [texts[5], texts[7]]], length=40)
    packed_loss = loss_of(model, packed)
    packed_loss.backward()
    packed_grads = [weight.grad.clone() for weight in model.parameters()]

    model.zero_grad()
    alone = sum(loss_of(model, packed_batch([[text]], len(text))) for text in texts)
    alone.backward()
    assert torch.allclose(packed_loss, alone, rtol=1e-5)
    for weight, packed_grad in zip(model.parameters(), packed_grads, strict=True):
        scale = weight.grad.abs().max()
        assert (weight.grad - packed_grad).abs().max() <= 1e-4 * scale + 1e-9


def test_a_neighbour_changes_nothing() -> None:
    model = oracle.ours(oracle.text_oracle())
    first, second, other = documents([13, 21, 21])
    a = model.hidden(packed_batch([[first, second]], 34))[:, :13]
    b = model.hidden(packed_batch([[first, other]], 34))[:, :13]
    # Not bit for bit: a neighbour changes how many rows an expert's product has.
    assert (a - b).abs().max() < 1e-5


def test_segments_cut_documents_into_chunks() -> None:
    ids = torch.tensor([[1] * 10 + [2] * 3 + [0] * 2, [0] + [1] * 14])
    segments = Segments.from_document_ids(ids, 4)
    assert segments.document_starts.tolist() == [0, 10, 16]
    assert segments.document_lengths.tolist() == [10, 3, 14]
    assert segments.local_starts.tolist() == [0, 4, 8, 10, 16, 20, 24, 28]
    assert segments.local_lengths.tolist() == [4, 4, 2, 3, 4, 4, 4, 2]
