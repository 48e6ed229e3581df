"""Read checkpoints: Hugging Face Llama 4 folders, as published and as `l4` writes them.

in: a folder, or a run folder (its latest); out: a config, or a model filled tensor by tensor
source: facts on checkpoint formats; safetensors `safe_open`

Quantized linear maps are filled with the values that their codes stand for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from l4cli.checkpoint.compressed_tensors import require_readable
from l4cli.checkpoint.hf_keys import Matching, Piece, match
from l4cli.checkpoint.quantized import (
    codes_shape,
    has_shape,
    is_quantized,
    module_of,
    plain_keys,
    read_quantized,
)
from l4cli.checkpoint.stored import (
    CONFIG,
    StoredWeights,
    json_object,
    open_weights,
    resolve_checkpoint,
)
from l4cli.errors import L4Error
from l4cli.model import Llama4Config, build_model

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Pages of a mapped file count as ours until it is closed, so a big file is opened anew.
_MAPPED_BYTES = 1 << 30


def load_config(path: Path | str, *, allow_quantized: bool = False) -> Llama4Config:
    """Read the config of a checkpoint.

    raises: L4Error for a missing config, another architecture, or codes that `l4` cannot read
    (`allow_quantized`: whatever the codes are)
    """
    folder = resolve_checkpoint(path)
    _require_config(folder)
    config = Llama4Config.from_file(folder / CONFIG)
    quantization = json_object(folder / CONFIG).get("quantization_config")
    if quantization and not allow_quantized:
        if not isinstance(quantization, dict):
            quantization = {"quant_method": str(quantization)}
        require_readable(folder, quantization)
    return config


def _require_config(folder: Path) -> None:
    if (folder / CONFIG).exists():
        return
    why, fix = f"`{CONFIG}` is missing", "pass a folder with a Hugging Face checkpoint"
    if not any(folder.iterdir()):
        why = "the folder is empty"
    elif (folder / "params.json").exists():
        why = "it holds Meta's own format (`params.json`), which `l4` cannot read yet"
        fix = "pass the Hugging Face version of the same model"
    elif (folder / "l4").is_dir():
        why = f"`{CONFIG}` is missing; the folder holds training state only"
    elif (folder / "index.json").exists():
        why = "it holds packed shards, not a model"
    elif (folder / "tokenizer.json").exists():
        why = f"`{CONFIG}` is missing; the folder holds a tokenizer only"
    raise L4Error(f"cannot open checkpoint `{folder}`", why=why, fix=fix)


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    config: Llama4Config | None = None,
    check_finite: bool = True,
) -> Any:
    """Build the model a checkpoint describes and stream its weights in.

    `dtype` None: as stored, which for codes is bf16. `config`: of the same shape, in place of the
    checkpoint's own.
    """
    folder = resolve_checkpoint(path)
    model = build_model(config or load_config(folder), device="meta")
    load_weights(model, folder, device=device, dtype=dtype, check_finite=check_finite)
    model.compute_dtype = _main_dtype(model)
    return model


def _main_dtype(model: nn.Module) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def require_weights_fit(
    config: Llama4Config, path: Path | str, *, may_lack: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint that a model of this shape cannot take; reads headers only.

    Parameters whose names end in one of `may_lack` may be missing.
    """
    _matched(build_model(config, "meta"), path, may_lack)


def matched_pieces(config: Llama4Config, path: Path | str) -> list[Piece]:
    """Where the values of each parameter are stored; refuses what does not fit."""
    return _matched(build_model(config, "meta"), path, ())[1].pieces


def _matched(
    model: nn.Module, path: Path | str, may_lack: tuple[str, ...]
) -> tuple[StoredWeights, Matching]:
    """Find where every parameter's values are, and refuse what does not fit."""
    stored = open_weights(resolve_checkpoint(path))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matching = match(plain_keys(stored), shapes)
    matching.missing = [name for name in matching.missing if not name.endswith(may_lack)]
    _check(stored, matching)
    return stored, matching


@torch.no_grad()
def load_weights(
    model: nn.Module,
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
    may_lack: tuple[str, ...] = (),
    only: Callable[[str], bool] | None = None,
) -> list[str]:
    """Fill a model's parameters from a checkpoint, all or `only` those of some names.

    Return those it lacks, which keep their values.

    Parameters on the meta device are made on `device`, as `dtype` or as stored; others keep
    their place and dtype. Everything that headers can tell is checked before anything is read.
    Only names that end in one of `may_lack` may be missing.
    """
    stored, matching = _matched(model, path, may_lack)
    parameters = dict(model.named_parameters())
    pieces = [piece for piece in matching.pieces if only is None or only(piece.name)]

    def fill(piece: Piece, tensor: Tensor, stored_as: torch.dtype, file: Path) -> None:
        parameter = parameters[piece.name]
        if parameter.is_meta:
            parameter = _materialise(model, piece.name, device, dtype or stored_as)
            parameters[piece.name] = parameter
        if check_finite:
            require_finite(file, piece.key, tensor)
        _place(parameter, piece, tensor)

    coded = [piece for piece in pieces if is_quantized(stored, module_of(piece.key))]
    plain = [piece for piece in pieces if not is_quantized(stored, module_of(piece.key))]
    for group in _groups(stored, plain):
        file = stored.folder / stored.file_of[group[0].key]
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for piece in group:
                    tensor = tensors.get_tensor(piece.key)
                    fill(piece, tensor, DTYPES[stored.tensors[piece.key].dtype], file)
        except SafetensorError as error:
            fix = "fetch or write the file again"
            raise L4Error(f"cannot read `{file}`", why=str(error), fix=fix) from error
    for piece in coded:
        weight = read_quantized(stored, module_of(piece.key))
        if weight.shape != piece.shape:
            why = f"`{piece.key}` says it is {list(weight.shape)}, the model needs "
            fix = "fetch or write it again"
            what = f"cannot load quantized checkpoint `{stored.folder}`"
            raise L4Error(what, why=f"{why}{list(piece.shape)}", fix=fix)
        fill(piece, weight.dequantize(), torch.bfloat16, stored.folder)
    filled = {piece.name for piece in matching.pieces}
    return [name for name in parameters if name not in filled]


