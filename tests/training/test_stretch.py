"""What each change writes into the config, and that the numbers are the papers'."""

from __future__ import annotations

import dataclasses

import pytest

from l4cli.errors import UsageError
from l4cli.model import Llama4Config, TextConfig
from l4cli.training.stages import Changes, RopeChange
from l4cli.training.stretching import stretch

TRAINED = 512


def config_of(**keys: object) -> Llama4Config:
    text = TextConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attention_chunk_size=128,
        rope_theta=10000.0,
        max_position_embeddings=1024,
    )
    return Llama4Config(text=dataclasses.replace(text, **keys), vision=None)  # type: ignore[arg-type]


def stretched(changes: Changes, seq_len: int = 2048, **keys: object) -> TextConfig:
    return stretch(config_of(**keys), changes, seq_len, TRAINED).text


def test_without_changes_only_the_positions_grow() -> None:
    before = config_of().text
    assert stretched(Changes(), 1000) == before
    assert stretched(Changes()) == dataclasses.replace(before, max_position_embeddings=2048)


def test_ntk_raises_the_base_so_that_the_slowest_pair_turns_as_far() -> None:
    text = stretched(Changes(rope=RopeChange("ntk", 4.0)))
    assert text.rope_scaling is None
    slowest = (text.head_dim - 2) / text.head_dim
    # Four times the length at the slowest pair, and nothing changed at the fastest.
    assert text.rope_theta**slowest == pytest.approx(4 * 10000.0**slowest)
    assert stretched(Changes(rope=RopeChange("ntk"))) == text  # 2048 / 512


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("pi", {"rope_type": "linear", "factor": 4.0}),
        (
            "yarn",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
        ),
        (
            "llama3",
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": TRAINED,
            },
        ),
    ],
)
def test_scalings_follow_the_stage_and_go_on_from_their_own(
    kind: str, wanted: dict[str, object]
) -> None:
    change = Changes(rope=RopeChange(kind))
    text = stretched(change)
    assert text.rope_scaling == wanted
    assert text.rope_theta == 10000.0
    # A checkpoint of that stage, trained at 2048, stretched on to 8192.
    again = stretch(Llama4Config(text=text, vision=None), change, 8192, 2048).text
    assert again.rope_scaling == {**wanted, "factor": 16.0}
    # A stage that is shorter than that again leaves it as it is.
    shorter = stretch(Llama4Config(text=again, vision=None), change, 4096, 8192).text
    assert shorter.rope_scaling == again.rope_scaling
    # Stages no longer than what was trained have nothing to stretch.
    assert stretched(change, TRAINED).rope_scaling is None


def test_full_scope_leaves_chunked_layers_alone() -> None:
    kinds = ["chunked_attention", "full_attention"] * 2
    keys = {"no_rope_layers": [1] * 4, "layer_types": kinds}
    change = Changes(rope=RopeChange("yarn", 8.0), rope_theta=1e6, only_full_rope=True)
    text = stretched(change, **keys)
    assert text.rope_of(0).scaling is None
    assert text.rope_of(0).theta == 10000.0
    assert text.rope_of(1).scaling is not None
    assert text.rope_of(1).theta == 1e6
    assert not text.is_plain


@pytest.mark.parametrize(
    ("changes", "keys", "words"),
    [
        (Changes(rope=RopeChange("pi")), {"no_rope_layers": [0] * 4}, "no RoPE layer"),
        (Changes(attn_scale=0.3), {"no_rope_layers": [1] * 4}, "every layer of the model"),
        (Changes(scalable_softmax=True), {"no_rope_layers": [1] * 4}, "every layer of the model"),
        (
            Changes(rope=RopeChange("yarn")),
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "stretched already, as `linear`",
        ),
        (Changes(attn_scale=float("nan")), {}, "`attn_scale` is nan"),
        (
            Changes(rope=RopeChange("yarn", 4.0)),
            {
                "no_rope_layers": [1] * 4,
                "layer_types": ["chunked_attention", "full_attention"] * 2,
                "full_rope": {"rope_theta": 1e5},
            },
            "angles of their own",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: Changes, keys: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        stretched(changes, **keys)


def test_without_a_known_length_a_factor_has_to_be_given() -> None:
    with pytest.raises(UsageError, match="does not say which length"):
        stretch(config_of(), Changes(rope=RopeChange("ntk")), 2048, None)
    text = stretch(config_of(), Changes(rope=RopeChange("ntk", 4.0)), 2048, None).text
    assert text.rope_theta > 10000
