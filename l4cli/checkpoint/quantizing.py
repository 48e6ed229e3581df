"""Quantize a checkpoint layer by layer into a folder that other programs open.

in: a plain folder and a format for each part; out: a compressed-tensors folder, and what it cost
source: compressed-tensors 0.20; facts on quantized Llama 4 checkpoints

Memory holds what the quantizer holds and one expert or one other map: weights are read when they
are asked for, and codes are written into their place in the file as they come.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4cli.checkpoint.atomic import write_text
from l4cli.checkpoint.coded_tensors import coded_tensors
from l4cli.checkpoint.compressed_tensors import write_config
from l4cli.checkpoint.linear_maps import LinearMap, MapValues
from l4cli.checkpoint.manifest import recorded_hashes, write_manifest
from l4cli.checkpoint.planned_shards import PlannedShards
from l4cli.checkpoint.quantization_plan import QuantizationPlan
from l4cli.checkpoint.reader import DTYPES, read_finite
from l4cli.checkpoint.rewrite import SMALL_FILES
from l4cli.checkpoint.shard_files import MAX_SHARD_BYTES
from l4cli.checkpoint.stored import CONFIG, json_object
from l4cli.checkpoint.tensor_file import spec_bytes
from l4cli.checkpoint.writer import new_folder
from l4cli.errors import L4Error
from l4cli.quantization import QuantizedWeight, Quantizer

REPORT = "quantize.json"
_ERROR_VALUES = 1 << 22  # compared at once


# What it cost


@dataclass
class PartReport:
    """A part of a layer: `error` is that of all its weights, relative to their norm."""

    formats: set[str] = field(default_factory=set)
    num_weights: int = 0
    size_bytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def error(self) -> float:
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": " + ".join(sorted(self.formats)),
            "num_weights": self.num_weights,
            "size_bytes": self.size_bytes,
            "error": self.error,
        }


@dataclass
class LayerReport:
    """The linear maps of one layer (None: of what is outside the decoder)."""

    layer_idx: int | None
    bytes_before: int = 0
    parts: dict[str, PartReport] = field(default_factory=dict)

    def add(self, plan: QuantizationPlan, each: LinearMap) -> None:
        """Count a map; its error comes later."""
        part = self.parts.setdefault(each.part, PartReport())
        num_weights = each.shape[0] * each.shape[1]
        part.formats.add(plan.format_text(each))
        part.num_weights += num_weights
        part.size_bytes += sum(map(spec_bytes, plan.map_specs(each).values()))
        self.bytes_before += num_weights * DTYPES[plan.stored.tensors[each.key].dtype].itemsize

    def to_dict(self) -> dict[str, Any]:
        """The whole layer, then its parts."""
        lost = sum(part.squared_error for part in self.parts.values())
        had = sum(part.squared_norm for part in self.parts.values())
        return {
            "layer": self.layer_idx,
            "error": (lost / had) ** 0.5 if had else 0.0,
            "bytes_before": self.bytes_before,
            "size_bytes": sum(part.size_bytes for part in self.parts.values()),
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
        }


def relative_error_sums(quantized: QuantizedWeight, weight: Tensor) -> tuple[float, float]:
    """The squared norms of what was lost and of what there was, some rows at a time."""
    rows = max(1, _ERROR_VALUES // weight.shape[1])
    block = quantized.format.block[0] if quantized.format.block else 1
    rows = -(-rows // block) * block
    lost = had = 0.0
    for start in range(0, weight.shape[0], rows):
        scales = slice(start // block, -(-(start + rows) // block))
        part = QuantizedWeight(
            quantized.format,
            quantized.codes[start : start + rows],
            quantized.scale[scales],
            None if quantized.zero is None else quantized.zero[scales],
        )
        values = weight[start : start + rows].to(quantized.codes.device).float()
        lost += float((part.dequantize() - values).square().sum(dtype=torch.float64))
        had += float(values.square().sum(dtype=torch.float64))
    return lost, had


# The work


def quantize_checkpoint(
    plan: QuantizationPlan,
    out: Path | str,
    quantizer: Quantizer,
    *,
    on_layer: Callable[[LayerReport], None] | None = None,
    on_weights: Callable[[int], None] | None = None,
    describe: Callable[[], Mapping[str, Any]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[LayerReport]:
    """Write the folder, whole or not at all. `on_weights` hears how many weights are codes so far.

    `describe`, called last, gives what `quantize.json` shall say beside sizes and errors.
    raises: L4Error for weights that are not finite, or when `out` exists
    """
    out = Path(out)
    require_new(out)
    reports: list[LayerReport] = []
    specs, done = plan.specs(), 0
    with new_folder(out) as folder:
        with PlannedShards(folder, specs, max_shard_bytes) as shards:
            for piece in plan.others:
                tensor = read_finite(plan.stored, piece.key)
                shards.write(piece.name, tensor.to(specs[piece.name][0]))
            for layer_idx, maps in plan.layers():
                report = LayerReport(layer_idx)
                for each in _layer(plan, quantizer, layer_idx, maps, shards, report):
                    done += each
                    if on_weights is not None:
                        on_weights(done)
                reports.append(report)
                if on_layer is not None:
                    on_layer(report)
            shards.finish()
        _write_small_files(plan, folder, reports, dict(describe()) if describe else {})
        write_manifest(folder)
    return reports


def require_new(out: Path) -> None:
    """Refuse a folder that exists."""
    if out.exists() or out.is_symlink():
        fix = "choose another `-o`, or remove it first"
        raise L4Error(f"cannot write to `{out}`", why="it exists already", fix=fix)


def _layer(
    plan: QuantizationPlan,
    quantizer: Quantizer,
    layer_idx: int | None,
    maps: list[LinearMap],
    shards: PlannedShards,
    report: LayerReport,
) -> Iterator[int]:
    """Write one layer's maps; give the number of weights of each that became codes."""
    values, places = MapValues(plan.stored, maps), {each.name: each for each in maps}
    choices = {each.name: plan.choices[each.name] for each in maps if each.name in plan.choices}
    for each in maps:
        if each.name not in choices:
            ((key, (dtype, _)),) = plan.map_specs(each).items()
            shards.write(key, values[each.name].to(dtype))
        report.add(plan, each)
    # The layer outside the decoder may have nothing to do.
    quantized = quantizer.quantize_layer(layer_idx, values, choices) if choices else ()
    left = dict(choices)
    for name, weight in quantized:
        assert weight.format == left.pop(name), f"{name} is {weight.format}"
        lost, had = relative_error_sums(weight, values[name])
        report.parts[places[name].part].squared_error += lost
        report.parts[places[name].part].squared_norm += had
        for key, tensor in coded_tensors(name, weight).items():
            shards.write(key, tensor)
        yield weight.codes.numel()
    assert not left, f"the quantizer left out {list(left)[:3]}"


