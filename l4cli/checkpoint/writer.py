"""Write a model as a Hugging Face folder that transformers loads with no key too many or too few.

in: a model, its tokenizer's files; out: config, weights, index, tokenizer, processor
source: HF Llama4 checkpoints (transformers 5.23); DESIGN section 2
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l4cli.checkpoint.atomic import sync_folder, sync_tree, write_text
from l4cli.checkpoint.manifest import write_manifest
from l4cli.checkpoint.shard_files import MAX_SHARD_BYTES, write_shards
from l4cli.checkpoint.stored import CONFIG
from l4cli.checkpoint.tensor_file import at_hand, stored_dtype
from l4cli.data.geometry import PictureGeometry
from l4cli.errors import L4Error

GENERATION = "generation_config.json"


def save_model(
    model: nn.Module,
    folder: Path | str,
    tokenizer_files: Mapping[str, str],
    geometry: PictureGeometry | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that appears whole, with its manifest.

    An existing folder (one that `RunFolder.writing` gave, say) gets the files and the manifest
    as they come, and whoever made it commits it. `dtype` None keeps each parameter's own.
    raises: L4Error when the folder holds a model already
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        fix = "choose another folder, or remove this one first"
        raise L4Error(f"cannot write to `{folder}`", why="it holds a model already", fix=fix)
    if folder.exists() and not folder.is_dir():
        fix = "choose another name"
        raise L4Error(f"cannot write to `{folder}`", why="it is a file", fix=fix)
    if folder.is_dir():
        _write_files(model, folder, tokenizer_files, geometry, dtype, max_shard_bytes)
        return
    with new_folder(folder) as temporary:
        _write_files(model, temporary, tokenizer_files, geometry, dtype, max_shard_bytes)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden neighbour to fill; it takes the name when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed saves of the same folder left; a living process may still be writing."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process
    return True


def _write_files(
    model: nn.Module,
    folder: Path,
    tokenizer_files: Mapping[str, str],
    geometry: PictureGeometry | None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    weights = model.state_dict()
    tensors = [at_hand(name, tensor, dtype) for name, tensor in weights.items()]
    count = sum(tensor.numel() for tensor in weights.values())
    hashes = write_shards(folder, tensors, max_shard_bytes, total_parameters=count)
    config = model.config.to_dict()  # type: ignore[union-attr,operator]
    for name, text in tokenizer_files.items():
        write_text(folder / name, text)
    if config["model_type"] == "llama4":
        for name, text in _geometry(config, geometry).to_processor_files().items():
            write_text(folder / name, text)
    text_config = config.get("text_config", config)
    ids = {name: text_config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_text(folder / GENERATION, _json({k: v for k, v in ids.items() if v is not None}))
    # Published files spell it `torch_dtype`, which every transformers reads.
    write_text(folder / CONFIG, _json({**config, "torch_dtype": _main_dtype(model, dtype)}))
    write_manifest(folder, hashes)


def _geometry(config: dict[str, Any], given: PictureGeometry | None) -> PictureGeometry:
    """The tower's own sizes; text-only shards may have been tokenized for another one."""
    vision = config["vision_config"]
    sizes = {k: vision[k] for k in ("image_size", "patch_size", "pixel_shuffle_ratio")}
    return dataclasses.replace(given or PictureGeometry(), **sizes)


def _main_dtype(model: nn.Module, dtype: torch.dtype | None) -> str:
    counts: Counter[torch.dtype] = Counter()
    for tensor in model.state_dict().values():
        counts[stored_dtype(tensor, dtype)] += tensor.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
