"""What is in a checkpoint's or a run's folder, from headers and small files only.

in: a folder; out: sizes, dtypes, hashes, the state of training
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4cli.checkpoint.compressed_tensors import METHOD, config_text
from l4cli.checkpoint.headers import Header
from l4cli.checkpoint.manifest import recorded_hashes
from l4cli.checkpoint.quantized import quantized_names
from l4cli.checkpoint.run_folder import RunFolder
from l4cli.checkpoint.stored import open_weights
from l4cli.checkpoint.training_state import STATE, read_state_json

_SHOWN_STATE = (str, int, float, bool, type(None))


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Describe weights and what lies beside them. raises: L4Error for what cannot be read"""
    stored = open_weights(folder)
    hashes = recorded_hashes(folder)
    facts: dict[str, Any] = {
        "dtype": next(iter(stored.dtypes), None),
        "dtypes": stored.dtypes,
        "num_tensors": len(stored.tensors),
        "num_stored_values": stored.num_parameters,
        "weights_bytes": stored.size_bytes,
        "num_weight_files": len(stored.files),
        "has_manifest": bool(hashes),
        "has_training_state": (folder / STATE).exists(),
        "files": [_file(name, header, hashes) for name, header in stored.files.items()],
    }
    if stored.quantization:
        facts["quantization"] = config_text(stored.quantization)
        if stored.quantization.get("quant_method") == METHOD:
            facts["num_quantized"] = len(quantized_names(stored))
            facts["bits_per_weight"] = 8 * stored.size_bytes / stored.num_parameters
    if facts["has_training_state"]:
        state = read_state_json(folder)
        facts["training"] = {k: v for k, v in state.items() if isinstance(v, _SHOWN_STATE)}
    return facts


def describe_run(run: RunFolder) -> dict[str, Any]:
    """Describe the steps of a run folder."""
    latest = run.latest()
    # Several models trained together, or the stages of one, have folders of their own.
    below = [path for path in sorted(run.path.glob("*/")) if RunFolder(path).steps()]
    parts = {
        path.name: {"steps": RunFolder(path).steps(), "locked_by": RunFolder(path).owner()}
        for path in below
        if not path.is_symlink()
    }
    return {
        "steps": run.steps(),
        # A folder of stages points into one of them.
        "latest": None if latest is None else latest.relative_to(run.path).as_posix(),
        "locked_by": run.owner(),
        **({"parts": parts} if parts else {}),
    }


def describe_weights_file(header: Header) -> dict[str, Any]:
    """Describe one safetensors file that is not part of a folder we know."""
    tensors = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape)}
        for name, entry in header.tensors.items()
    }
    return {
        "size_bytes": header.size_bytes,
        "num_tensors": len(tensors),
        "metadata": header.metadata,
        "tensors": tensors,
    }


def _file(name: str, header: Header, hashes: Mapping[str, str]) -> dict[str, Any]:
    facts = {"file": name, "num_tensors": len(header.tensors), "size_bytes": header.size_bytes}
    return {**facts, "sha256": hashes[name]} if name in hashes else facts
