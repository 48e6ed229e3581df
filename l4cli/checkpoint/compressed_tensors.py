"""What a `quantization_config` says: written as published checkpoints do, and read back.

in: formats by module name; out: the config's JSON, and the other way round
source: compressed-tensors 0.20: QuantizationConfig, match_targets, the W4A16 and FP8 presets
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from l4cli.errors import L4Error
from l4cli.quantization import WeightFormat
from l4cli.quantization.parts import PART_PATTERNS, layer_of, matches

METHOD = "compressed-tensors"
# What belongs to a quantized map beside its codes. Scales of activations are for kernels that
# quantize those too; weights do not depend on them.
BESIDE_CODES = (
    *("weight_scale", "weight_shape", "weight_zero_point"),
    *("input_scale", "input_zero_point"),
)
CACHE_SCALES = ("k_scale", "v_scale")  # of caches in fp8; ours have their own
# `mixed-precision` names a layout a group; `naive` and `int` store codes unpacked.
_LAYOUTS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
_SUPPORTED = "int4 and int8 (packed or not) and fp8 (e4m3), with one scale a row, group or block"


def write_config(formats: Mapping[str, WeightFormat | None]) -> dict[str, Any]:
    """The config of a model whose linear maps have these formats; None: left as it is.

    The commonest format is that of every `Linear`, others are named by pattern.
    """
    counts = Counter(format for format in formats.values() if format is not None)
    ranked = [format for format, _ in counts.most_common()]
    assert ranked, "nothing is quantized"
    kept = {name for name, format in formats.items() if format is None}
    groups = {}
    for i, format in enumerate(ranked):
        names = {name for name, chosen in formats.items() if chosen == format}
        targets = ["Linear"] if i == 0 else _patterns(names, formats, allowed=names | kept)
        groups[f"group_{i}"] = {"targets": targets, **_scheme(format)}
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": _patterns(kept, formats, allowed=kept),
        "config_groups": groups,
    }


def _scheme(format: WeightFormat) -> dict[str, Any]:
    strategy = "block" if format.block else "group" if format.group_size else "channel"
    weights = {
        "num_bits": format.bits,
        "type": "float" if format.name == "fp8" else "int",
        "symmetric": format.symmetric,
        "strategy": strategy,
        "group_size": format.group_size,
        "block_structure": list(format.block) if format.block else None,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "weights": weights,
        "input_activations": _activations(format),
        "output_activations": None,
        "format": "float-quantized" if format.name == "fp8" else "pack-quantized",
    }


def _activations(format: WeightFormat) -> dict[str, Any] | None:
    """fp8 products quantize what goes in as it comes, by token or by pieces of a block's width."""
    if format.name != "fp8":
        return None
    size = format.block[1] if format.block else None
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group" if size else "token",
        "group_size": size,
        "dynamic": True,
    }


def _patterns(names: set[str], everything: Iterable[str], allowed: set[str]) -> list[str]:
    """Patterns that match `names` and, of everything there is, only what is `allowed`.

    Of a part, of a part of one layer, or of one map, whatever says it shortest.
    """
    everything, left, patterns = list(everything), set(names), []
    layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    tails = [pattern.removeprefix("re:") for pattern in PART_PATTERNS.values()]
    for pattern in [*tails, *(f".*layers[.]{i}[.]{tail}" for i in layers for tail in tails)]:
        found = {name for name in everything if matches(f"re:{pattern}", name)} if left else set()
        if found & left and found <= allowed:
            patterns.append(f"re:{pattern}")
            left -= found
    # A prefix may differ: text models drop `language_model.`.
    ends = sorted({name.removeprefix("language_model.") for name in left})
    return patterns + [f"re:(language_model[.])?{re.escape(end)}$" for end in ends]


# Reading


def require_readable(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what cannot be read, by the config alone. raises: L4Error"""
    method = config.get("quant_method")
    if method != METHOD:
        raise _refused(folder, f"its method is `{method}`; `{METHOD}` is what `l4` reads")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise _refused(folder, f"`{METHOD}` without `config_groups` says nothing about its codes")
    for layout in [config.get("format"), *(group.get("format") for group in groups.values())]:
        if layout not in (None, "mixed-precision", *_LAYOUTS):
            raise _refused(folder, f"its format is `{layout}`; read are {_SUPPORTED}")
    for group in groups.values():
        weights = group.get("weights")
        if weights is not None:
            _require_format(folder, weights)


def _require_format(folder: Path, weights: Mapping[str, Any]) -> None:
    kind = (weights.get("type", "int"), weights.get("num_bits"))
    if kind not in (("int", 4), ("int", 8), ("float", 8)):
        raise _refused(folder, f"weights have {kind[1]} bits ({kind[0]}); read are {_SUPPORTED}")
    if weights.get("actorder") in ("group", True):
        raise _refused(folder, "its groups hold inputs in another order (`actorder`)")
    if not weights.get("symmetric", True) and kind != ("int", 4):
        raise _refused(folder, "it has zero points that are not those of int4")


def weights_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the config says of a module's weights: by exact name, by pattern, else of all."""
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]
    groups = [group for group in groups if group.get("weights")]
    for is_meant in (lambda t: t == name, lambda t: t.startswith("re:") and matches(t, name)):
        for group in groups:
            if any(is_meant(target) for target in group.get("targets", [])):
                return group["weights"]
    for group in groups:
        if "Linear" in group.get("targets", []):
            return group["weights"]
    return {}


def code_bits(config: Mapping[str, Any], name: str) -> int:
    """Bits of a module's codes, as its group says."""
    return int(weights_of(config, name).get("num_bits") or 4)


def config_text(config: Mapping[str, Any]) -> str:
    """A config in a few words: `compressed-tensors int4 g32, fp8`."""
    method = str(config.get("quant_method", "unknown method"))
    groups = config.get("config_groups")
    names = [_group_text(group) for group in groups.values()] if isinstance(groups, dict) else []
    return f"{method} {', '.join(name for name in names if name)}".strip()


def _group_text(group: Any) -> str:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not weights:
        return ""
    name = {"float": "fp", "int": "int"}.get(weights.get("type", "int"), "?")
    name += str(weights.get("num_bits"))
    if weights.get("strategy") == "group":
        name += f" g{weights.get('group_size')}"
    if weights.get("block_structure"):
        name += " " + "x".join(map(str, weights["block_structure"]))
    return name if weights.get("symmetric", True) else f"{name} zp"


def _refused(folder: Path, why: str) -> L4Error:
    what = f"cannot load quantized checkpoint `{folder}`"
    fix = "pass the bf16 version, or one written by `l4 quantize`"
    return L4Error(what, why=why, fix=fix)
