"""What a resumed run needs beside the weights: optimizer and random state, cursor, options.

in: a tree of dicts, lists, tuples, numbers, text and tensors; out: the same tree, bit for bit
source: torch.distributed.checkpoint with safetensors storage (torch 2.13); DESIGN section 2

Tensors go through torch.distributed.checkpoint, whose safetensors writer corrupts files that hold
anything else, so everything else stands in `l4/state.json`, each tensor there as its name.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l4cli.checkpoint.atomic import write_text
from l4cli.checkpoint.manifest import verify_manifest
from l4cli.errors import L4Error

STATE = "l4/state.json"
TENSORS = "l4/tensors"
VERSION = 1
# The writer serialises a file in memory before it writes it, so files are kept small.
_FILE_BYTES = 512 << 20
_MARK = "$"  # starts the keys that stand for what JSON lacks


def save_training_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `l4/state.json` and `l4/tensors/` into a folder that someone else commits."""
    tensors: dict[str, Tensor] = {}
    plain = _split(dict(state), "", tensors)
    (folder / STATE).parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        import torch.distributed.checkpoint as dcp  # a second to import, and only training needs it

        writer = dcp.HuggingFaceStorageWriter(
            path=str(folder / TENSORS),
            fqn_to_index_mapping=_file_numbers(tensors),
            save_distributed=_is_distributed(),
        )
        with _torch_manners():
            dcp.save(_separate(tensors), storage_writer=writer, no_dist=not _is_distributed())
    fields = {"format": "l4-training-state", "version": VERSION, "state": plain}
    write_text(folder / STATE, json.dumps(fields, indent=1, allow_nan=False) + "\n")


def load_training_state(
    folder: Path, into: Mapping[str, Tensor] | None = None, *, verify: bool = True
) -> dict[str, Any]:
    """Read the tree back; tensors named in `into` are filled in place, others are new, on the CPU.

    raises: L4Error when the folder has no state, or files differ from their manifest
    """
    if verify:
        require_intact(folder)
    plain = read_state_json(folder)
    tensors = _load_tensors(folder / TENSORS, into or {}) if (folder / TENSORS).exists() else {}
    try:
        return _join(plain, tensors)
    except KeyError as error:
        why = f"`{STATE}` names tensor `{error.args[0]}`, which `{TENSORS}` does not hold"
        raise _damaged(folder, why) from error


def read_state_json(folder: Path) -> dict[str, Any]:
    """Read `l4/state.json` alone: the options and the cursor; tensors stay names."""
    try:
        fields = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version, state = fields["version"], fields["state"]
    except FileNotFoundError as error:
        raise L4Error(
            f"cannot continue from `{folder}`",
            why=f"it has no `{STATE}`: it holds weights only",
            fix="start a new run from it with `--init-from`",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"`{STATE}` cannot be read: {error}") from error
    if version != VERSION:
        why = f"its training state has version {version}, this `l4` reads {VERSION}"
        fix = "continue with the `l4` that wrote it, or use the weights with `--init-from`"
        raise L4Error(f"cannot continue from `{folder}`", why=why, fix=fix)
    return state


def require_intact(folder: Path) -> None:
    """Refuse a checkpoint whose files are not what its manifest says."""
    problems = verify_manifest(folder)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise _damaged(folder, f"{problems[0]}{more}")


def _damaged(folder: Path, why: str) -> L4Error:
    fix = f"remove `{folder}` to continue from the checkpoint before it"
    return L4Error(f"cannot continue from `{folder}`", why=why, fix=fix)


@contextmanager
def _torch_manners() -> Iterator[None]:
    """Silence "no process group" and let out what torch wraps, Ctrl-C included."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors wants: plain layouts, and no memory under two names."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        # Slices of one larger storage need no care: torch copies those by itself.
        separate[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return separate


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


def _load_tensors(folder: Path, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    try:
        stored = dcp.HuggingFaceStorageReader(path=str(folder)).read_metadata().state_dict_metadata
        # Only tensors are ever written, each with its dtype and whole shape.
        tensors = {
            name: into[name]
            if name in into
            else torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
            for name, entry in stored.items()
        }
        reader = dcp.HuggingFaceStorageReader(path=str(folder))
        with _torch_manners():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=not _is_distributed())
    except Exception as error:
        # safetensors and torch raise plain Exceptions of their own for torn files.
        raise _damaged(folder.parent.parent, f"`{TENSORS}` cannot be read: {error}") from error
    return tensors


def _split(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a tree into JSON values, its tensors moved out under dotted names."""
    if isinstance(tree, Tensor):
        assert name not in tensors, f"two tensors are called {name}"
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) and not key.startswith(_MARK) for key in tree):
            return {key: _split(value, _below(name, key), tensors) for key, value in tree.items()}
        items = [[key, _split(value, _below(name, key), tensors)] for key, value in tree.items()]
        assert all(isinstance(key, str | int) for key, _ in items), "keys are text or integers"
        return {"$items": items}
    if isinstance(tree, list | tuple):
        values = [_split(value, _below(name, i), tensors) for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"$tuple": values}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"$float": str(tree)}
    assert tree is None or isinstance(tree, bool | int | float | str), f"{name}: {type(tree)}"
    return tree


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_split`."""
    if isinstance(plain, list):
        return [_join(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    match next(iter(plain.items()), None):
        case ("$tensor", name):
            return tensors[name]
        case ("$items", items):
            return {key: _join(value, tensors) for key, value in items}
        case ("$tuple", values):
            return tuple(_join(value, tensors) for value in values)
        case ("$float", text):
            return float(text)
    return {key: _join(value, tensors) for key, value in plain.items()}
