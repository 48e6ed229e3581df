"""Find a checkpoint's files, and read what their headers say.

in: a folder, or a run folder (its latest); out: the folder, its tensors' names, shapes and places
source: facts on checkpoint formats: one `model.safetensors`, or shards and their index
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from l4cli.checkpoint.compressed_tensors import BESIDE_CODES, code_bits
from l4cli.checkpoint.headers import Header, TensorEntry, read_header
from l4cli.checkpoint.run_folder import LATEST, RunFolder
from l4cli.checkpoint.tensor_file import read_tensor
from l4cli.errors import L4Error

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class StoredWeights:
    """The weight files of a folder, by their headers only."""

    folder: Path
    files: dict[str, Header]  # file name -> header
    tensors: dict[str, TensorEntry]
    file_of: dict[str, str]  # tensor -> file name

    @property
    def num_parameters(self) -> int:
        """How many values the weights have; a word of packed codes holds several."""
        total = 0
        for key, entry in self.tensors.items():
            name, _, leaf = key.rpartition(".")
            if leaf == "weight_packed":
                total += math.prod(entry.shape) * 32 // code_bits(self.quantization, name)
            elif not (self.quantization and leaf in BESIDE_CODES):
                total += math.prod(entry.shape)
        return total

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype, the commonest first."""
        return dict(Counter(entry.dtype for entry in self.tensors.values()).most_common())

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The config's `quantization_config`; empty for plain weights."""
        if not (self.folder / CONFIG).exists():
            return {}
        config = json_object(self.folder / CONFIG).get("quantization_config") or {}
        return config if isinstance(config, dict) else {"quant_method": str(config)}

    def read(self, key: str, index: int | None = None) -> Tensor:
        """One tensor, or its part at an index of the first dimension, as stored."""
        return read_tensor(self.folder / self.file_of[key], self.tensors[key], index)


def resolve_checkpoint(path: Path | str) -> Path:
    """Find the folder with the weights: `path`, or the latest of a run folder.

    raises: L4Error saying what was found instead
    """
    path = Path(path)
    what = f"cannot open checkpoint `{path}`"
    if path.is_symlink() and not path.exists():
        run = RunFolder(path.parent)
        why = f"it points to `{path.readlink()}`, which does not exist"
        raise L4Error(what, why=why, fix=_list_steps(run))
    if not path.exists():
        fix = _list_steps(RunFolder(path.parent)) if path.parent.is_dir() else "check the path"
        raise L4Error(what, why="there is no such folder", fix=fix)
    if not path.is_dir():
        why = "it is a file, and a checkpoint is a folder"
        raise L4Error(what, why=why, fix=f"pass the folder it is in: `{path.parent}`")
    run = RunFolder(path)
    if not (path / CONFIG).exists() and (run.steps() or (path / LATEST).is_symlink()):
        latest = run.latest()
        if latest is None or not latest.is_dir():
            why = f"it is a run folder whose `{LATEST}` points nowhere"
            raise L4Error(what, why=why, fix="save a checkpoint in it first")
        return latest
    parts = sorted(link.parent for link in path.glob(f"*/{LATEST}") if link.is_symlink())
    if not (path / CONFIG).exists() and parts:
        why = f"it is a run folder of {len(parts)} models"
        fix = "pass one of " + ", ".join(f"`{part}`" for part in parts[:5])
        raise L4Error(what, why=why, fix=fix)
    return path


def _list_steps(run: RunFolder) -> str:
    steps = [f"`{run.step_folder(step)}`" for step in run.steps()]
    return "pass one of " + ", ".join(steps[-5:]) if steps else "check the path"


def open_weights(folder: Path) -> StoredWeights:
    """Read the headers of a folder's weight files, and nothing else of them.

    raises: L4Error naming the file that is missing, cut off, or of another kind
    """
    names, weight_map = _weight_files(folder)
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        why = f"`{absent[0]}` is missing; `{INDEX}` names {len(names)} files, {len(absent)} absent"
        raise L4Error(f"cannot open checkpoint `{folder}`", why=why, fix="fetch the missing files")
    files = {name: read_header(folder / name) for name in names}
    tensors: dict[str, TensorEntry] = {}
    file_of: dict[str, str] = {}
    for name, header in files.items():
        for key, entry in header.tensors.items():
            if weight_map.get(key, name) == name:
                tensors[key], file_of[key] = entry, name
    for key, name in weight_map.items():
        if file_of.get(key) != name:
            why = f"`{INDEX}` says `{key}` is in `{name}`, and it is not"
            fix = "fetch the index and the weight files again"
            raise L4Error(f"cannot open checkpoint `{folder}`", why=why, fix=fix)
    return StoredWeights(folder, files, tensors, file_of)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the weight files, and the index's map of tensors to them."""
    if (folder / INDEX).exists():
        weight_map = json_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            why = f"`{INDEX}` has no `weight_map`"
            raise L4Error(f"cannot open checkpoint `{folder}`", why=why, fix="fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in names if Path(name).name != name or name in (".", "..")]
        if outside:
            why = f"`{INDEX}` names `{outside[0]}`, which is not a file in the folder"
            raise L4Error(f"cannot open checkpoint `{folder}`", why=why, fix="fetch it again")
        return names, weight_map
    if (folder / SINGLE).exists():
        return [SINGLE], {}
    raise _no_weights(folder)


def _no_weights(folder: Path) -> L4Error:
    what = f"cannot open checkpoint `{folder}`"
    if list(folder.glob("*.safetensors")):
        why = f"it has weight files, and neither `{SINGLE}` nor `{INDEX}`"
        return L4Error(what, why=why, fix=f"fetch `{INDEX}` too")
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        why = f"`{pickled[0]}` is pickled, and opening a pickle can run any code"
        fix = "fetch the safetensors version, or save it again with transformers' `save_pretrained`"
        return L4Error(what, why=why, fix=fix)
    fix = "pass a folder with `model.safetensors`"
    return L4Error(what, why="it has a config and no weights", fix=fix)


def json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise L4Error(f"cannot read `{path}`", why=why, fix="check the file") from error
    except ValueError as error:
        why = f"it is not JSON: {error}"
        raise L4Error(f"cannot read `{path}`", why=why, fix="fetch the file again") from error
    if not isinstance(value, dict):
        raise L4Error(f"cannot read `{path}`", why="it is not a JSON object", fix="fetch it again")
    return value
