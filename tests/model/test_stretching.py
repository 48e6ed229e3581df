"""What a model may have to read longer texts: RoPE of full layers, scalable softmax."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

from l4cli.errors import L4Error
from l4cli.model import Llama4Config, TextConfig, build_model, count_parameters
from l4cli.model.config import CHUNKED, FULL

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rope_theta": 100.0,
    "moe_layers": [],
    "attention_chunk_size": 8,
}
IDS = torch.randint(0, 64, (1, 30), generator=torch.Generator().manual_seed(0))


def tiny(**changes: Any) -> Llama4Config:
    text = TextConfig(**{**TINY, "no_rope_layers": [1, 0], **changes})
    return Llama4Config(text=text, vision=None)


def test_scalable_softmax_multiplies_queries_by_s_ln_n() -> None:
    """By hand: a plain model whose position n gets the temperature s ln n gives the same."""
    config = tiny(scalable_softmax=True, attn_temperature_tuning=False)
    model = build_model(config, seed=1)
    scale = model.model.layers[1].self_attn.softmax_scale
    assert torch.allclose(scale, torch.full((2,), 0.1603), atol=1e-4)  # 1 / ln 512
    with torch.no_grad():
        scale.copy_(torch.tensor([0.3, 0.7]))
    plain = build_model(tiny(attn_temperature_tuning=False), seed=1)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("softmax_scale")}
    plain.load_state_dict(weights)
    for position in (1, 2, 7, 29):
        with torch.no_grad():  # the last position's temperature, put into its head's weights
            heads = torch.tensor([0.3, 0.7]).log().add(torch.tensor(position + 1.0).log().log())
            factor = heads.exp().repeat_interleave(16).unsqueeze(-1)
            q_proj = plain.model.layers[1].self_attn.q_proj.weight
            q_proj.copy_(weights["model.layers.1.self_attn.q_proj.weight"] * factor)
        ids = IDS[:, : position + 1]
        torch.testing.assert_close(model(ids)[0, -1], plain(ids)[0, -1], atol=1e-5, rtol=0)


def test_scalable_softmax_is_learned_and_counted() -> None:
    config = tiny(scalable_softmax=True, attn_temperature_tuning=False)
    model = build_model(config, seed=1)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    model(IDS).square().sum().backward()
    assert model.model.layers[1].self_attn.softmax_scale.grad.abs().min() > 0


def test_full_rope_layers_may_turn_in_their_own_way() -> None:
    """With the base's own values it changes nothing; with others only full layers change."""
    shape = {"no_rope_layers": [1, 1], "layer_types": [CHUNKED, FULL]}
    base = build_model(tiny(**shape), seed=3)
    same = build_model(tiny(**shape, full_rope={"rope_theta": 100.0}), seed=3)
    torch.testing.assert_close(base(IDS), same(IDS), atol=0, rtol=0)
    full = {"rope_theta": 10000.0, "use_qk_norm": False}
    other = build_model(tiny(**shape, full_rope=full), seed=3)
    # The same rotation everywhere, in transformers' way: both layers in full.
    for is_first_full in (True, False):
        kinds = [FULL if is_first_full else CHUNKED, FULL]
        whole = {"no_rope_layers": [1, 1], "layer_types": kinds, "rope_theta": 10000.0}
        alike = build_model(tiny(**whole, use_qk_norm=False), seed=3)
        mine = build_model(tiny(**{**shape, "layer_types": kinds}, full_rope=full), seed=3)
        is_same = torch.allclose(alike(IDS), mine(IDS), atol=1e-6)
        assert is_same == is_first_full
    assert not torch.allclose(base(IDS), other(IDS), atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"scalable_softmax": True, "attn_temperature_tuning": False},
        {"no_rope_layers": [1, 1], "layer_types": [CHUNKED, FULL], "full_rope": {"rope_theta": 9}},
    ],
)
def test_what_is_no_llama_4_is_refused_elsewhere(change: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(**change)
    keys = json.loads(json.dumps(config.to_dict()))
    assert keys["model_type"] == "l4_text"
    again = Llama4Config.from_dict(keys)
    assert again.to_dict() == keys
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises((ValueError, KeyError)):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_layer_types_stand_in_the_config_as_transformers_writes_them() -> None:
    theirs = oracle.text_oracle(**oracle.ALL_ROPE)
    mine = oracle.ours(theirs).config
    assert [mine.text.is_local(i) for i in range(5)] == [True, True, True, False, True]
    assert mine.to_dict()["layer_types"] == oracle.ALL_ROPE["layer_types"]
    assert mine.to_dict()["model_type"] == "llama4_text"
    plain = dataclasses.replace(mine.text, layer_types=None, no_rope_layers=None)
    written = Llama4Config(text=plain, vision=None).to_dict()
    assert not {"layer_types", "full_rope", "scalable_softmax"} & written.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scalable_softmax": True}, "each scales NoPE queries"),
        ({"layer_types": ["sliding_attention", FULL]}, "sliding_attention"),
        ({"layer_types": [FULL]}, "has 1 entries"),
        ({"full_rope": {"theta": 3}}, "known are"),
        ({"full_rope": {"rope_theta": 0}}, "not a number above 0"),
        ({"full_rope": {"rope_scaling": {"rope_type": "yarn"}}}, "`factor`"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "known are"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "`factor` 0"),
    ],
)
def test_impossible_ways_to_stretch_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(L4Error) as refused:
        tiny(**change)
    assert words in refused.value.why
