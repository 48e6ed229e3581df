"""Operations counted by formula against numbers worked by hand and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from l4cli.model import Llama4Config, TextConfig, VisionConfig, build_model, load_preset
from l4cli.planning import (
    active_matmul_parameters,
    flops_per_token,
    mean_attended,
    vision_flops_per_tile,
)


def test_scout_needs_six_operations_an_active_weight() -> None:
    text = load_preset("scout").text
    # Text active without embed_tokens, 16,138,408,960, less 496,640 norm weights.
    assert active_matmul_parameters(text) == 16_138_408_960 - 496_640


@pytest.mark.parametrize(
    ("layer_idx", "length", "expected"),
    [
        (3, 100, 50.5),  # NoPE: everything before, itself included
        (0, 8, 4.5),  # one chunk
        (0, 16, 4.5),  # two whole chunks
        (0, 12, (8 * 4.5 + 4 * 2.5) / 12),  # a chunk and a half
        (0, 1, 1.0),
    ],
)
def test_keys_attended(layer_idx: int, length: int, expected: float) -> None:
    text = TextConfig(attention_chunk_size=8)
    assert mean_attended(text, layer_idx, length) == pytest.approx(expected)
    if layer_idx == 0:
        by_hand = [position % 8 + 1 for position in range(length)]
        assert sum(by_hand) / length == pytest.approx(expected)


def test_attention_stops_growing_in_chunked_layers() -> None:
    config = load_preset("scout")
    short, long = (flops_per_token(config, length) for length in (8192, 65536))
    # Only the 12 NoPE layers pay: 12 N H more a key, over half the difference in length.
    grown = 12 * 5120 * 12 * (65536 - 8192) / 2
    assert long - short == pytest.approx(grown, rel=1e-3)
    assert flops_per_token(config, 65536, mean_document_length=8192) == short


def counted(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def test_forward_products_equal_torchs_count() -> None:
    config = load_preset("nano")
    length, vocab = 64, config.text.vocab_size
    model = build_model(config, seed=0)
    ids = torch.randint(0, vocab, (1, length))
    with torch.no_grad():
        total = counted(model, ids)
    # torch counts fused attention as if it were not causal, or not at all; leave it out.
    products = 2 * active_matmul_parameters(config.text) * length
    attention = 4 * 192 * length * length * config.text.num_hidden_layers
    assert products <= total <= products + 1.01 * attention


def test_tile_products_equal_torchs_count() -> None:
    config = load_preset("nano")
    model = build_model(config, seed=0)
    vision = config.vision
    assert vision is not None
    size = vision.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.picture_features(torch.zeros(2, 3, size, size))
    forward = 2 * vision_flops_per_tile(config) / 3
    attention = 2 * vision.num_hidden_layers * 4 * 128 * (vision.num_patches + 1) ** 2
    assert forward - attention <= counter.get_total_flops() * 1.001
    assert counter.get_total_flops() <= forward * 1.001


def test_no_vision_costs_nothing() -> None:
    assert vision_flops_per_tile(Llama4Config(vision=None)) == 0
    assert vision_flops_per_tile(Llama4Config(vision=VisionConfig())) > 1e11
