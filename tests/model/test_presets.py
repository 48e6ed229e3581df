"""Every preset loads, and has the parameters it should."""

from __future__ import annotations

import pytest

from l4cli.errors import L4Error, UsageError
from l4cli.model import (
    Llama4Config,
    build_model,
    count_parameters,
    load_preset,
    preset_names,
)


@pytest.mark.parametrize("name", preset_names())
def test_the_formula_counts_what_the_meta_device_builds(name: str) -> None:
    config = load_preset(name)
    model = build_model(config, device="meta")
    built = sum(weight.numel() for weight in model.parameters())
    vision = sum(
        weight.numel() for key, weight in model.named_parameters() if "language_model" not in key
    )
    counts = count_parameters(config)
    assert (counts.total, counts.vision) == (built, vision)
    assert sum(counts.by_group.values()) == built


def test_published_counts() -> None:
    scout, maverick = (count_parameters(load_preset(n)) for n in ("scout", "maverick"))
    assert (scout.total, maverick.total) == (108_641_793_536, 401_583_781_376)
    assert (scout.active, maverick.active) == (17_172_894_720, 17_184_691_200)
    assert scout.vision == maverick.vision == 871_932_416
    assert scout.by_group["routed experts"] == 96_636_764_160
    assert maverick.by_group["dense MLPs"] == 6_039_797_760


def test_behemoth_is_an_estimate_near_what_is_public() -> None:
    config = load_preset("behemoth")
    counts = count_parameters(config)
    assert config.is_estimate
    assert counts.total - counts.vision == 1_991_729_233_920
    assert counts.active == 288_506_265_600


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_tensor_counts_of_published_files(name: str) -> None:
    model = build_model(load_preset(name), device="meta")
    assert len(model.state_dict()) == {"scout": 1133, "maverick": 1061}[name]


@pytest.mark.parametrize("name", preset_names())
def test_config_survives_its_own_json(name: str) -> None:
    config = load_preset(name)
    again = Llama4Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    layers = range(config.text.num_hidden_layers)
    assert [again.text.is_moe(i) for i in layers] == [config.text.is_moe(i) for i in layers]


def test_transformers_reads_our_config() -> None:
    transformers = pytest.importorskip("transformers")
    config = load_preset("scout")
    theirs = transformers.Llama4Config(**config.to_dict()).text_config
    assert theirs.layer_types[3] == "full_attention"
    assert theirs.layer_types[0] == "chunked_attention"
    assert theirs.rope_parameters["rope_theta"] == 500000.0
    assert theirs.rope_parameters["factor"] == 16.0


def test_rope_flags_mean_what_transformers_means() -> None:
    text = load_preset("scout").text
    assert [i for i in range(48) if not text.uses_rope(i)] == list(range(3, 48, 4))
    text.no_rope_layers = [0, 1] * 24  # 1 marks a layer that does rotate
    assert [text.uses_rope(i) for i in range(4)] == [False, True, False, True]


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        load_preset("scuot")
    assert "scout" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"head_dim": 31}, "head_dim"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps"),
        ({"moe_layers": [99]}, "moe_layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "dynamic"),
    ],
)
def test_impossible_configs_are_refused(change: dict, word: str) -> None:
    keys = load_preset("nano").to_dict()
    keys["text_config"] |= change
    with pytest.raises(L4Error) as caught:
        Llama4Config.from_dict(keys)
    assert word in caught.value.why


def test_another_architecture_is_refused() -> None:
    with pytest.raises(L4Error, match="llama3"):
        Llama4Config.from_dict({"model_type": "llama3"})
