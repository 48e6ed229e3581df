"""Make the config a run trains: a preset or a file, `--set`, and what the shards' tokenizer says.

in: names, files, `key=value` words, a tokenizer, a picture geometry; out: a `Llama4Config`
source: DESIGN "Vocabulary" and "Picture geometry"
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4cli.checkpoint import load_config, open_weights, require_weights_fit, resolve_checkpoint
from l4cli.errors import L4Error, UsageError, suggest
from l4cli.model import Llama4Config, TextConfig, VisionConfig, load_preset
from l4cli.text import Tokenizer, load_tokenizer

# These take their vocabulary from the shards; the published shapes keep theirs.
GROWING_PRESETS = ("nano", "mini", "small")
VOCAB_MULTIPLE = 64  # rows of a matrix product come in these

_SECTIONS: dict[str, type] = {"text_config": TextConfig, "vision_config": VisionConfig}
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def base_config(preset: str | None, file: Path | None, init_from: Path | None) -> Llama4Config:
    """The shape before `--set`: of a preset (nano if nothing is said), a file or a checkpoint."""
    if file is not None:
        return Llama4Config.from_file(file)
    if init_from is not None:
        return trainable_config(init_from)
    return load_preset(preset or "nano")


def trainable_config(checkpoint: Path) -> Llama4Config:
    """The config of a checkpoint whose weights are numbers. raises: L4Error for codes"""
    config, folder = load_config(checkpoint), resolve_checkpoint(checkpoint)
    if open_weights(folder).quantization:
        why = "it is quantized, and training goes on from full precision"
        fix = "name the checkpoint it was made from, or make numbers of its codes: "
        fix += f"`l4 convert {checkpoint} -o plain/`"
        raise L4Error(f"cannot train from `{checkpoint}`", why=why, fix=fix)
    return config


# What a run decides itself, and why.
_NOT_SET = {
    "initializer_range": "the first weights are scaled by the width of each map",
    "bos_token_id": "it is the shards' tokenizer's",
    "eos_token_id": "it is the shards' tokenizer's",
    "pad_token_id": "it is the shards' tokenizer's",
}


def apply_overrides(config: Llama4Config, words: Sequence[str]) -> Llama4Config:
    """Apply `--set key=value` words. raises: UsageError naming the word and what would fit"""
    text, vision = dataclasses.replace(config.text), config.vision
    vision = None if vision is None else dataclasses.replace(vision)
    for word in words:
        key, is_pair, value = word.partition("=")
        if not is_pair:
            fix = "write `--set key=value`, as in `--set hidden_size=256`"
            raise UsageError(f"cannot read `--set {word}`", why="it has no `=`", fix=fix)
        if key == "vision_config" and value == "null":
            vision = None
            continue
        section, name = _find_key(key, vision is not None)
        if name in _NOT_SET:
            raise UsageError(f"cannot set `{key}`", why=_NOT_SET[name], fix="leave it out")
        target = text if section == "text_config" else vision
        setattr(target, name, _typed(word, _SECTIONS[section], name, value))
    try:
        return dataclasses.replace(config, text=text, vision=vision)
    except L4Error as error:
        raise UsageError(error.what, why=error.why, fix=error.fix) from error


def _find_key(key: str, has_vision: bool) -> tuple[str, str]:
    """The section and field a key names; without a section the text half comes first."""
    fields = {s: [f.name for f in dataclasses.fields(cls)] for s, cls in _SECTIONS.items()}
    section, dot, name = key.partition(".")
    known = [f"{s}.{n}" for s, names in fields.items() for n in names]
    candidates = [(section, name)] if dot else [(s, key) for s in fields]
    for section, name in candidates:
        if name not in fields.get(section, []):
            continue
        if section == "vision_config" and not has_vision:
            why = "the model has no vision"
            raise UsageError(f"cannot set `{key}`", why=why, fix="leave it out")
        return section, name
    choices = known if dot else sorted({n for names in fields.values() for n in names})
    fix = suggest(key, choices)
    if not fix.startswith("did"):
        fix = "see the keys of `config.json` in any checkpoint, or `l4 info preset:nano`"
    raise UsageError(f"unknown key `{key}` in `--set`", why="a model has no such setting", fix=fix)


def _typed(word: str, cls: type, name: str, text: str) -> Any:
    annotation = typing.get_type_hints(cls)[name]
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if _fits(value, annotation):
        return float(value) if annotation is float else value
    raise UsageError(
        f"cannot use `--set {word}`",
        why=f"`{name}` is {_kind(annotation)}, not {json.dumps(value)}",
        fix=f"write `--set {name}=VALUE` with {_kind(annotation)}",
    )


def _fits(value: Any, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in annotation.__args__)
    origin = typing.get_origin(annotation) or annotation
    if origin is list:
        (item,) = typing.get_args(annotation)
        return isinstance(value, list) and all(_fits(v, item) for v in value)
    if origin is types.NoneType:
        return value is None
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, origin) and (origin is bool or not isinstance(value, bool))


def _kind(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        return " or ".join(_kind(part) for part in annotation.__args__)
    origin = typing.get_origin(annotation) or annotation
    if origin is types.NoneType:
        return "null"
    if origin is list:
        return "a list such as `[1, 2]`"
    return _KIND_NAMES.get(origin, "an object such as `{...}`")


def sets_vocab_size(words: Sequence[str]) -> bool:
    """Whether `key=value` words name the size, so that it does not follow the tokenizer."""
    return any(word.split("=")[0].endswith("vocab_size") for word in words)


def fit_vocabulary(
    config: Llama4Config, tokenizer: Tokenizer, *, name: str, grows: bool
) -> Llama4Config:
    """Give the config the tokenizer's size (rounded up) when it grows, and its token ids always.

    raises: UsageError for a vocabulary that does not fit, or vision without picture tokens
    """
    text = dataclasses.replace(config.text)
    if grows:
        text.vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    elif tokenizer.vocab_size > text.vocab_size:
        raise UsageError(
            f"the shards' vocabulary does not fit `{name}`",
            why=f"their tokenizer has {tokenizer.vocab_size} tokens, the model {text.vocab_size}",
            fix=f"`--set vocab_size={tokenizer.vocab_size}`, or tokenize with a smaller vocabulary",
        )
    text.bos_token_id, text.pad_token_id = tokenizer.bos_id, tokenizer.pad_id
    text.eos_token_id = list(tokenizer.stop_ids) or None
    config = dataclasses.replace(config, text=text)
    if config.vision is None:
        return config
    ids = (tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.patch_id)
    if any(i is None for i in ids):
        raise UsageError(
            f"`{name}` sees pictures and the shards' tokenizer has no tokens for them",
            why="`<|image_start|>`, `<|image_end|>` or `<|patch|>` is missing from its vocabulary",
            fix="`--set vision_config=null` trains on text alone, or tokenize with a vocabulary "
            "of `l4 train-tokenizer`",
        )
    start, end, patch = (int(i) for i in ids if i is not None)
    return dataclasses.replace(
        config, boi_token_index=start, eoi_token_index=end, image_token_index=patch
    )


def require_same_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Refuse shards whose token ids mean something else to the weights of a checkpoint."""
    folder = resolve_checkpoint(checkpoint)
    theirs = load_tokenizer(folder)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UsageError(
            f"the shards do not fit `{checkpoint}`",
            why="they were tokenized with another tokenizer than the checkpoint was trained with",
            fix=f"tokenize with `--tokenizer {folder}`",
        )


def require_weights(
    checkpoint: Path,
    config: Llama4Config,
    changed: Sequence[str],
    may_lack: tuple[str, ...] = (),
) -> None:
    """Refuse to start from a checkpoint that `--set` has made the model too different from."""
    try:
        require_weights_fit(config, checkpoint, may_lack=may_lack)
    except L4Error as error:
        if not changed:
            raise
        words = " ".join(f"--set {word}" for word in changed)
        raise UsageError(error.what, why=error.why, fix=f"leave out `{words}`") from error


def identity(config: Llama4Config) -> dict[str, Any]:
    """Every key of the shape under a flat name, to be compared when a run continues."""
    keys = config.to_dict()
    vision = keys.pop("vision_config", None) or {}
    flat = {**keys.pop("text_config", {}), **keys}
    flat |= {f"vision.{key}": value for key, value in vision.items()}
    return {f"model.{key}": value for key, value in flat.items()}
