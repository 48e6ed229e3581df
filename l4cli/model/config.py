"""The shape of a model, in Hugging Face's keys, with their traps wrapped once.

in: a `config.json` or a preset's TOML; out: `Llama4Config`
source: HF Llama4Config, Llama4TextConfig, Llama4VisionConfig (transformers 5.23); published files
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from l4cli.errors import L4Error, UsageError, suggest

PRESETS = ("nano", "mini", "small", "scout", "maverick", "behemoth")
CHUNKED, FULL = "chunked_attention", "full_attention"  # the values of `layer_types`
# What RoPE layers with full attention may have of their own: an all-RoPE control stretches these
# alone. No Llama 4, so such a config has a `model_type` that other programs refuse.
FULL_ROPE = ("rope_theta", "rope_scaling", "use_qk_norm")
MODEL_TYPES = {"llama4": True, "llama4_text": False, "l4": True, "l4_text": False}  # has vision


@dataclass(frozen=True)
class RopeOptions:
    """How one kind of layer rotates."""

    theta: float
    scaling: dict[str, Any] | None
    use_qk_norm: bool


@dataclass
class TextConfig:
    """The decoder. Defaults are what Scout and Maverick share."""

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192  # of a routed expert and of the shared one
    intermediate_size_mlp: int = 16384  # of a dense layer
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict[str, Any] | None = None
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 1
    moe_layers: list[int] | None = None  # None: every `interleave_moe_layer_step`th
    no_rope_layers: list[int] | None = None  # 1 where a layer does use RoPE; None: by interval
    no_rope_layer_interval: int = 4
    attention_chunk_size: int | None = 8192  # None: no chunks, full attention everywhere
    layer_types: list[str] | None = None  # None: chunked where a layer uses RoPE, else full
    full_rope: dict[str, Any] | None = None  # of RoPE layers that attend in full: see `FULL_ROPE`
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: float = 8192
    attn_scale: float = 0.1
    scalable_softmax: bool = False  # NoPE queries times s ln(n), s learned by head
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 200000
    eos_token_id: int | list[int] | None = field(default_factory=lambda: [200001, 200007, 200008])
    pad_token_id: int | None = 200018

    def uses_rope(self, layer_idx: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        if self.no_rope_layers:  # published files hold [], which means the default pattern
            return bool(self.no_rope_layers[layer_idx])
        return (layer_idx + 1) % self.no_rope_layer_interval != 0

    def is_local(self, layer_idx: int) -> bool:
        """Whether a layer's queries see their own chunk only; published: the layers with RoPE."""
        if self.attention_chunk_size is None:
            return False
        if self.layer_types:
            return self.layer_types[layer_idx] == CHUNKED
        return self.uses_rope(layer_idx)

    def rope_of(self, layer_idx: int) -> RopeOptions:
        """How a layer that uses RoPE rotates."""
        theta, scaling, norm = self.rope_theta, self.rope_scaling, self.use_qk_norm
        if self.full_rope is None or self.is_local(layer_idx):
            return RopeOptions(theta, scaling, norm)
        own = self.full_rope
        return RopeOptions(
            own.get("rope_theta", theta),
            own.get("rope_scaling", scaling),
            own.get("use_qk_norm", norm),
        )

    @property
    def is_plain(self) -> bool:
        """Whether this is a Llama 4 that other programs compute alike."""
        return self.full_rope is None and not self.scalable_softmax

    def is_moe(self, layer_idx: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        if self.moe_layers is not None:
            return layer_idx in self.moe_layers
        return (layer_idx + 1) % self.interleave_moe_layer_step == 0


@dataclass
class VisionConfig:
    """The picture encoder, its pixel-shuffle adapter and the projector's input."""

    hidden_size: int = 1408
    intermediate_size: int = 5632
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    pixel_shuffle_ratio: float = 0.5
    vision_output_dim: int = 4096
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096

    @property
    def num_patches(self) -> int:
        """Patches of one tile, before pixel shuffle."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Tokens one tile costs in the text, after pixel shuffle."""
        return int(self.num_patches * self.pixel_shuffle_ratio**2)


@dataclass
class Llama4Config:
    """Text, vision (or none), and the token ids that tie them together."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    boi_token_index: int = 200080
    eoi_token_index: int = 200081
    image_token_index: int = 200092  # `<|patch|>`, not `<|image|>`
    is_estimate: bool = False  # Behemoth: never published

    def __post_init__(self) -> None:
        _check_text(self.text)
        if self.vision is not None:
            _check_vision(self.vision)

    @classmethod
    def from_dict(cls, keys: dict[str, Any], source: str = "config.json") -> Llama4Config:
        """Read Hugging Face's keys, of any transformers version, nested or text-only.

        raises: L4Error for another architecture or impossible sizes
        """
        model_type = keys.get("model_type")
        if model_type not in MODEL_TYPES:
            why = f"`model_type` is `{model_type}`, not `llama4` or `llama4_text`"
            fix = "pass a Llama 4 `config.json`"
            raise L4Error(f"cannot use `{source}` as a model config", why=why, fix=fix)
        try:
            _check_types(TextConfig, keys.get("text_config") or keys)
            _check_types(VisionConfig, keys.get("vision_config") or {})
            if not MODEL_TYPES[model_type]:
                return cls(text=_text_from(keys), vision=None)
            vision = keys.get("vision_config")
            indices = ("boi_token_index", "eoi_token_index", "image_token_index")
            return cls(
                text=_text_from(keys.get("text_config") or {}),
                vision=None if vision is None else _pick(VisionConfig, _flat_rope(vision)),
                **{name: keys[name] for name in indices if name in keys},
            )
        except L4Error as error:
            what = f"cannot use `{source}` as a model config"
            raise L4Error(what, why=error.why, fix=error.fix) from None
        except (TypeError, ValueError, AttributeError) as error:
            why = " ".join(str(error).split())
            fix = "compare it with the `config.json` of a published Llama 4"
            raise L4Error(f"cannot use `{source}` as a model config", why=why, fix=fix) from error

    @classmethod
    def from_file(cls, path: Path) -> Llama4Config:
        """Read a `config.json`. raises: L4Error naming what is wrong with it"""
        what, fix = f"cannot read model config `{path}`", "pass a Hugging Face Llama 4 config"
        try:
            keys = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise L4Error(what, why=(error.strerror or str(error)).lower(), fix=fix) from error
        except ValueError as error:
            raise L4Error(what, why=f"it is not JSON: {error}", fix=fix) from error
        if not isinstance(keys, dict):
            raise L4Error(what, why="it is not a JSON object", fix=fix)
        return cls.from_dict(keys, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Hugging Face's keys as published: `rope_theta` beside `rope_scaling`."""
        # Readers that do not know what is special about it must not take it for a Llama 4.
        kind = "llama4" if self.text.is_plain else "l4"
        text = {**dataclasses.asdict(self.text), "model_type": f"{kind}_text"}
        text = {k: v for k, v in text.items() if k not in _OWN_KEYS or not self.text.is_plain}
        text["hidden_act"] = "silu"
        if text["layer_types"] is None:
            del text["layer_types"]
        text |= {"attention_bias": False, "attention_dropout": 0.0, "use_cache": True}
        layers = range(self.text.num_hidden_layers)
        # Written out: readers disagree on what an absent list means.
        text["no_rope_layers"] = [int(self.text.uses_rope(i)) for i in layers]
        text["moe_layers"] = [i for i in layers if self.text.is_moe(i)]
        if self.vision is None:
            return {"architectures": ["Llama4ForCausalLM"], **text}
        vision = {**dataclasses.asdict(self.vision), "model_type": "llama4_vision_model"}
        vision |= {"hidden_act": "gelu", "attention_dropout": 0.0, "projector_dropout": 0.0}
        vision |= {"multi_modal_projector_bias": False, "vision_feature_layer": -1}
        vision |= {"vision_feature_select_strategy": "default", "initializer_range": 0.02}
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": kind,
            "boi_token_index": self.boi_token_index,
            "eoi_token_index": self.eoi_token_index,
            "image_token_index": self.image_token_index,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": text,
            "vision_config": vision,
        }