def _write_small_files(
    plan: QuantizationPlan, folder: Path, reports: list[LayerReport], more: dict[str, Any]
) -> None:
    for name in SMALL_FILES:
        if (plan.stored.folder / name).is_file():
            shutil.copyfile(plan.stored.folder / name, folder / name)
    formats = {each.name: plan.choices.get(each.name) for each in plan.maps}
    keys = {**plan.config.to_dict(), "torch_dtype": "bfloat16"}
    keys["quantization_config"] = write_config(formats)
    write_text(folder / CONFIG, json.dumps(keys, indent=2) + "\n")
    fields = {
        "format": "l4-quantization",
        "version": 1,
        **plan_facts(plan),
        **more,
        "layers": [report.to_dict() for report in reports],
    }
    write_text(folder / REPORT, json.dumps(fields, indent=1) + "\n")


def add_to_report(folder: Path, fields: Mapping[str, Any]) -> None:
    """Say more in the `quantize.json` of a folder that is finished."""
    known = {name: sha for name, sha in recorded_hashes(folder).items() if name != REPORT}
    report = {**json_object(folder / REPORT), **fields}
    write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
    write_manifest(folder, known)


def plan_facts(plan: QuantizationPlan) -> dict[str, Any]:
    """Sizes before and after, known before the work."""
    return {
        "num_parameters": plan.num_parameters,
        "num_quantized": plan.num_quantized,
        "bytes_before": plan.stored.size_bytes,
        "size_bytes": plan.size_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "bits_per_quantized_weight": plan.bits_per_quantized_weight,
        "left": plan.left,
    }
