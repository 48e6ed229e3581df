"""Held-out bits per byte, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_training import batch_of, tiny_config

from l4cli.errors import L4Error
from l4cli.evals.bits_per_byte import held_out
from l4cli.model import build_model


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_per_token() -> None:
    model = build_model(tiny_config(), seed=0)
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is equally likely
    ids_BT = torch.tensor([[0, 10, 11, 1, 0, 12, 13, 14, 1, 0, 0, 0]])
    documents_BT = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0]])
    token_bytes = np.zeros(64, np.int32)
    token_bytes[3:] = 2  # special tokens have none
    found = held_out(model, [batch_of(ids_BT, documents_BT)] * 2, token_bytes)
    # 3 + 4 targets a batch, two of them ends of documents; 5 targets of two bytes each
    assert (found.num_targets, found.num_bytes) == (14, 20)
    assert found.bits_per_byte == pytest.approx(14 * math.log2(64) / 20, rel=1e-6)
    assert found.loss == pytest.approx(math.log(64), rel=1e-6)


def test_targets_of_weight_zero_do_not_count() -> None:
    model = build_model(tiny_config(), seed=0)
    ids_BT = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    documents_BT = torch.ones(2, 12, dtype=torch.long)
    weight_BT = torch.ones(2, 12)
    weight_BT[0] = 0
    token_bytes = np.ones(64, np.int32)
    both = held_out(model, [batch_of(ids_BT, documents_BT, weight_BT)], token_bytes)
    alone = held_out(model, [batch_of(ids_BT[1:], documents_BT[1:])], token_bytes)
    assert both.num_targets == alone.num_targets == 11
    assert both.num_nats == pytest.approx(alone.num_nats, rel=1e-6)


def test_no_text_is_an_error_and_a_stop_gets_through() -> None:
    model = build_model(tiny_config(), seed=0)
    batch = batch_of(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(L4Error, match="bits per byte"):
        held_out(model, [batch], np.zeros(64, np.int32))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        held_out(model, [batch], np.ones(64, np.int32), stop)