_OWN_KEYS = ("full_rope", "scalable_softmax")


def _flat_rope(keys: dict[str, Any]) -> dict[str, Any]:
    """Unfold transformers 5's `rope_parameters` into `rope_theta` and `rope_scaling`."""
    rope = keys.get("rope_parameters")
    if not rope:
        rope = keys.get("rope_scaling")
        if rope and "rope_type" not in rope and "type" in rope:  # the spelling of 2023
            return {**keys, "rope_scaling": {**rope, "rope_type": rope["type"]}}
        return keys
    rope = dict(rope)
    flat = {**keys, "rope_theta": rope.pop("rope_theta", keys.get("rope_theta"))}
    if flat["rope_theta"] is None:
        del flat["rope_theta"]
    flat["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return flat


def _text_from(keys: dict[str, Any]) -> TextConfig:
    keys = _flat_rope(keys)
    text = _pick(TextConfig, keys)
    if "head_dim" not in keys:
        text.head_dim = text.hidden_size // text.num_attention_heads
    # Early transformers dumped an integer here; any truthy value means on.
    text.attn_temperature_tuning = bool(text.attn_temperature_tuning)
    if "attention_chunk_size" in keys and keys["attention_chunk_size"] is None:
        text.attention_chunk_size = None
    return text


def _pick(cls: type, keys: dict[str, Any]) -> Any:
    """Build a config from the keys it knows; foreign keys carry nothing for us."""
    names = {f.name for f in dataclasses.fields(cls)}
    optional = {"rope_scaling", "moe_layers", "no_rope_layers", "attention_chunk_size"}
    optional |= {"layer_types", "full_rope"}
    optional |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    known = {k: v for k, v in keys.items() if k in names and (v is not None or k in optional)}
    return cls(**known)


def _check_types(cls: type, keys: dict[str, Any]) -> None:
    """Numbers are numbers. raises: ValueError naming the key"""
    for f in dataclasses.fields(cls):
        value = keys.get(f.name)
        if value is None or f.type not in ("int", "float", "int | None"):
            continue
        wanted = "a number" if f.type == "float" else "a whole number"
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not (is_whole or (f.type == "float" and isinstance(value, float))):
            raise ValueError(f"`{f.name}` is {value!r}, not {wanted}")


def _require(is_true: bool, why: str) -> None:
    if not is_true:
        fix = "change the sizes in the config, or with `--set`"
        raise L4Error("impossible model config", why=why, fix=fix)


def _check_text(text: TextConfig) -> None:
    sizes = "vocab_size hidden_size intermediate_size intermediate_size_mlp num_hidden_layers"
    sizes += " num_attention_heads num_key_value_heads head_dim max_position_embeddings"
    sizes += " num_local_experts num_experts_per_tok interleave_moe_layer_step"
    for name in [*sizes.split(), "no_rope_layer_interval"]:
        value = getattr(text, name)
        _require(isinstance(value, int) and value > 0, f"`{name}` is {value!r}, not above 0")
    for name in ("rope_theta", "rms_norm_eps", "floor_scale"):
        value = getattr(text, name)
        _require(0 < value < math.inf, f"`{name}` is {value}, not a number above 0")
    _require(math.isfinite(text.attn_scale), f"`attn_scale` is {text.attn_scale}")
    chunk = text.attention_chunk_size
    _require(chunk is None or chunk > 0, f"`attention_chunk_size` is {chunk!r}")
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    why = f"`num_key_value_heads` {kv_heads} does not divide `num_attention_heads` {heads}"
    _require(heads % kv_heads == 0, why)
    _require(text.head_dim % 2 == 0, f"`head_dim` {text.head_dim} is odd")
    top_k, experts = text.num_experts_per_tok, text.num_local_experts
    _require(top_k <= experts, f"`num_experts_per_tok` {top_k} is above {experts} experts")
    rope_flags = text.no_rope_layers
    why = f"`no_rope_layers` has {len(rope_flags or [])} entries, not {text.num_hidden_layers}"
    _require(not rope_flags or len(rope_flags) == text.num_hidden_layers, why)
    outside = [i for i in text.moe_layers or [] if not 0 <= i < text.num_hidden_layers]
    _require(not outside, f"`moe_layers` names {outside}, of {text.num_hidden_layers} layers")
    kinds = text.layer_types
    why = f"`layer_types` has {len(kinds or [])} entries, not {text.num_hidden_layers}"
    _require(not kinds or len(kinds) == text.num_hidden_layers, why)
    unknown = [kind for kind in kinds or [] if kind not in (CHUNKED, FULL)]
    _require(not unknown, f"`layer_types` names {unknown}; known are `{CHUNKED}` and `{FULL}`")
    _check_rope_scaling(text.rope_scaling or {})
    unknown = [key for key in text.full_rope or {} if key not in FULL_ROPE]
    _require(not unknown, f"`full_rope` has {unknown}; known are {list(FULL_ROPE)}")
    theta = (text.full_rope or {}).get("rope_theta", 1.0)
    is_number = isinstance(theta, int | float) and 0 < theta < math.inf
    _require(is_number, f"`full_rope` has `rope_theta` {theta!r}, not a number above 0")
    _check_rope_scaling((text.full_rope or {}).get("rope_scaling") or {})
    both = text.scalable_softmax and text.attn_temperature_tuning
    why = "`scalable_softmax` and `attn_temperature_tuning` are both on; each scales NoPE queries"
    _require(not both, why)
    _require(not text.tie_word_embeddings, "`tie_word_embeddings` is true; Llama 4 unties them")


_ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_ROPE_OPTIONS = ("attention_factor", "beta_fast", "beta_slow")  # of `yarn`


def _check_rope_scaling(scaling: dict[str, Any]) -> None:
    rope_type = scaling.get("rope_type", "default")
    known = ", ".join(f"`{name}`" for name in _ROPE_TYPES)
    why = f"`rope_scaling` is of type `{rope_type}`; known are {known}"
    _require(rope_type in _ROPE_TYPES, why)
    given = [name for name in _ROPE_OPTIONS if scaling.get(name) is not None]
    for name in [*_ROPE_TYPES[rope_type], *given]:
        value = scaling.get(name)
        is_number = isinstance(value, int | float) and value > 0
        _require(is_number, f"`rope_scaling` has `{name}` {value!r}, not a number above 0")


def _check_vision(vision: VisionConfig) -> None:
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size"
    sizes += " patch_size vision_output_dim projector_input_dim projector_output_dim"
    for name in sizes.split():
        value = getattr(vision, name)
        why = f"vision `{name}` is {value!r}, not above 0"
        _require(isinstance(value, int) and value > 0, why)
    _require(vision.num_channels == 3, f"`num_channels` is {vision.num_channels}, pictures have 3")
    ratio = vision.pixel_shuffle_ratio
    _require(0 < ratio <= 1, f"`pixel_shuffle_ratio` is {ratio}, not above 0 and at most 1")
    for name in ("norm_eps", "rope_theta"):
        value = getattr(vision, name)
        _require(0 < value < math.inf, f"vision `{name}` is {value}, not a number above 0")
    grid, rest = divmod(vision.image_size, vision.patch_size)
    why = f"`image_size` {vision.image_size} is no multiple of `patch_size` {vision.patch_size}"
    _require(rest == 0, why)
    shuffle = round(1 / vision.pixel_shuffle_ratio)
    _require(grid % shuffle == 0, f"{grid} patches a side are not divisible by {shuffle}")
    shuffled = vision.hidden_size * shuffle**2
    why = (
        f"vision `intermediate_size` {vision.intermediate_size} is not `hidden_size` x {shuffle**2}"
    )
    _require(vision.intermediate_size == shuffled, why)
    same = vision.projector_input_dim == vision.projector_output_dim == vision.vision_output_dim
    why = "`projector_input_dim`, `projector_output_dim` and `vision_output_dim` differ"
    _require(same, why)
    head_dim, rest = divmod(vision.hidden_size, vision.num_attention_heads)
    why = f"vision head dimension {vision.hidden_size}/{vision.num_attention_heads} is not a "
    _require(rest == 0 and head_dim % 4 == 0, why + "multiple of 4")


def preset_names() -> tuple[str, ...]:
    """The presets, smallest first."""
    return PRESETS


def load_preset(name: str) -> Llama4Config:
    """Read `presets/NAME.toml`. raises: UsageError for an unknown name"""
    if name not in PRESETS:
        why = "there is no such preset"
        raise UsageError(f"unknown preset `{name}`", why=why, fix=suggest(name, PRESETS))
    file = resources.files("l4cli.model.presets") / f"{name}.toml"
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return Llama4Config(
        text=TextConfig(**tables["text_config"]),
        vision=VisionConfig(**tables.get("vision_config", {})),
        is_estimate=tables.get("is_estimate", False),
    )
