"""What llama.cpp gets wrong is found from the config, with the length up to which it is right."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from l4cli.checkpoint.gguf_fit import misfits, moe_step
from l4cli.model import TextConfig, load_preset

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


def scout(**changes: Any) -> TextConfig:
    return dataclasses.replace(load_preset("scout").text, **changes)


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_published_models_fit(name: str) -> None:
    assert misfits(load_preset(name).text) == []


@pytest.mark.parametrize(
    ("changes", "setting", "right_tokens", "loads"),
    [
        ({"attention_chunk_size": 4096}, "attention_chunk_size", 4096, True),
        ({"attention_chunk_size": 16384}, "attention_chunk_size", 8192, True),
        ({"attention_chunk_size": None}, "attention_chunk_size", 8192, True),
        ({"layer_types": ["full_attention"] * 48}, "other layers in chunks", 8192, True),
        ({"no_rope_layer_interval": 6}, "layers without RoPE", 0, True),
        ({"no_rope_layers": [1] * 48}, "layers without RoPE", 0, True),
        ({"use_qk_norm": False}, "use_qk_norm", 0, True),
        ({"num_local_experts": 128}, "use_qk_norm", 0, True),
        ({"attn_temperature_tuning": False}, "attn_temperature_tuning", 8191, True),
        ({"floor_scale": 1024}, "floor_scale", 1023, True),
        ({"floor_scale": 16384}, "floor_scale", 8191, True),
        ({"attn_scale": 0.2}, "attn_scale", 8191, True),
        ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor", 0, True),
        ({"moe_layers": [0, 1, 5]}, "moe_layers", 0, False),
        ({"num_local_experts": 2048}, "num_local_experts", 0, False),
        ({"full_rope": {"rope_theta": 1e6}}, "full_rope", 0, False),
        ({"scalable_softmax": True, "attn_temperature_tuning": False}, "softmax", 0, False),
    ],
)
def test_what_differs_is_found(
    changes: dict[str, Any], setting: str, right_tokens: int, loads: bool
) -> None:
    first = misfits(scout(**changes))[0]
    assert setting in first.what
    assert (first.right_tokens, first.loads) == (right_tokens, loads)
    assert first.why


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"moe_layers": list(range(1, 48, 2))},
        {"num_experts_per_tok": 2},
        # Within one chunk, and before the first temperature step, nothing of it shows.
        {"attention_chunk_size": 4096, "max_position_embeddings": 4096},
        {"attention_chunk_size": None, "max_position_embeddings": 8192},
        {"attn_temperature_tuning": False, "max_position_embeddings": 8191},
        {"floor_scale": 1024, "max_position_embeddings": 1023},
    ],
)
def test_what_makes_no_difference_is_let_through(changes: dict[str, Any]) -> None:
    assert misfits(scout(**changes)) == []


def test_the_temperature_step_is_where_the_model_has_it() -> None:
    """One token later the two formulas differ."""
    assert len(misfits(scout(attn_temperature_tuning=False, max_position_embeddings=8192))) == 1
    assert len(misfits(scout(floor_scale=1024, max_position_embeddings=1024))) == 1


def test_the_worst_is_named_first() -> None:
    found = misfits(scout(attention_chunk_size=4096, use_qk_norm=False, moe_layers=[3]))
    assert [m.loads for m in found] == [False, True, True]
    assert [m.right_tokens for m in found] == [0, 0, 4096]


def test_steps_of_experts() -> None:
    assert moe_step(scout()) == 1
    assert moe_step(scout(interleave_moe_layer_step=2)) == 2
    assert moe_step(scout(moe_layers=list(range(2, 48, 3)))) == 3
    assert moe_step(scout(moe_layers=[])) == 49
    assert moe_step(scout(moe_layers=[0])) is None
