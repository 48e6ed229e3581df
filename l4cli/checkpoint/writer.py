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
from l4cli.checkpoint.stored import CONFIG, INDEX, SINGLE
from l4cli.checkpoint.tensor_file import NamedTensor, stored_bytes, stored_dtype, write_tensors
from l4cli.data.geometry import PictureGeometry
from l4cli.errors import L4Error

GENERATION = "generation_config.json"


def save_model(
    model: nn.Module,
    folder: Path | str,
    tokenizer_files: Mapping[str, str],
    geometry: PictureGeometry | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
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
    hashes = _write_weights(model, folder, dtype, max_shard_bytes)
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


def _write_weights(
    model: nn.Module, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int
) -> dict[str, str]:
    """Write one file, or shards and their index; return file name -> SHA-256."""
    shards = _shards(list(model.state_dict().items()), dtype, max_shard_bytes)
    if len(shards) == 1:
        return {SINGLE: write_tensors(folder / SINGLE, shards[0], dtype)}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    hashes = {
        name: write_tensors(folder / name, shard, dtype)
        for name, shard in zip(names, shards, strict=True)
    }
    tensors = [tensor for shard in shards for _, tensor in shard]
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors),
        "total_size": sum(stored_bytes(tensor, dtype) for tensor in tensors),
    }
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key, _ in shard}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, _json(index))
    return hashes


def _shards(
    tensors: list[NamedTensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> list[list[NamedTensor]]:
    """Fill shards in the model's order; a tensor larger than a shard has one to itself."""
    shards: list[list[NamedTensor]] = [[]]
    filled = 0
    for name, tensor in tensors:
        size = stored_bytes(tensor, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += size
    return shards


def _main_dtype(model: nn.Module, dtype: torch.dtype | None) -> str:
    counts: Counter[torch.dtype] = Counter()
    for tensor in model.state_dict().values():
        counts[stored_dtype(tensor, dtype)] += tensor.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
