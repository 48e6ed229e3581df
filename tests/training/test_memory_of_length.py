"""Training memory grows with the length, never with its square nor with length x vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_training import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l4cli.model import build_model
from l4cli.ops.batch import Batch
from l4cli.ops.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy

LENGTH = 2048  # the doubled one is the longest that our own blocked products take
VOCAB = 8192


class Largest(TorchDispatchMode):
    """Watches every operation, forward and backward, for the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.num_elements = max(self.num_elements, size)
        return out


def measure(length: int, dtype: torch.dtype, *, checkpoint: bool) -> tuple[int, int]:
    """Bytes kept for the backward pass, and elements of the largest tensor but the logits' chunk.

    One document fills the row, so that the layer without positions attends to all of it.
    """
    config = tiny_config()
    text = dataclasses.replace(config.text, vocab_size=VOCAB, max_position_embeddings=length)
    model = build_model(dataclasses.replace(config, text=text), device="cpu", seed=0)
    model.compute_dtype, model.checkpoint_layers = dtype, checkpoint
    ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    batch = Batch.from_tokens(ids, None, text.attention_chunk_size)
    kept: dict[int, int] = {}
    fixed = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.hidden(batch)
        # The chunk of logits has a size of its own, whatever the length; seen apart.
        of_layers = largest.num_elements
        weights = torch.ones(length)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), model.lm_head.weight, ids.flatten(), weights
        )
        num_kept = sum(kept.values())
        of_loss = largest.num_elements
        loss.backward()
    assert of_loss <= max(of_layers, CHUNK_ELEMENTS, VOCAB * text.hidden_size)
    return num_kept, of_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_twice_the_length_takes_twice_the_memory(dtype: torch.dtype, checkpoint: bool) -> None:
    short, long = (measure(n, dtype, checkpoint=checkpoint) for n in (LENGTH, 2 * LENGTH))
    for at_short, at_long in zip(short, long, strict=True):
        assert at_long <= 2.02 * at_short
    # The head's gradient, made with the loss, and what is cast do not grow at all.
    assert long[1] < 2 * LENGTH * 2 * LENGTH // 4


def test_checkpointing_keeps_a_layers_input_and_little_else() -> None:
    config = tiny_config().text
    plain, checkpointed = (measure(LENGTH, torch.float32, checkpoint=on)[0] for on in (False, True))
    per_token = 4 * config.hidden_size
    head = 4 * VOCAB * config.hidden_size
    # Inputs of two layers, of the last norm and of the loss, and the gradient the loss makes.
    inputs = LENGTH * per_token * (config.num_hidden_layers + 4)
    assert checkpointed - head <= 2 * inputs
    assert plain - head > 2 * (checkpointed - head)
