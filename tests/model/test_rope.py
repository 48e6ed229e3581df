"""Angles, steps and turns against numbers worked out from the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from l4cli.model import load_preset
from l4cli.model.text import query_scales
from l4cli.ops.rope import inverse_frequencies, rotate, rotation, vision_rotation


def test_scout_frequencies() -> None:
    text = load_preset("scout").text
    inverse = inverse_frequencies(128, text.rope_theta, text.rope_scaling)
    wanted = {0: 1.0, 1: 8.146172e-1, 34: 9.384739e-4, 35: 4.778106e-5, 63: 1.534463e-7}
    for index, value in wanted.items():
        assert inverse[index].item() == pytest.approx(value, rel=1e-6)


def test_temperature_steps() -> None:
    text = load_preset("scout").text
    positions = torch.tensor([[0, 8190, 8191, 16382, 16383, 131071, 1048575]])
    got, _ = query_scales(text, positions)
    wanted = [1.0, 1.0, 1.069315, 1.069315, 1.109861, 1.283321, 1.485981]
    assert got is not None
    assert got[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_rotation_turns_interleaved_pairs() -> None:
    inverse = torch.tensor([1.0, 0.1])
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    got = rotate(x, rotation(torch.tensor([[3]]), inverse)).flatten()
    wanted = [math.cos(3), math.sin(3), -2 * math.sin(0.3), 2 * math.cos(0.3)]
    assert got.tolist() == pytest.approx(wanted, abs=1e-6)


def test_vision_turns_columns_first_and_not_the_class_token() -> None:
    turn = vision_rotation(grid=2, head_dim=8, theta=10000.0)[0]  # [5, 4]
    angles = turn.angle()
    # Patch 1 is row 0, column 1: columns and rows count from one.
    assert angles[1].tolist() == pytest.approx([2.0, 0.02, 1.0, 0.01], abs=1e-6)
    assert angles[4].tolist() == [0.0, 0.0, 0.0, 0.0]