def _groups(stored: StoredWeights, pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces in the order of their data, split by file and by what may be mapped at once."""
    groups: list[list[Piece]] = []
    mapped = 0
    last_file = ""
    for piece in sorted(pieces, key=lambda p: (stored.file_of[p.key], stored.tensors[p.key].start)):
        file, size = stored.file_of[piece.key], stored.tensors[piece.key].size_bytes
        if file != last_file or mapped + size > _MAPPED_BYTES:
            groups.append([])
            mapped = 0
        groups[-1].append(piece)
        last_file, mapped = file, mapped + size
    return groups


def _materialise(
    model: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype
) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    values = torch.empty(old.shape, dtype=dtype, device=device)
    parameter = nn.Parameter(values, requires_grad=old.requires_grad)
    setattr(module, leaf, parameter)
    return parameter


def _place(parameter: Tensor, piece: Piece, tensor: Tensor) -> None:
    if piece.expert is None:
        parameter.copy_(tensor)
    else:
        start, end = piece.columns
        parameter[piece.expert, :, start:end].copy_(tensor.T)


def read_finite(stored: StoredWeights, key: str, index: int | None = None) -> Tensor:
    """`stored.read`, checked. raises: L4Error for values that are NaN or infinite"""
    tensor = stored.read(key, index)
    require_finite(stored.folder / stored.file_of[key], key, tensor)
    return tensor


class LastRead:
    """`read_finite` that keeps what it gave last: an expert's gate and up may lie in one tensor."""

    def __init__(self, stored: StoredWeights) -> None:
        self._stored = stored
        self._last: tuple[tuple[str, int | None], Tensor] | None = None

    def __call__(self, key: str, index: int | None = None) -> Tensor:
        if self._last is None or self._last[0] != (key, index):
            self._last = None  # before the next is read: never two at once
            self._last = ((key, index), read_finite(self._stored, key, index))
        return self._last[1]


def require_finite(file: Path, key: str, tensor: Tensor) -> None:
    """Refuse values that are NaN or infinite."""
    if tensor.numel() == 0:
        return
    # One pass and no copy: minimum and maximum carry NaN and infinity along.
    if bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        return
    count = int((~torch.isfinite(tensor)).sum())
    why = f"`{key}` has {count} of {tensor.numel()} values that are NaN or infinite"
    fix = "use an earlier checkpoint, or fetch the file again"
    raise L4Error(f"cannot use `{file}`", why=why, fix=fix)


def _check(stored: StoredWeights, matching: Matching) -> None:
    """Refuse what does not fit, from the headers alone."""
    what = f"cannot load checkpoint `{stored.folder}`"
    for key in plain_keys(stored) if stored.quantization else stored.tensors:
        entry = stored.tensors.get(key)
        if entry is None or entry.dtype in DTYPES or key.endswith(("inv_freq", "freqs_ci")):
            continue
        if not (stored.quantization and is_quantized(stored, module_of(key))):
            raise _unreadable(stored.folder, f"`{key}` is stored as {entry.dtype}")
    fix = "the weights and `config.json` belong to different models: fetch both from one place"
    if matching.missing:
        why = f"the model needs {_some(matching.missing)}, which the files do not hold"
        raise L4Error(what, why=why, fix=fix)
    if matching.unexpected:
        why = f"the files hold {_some(matching.unexpected)}, which the model has no place for"
        raise L4Error(what, why=why, fix=fix)
    for piece in matching.pieces:
        name = module_of(piece.key)
        if is_quantized(stored, name):
            if has_shape(stored, name, piece.shape):
                continue
            shape: tuple[int, ...] = codes_shape(stored, name)
        else:
            shape = stored.tensors[piece.key].shape
        if shape != piece.shape:
            why = f"`{piece.key}` is {list(shape)} in the file, the model needs {list(piece.shape)}"
            raise L4Error(what, why=why, fix=fix)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _unreadable(folder: Path, why: str) -> L4Error:
    fix = f"pass a checkpoint whose `{CONFIG}` says how it is quantized, or the bf16 version"
    what = f"cannot load quantized checkpoint `{folder}`"
    return L4Error(what, why=f"{why}, and nothing says what that stands for", fix=fix)
