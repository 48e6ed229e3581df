"""Find a model to talk to and load it with its tokenizer, picture geometry and defaults.

in: the checkpoint named, or nothing; out: `ChatModel`; raises L4Error saying what does not fit
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from l4cli import terminal
from l4cli.checkpoint import load_config, load_model, open_weights, resolve_checkpoint
from l4cli.data.geometry import PictureGeometry, read_processor_files
from l4cli.errors import L4Error
from l4cli.inference import Engine, SamplingOptions, open_offloaded, pack_weights
from l4cli.inference.coded import CodedPlan, load_planned, plan_coded
from l4cli.inference.native import NativeModel, why_not
from l4cli.inference.native_loading import find_native, is_quantized_folder, native_from_plain
from l4cli.model import Llama4Config, count_parameters
from l4cli.ops.choice import TRITON
from l4cli.ops.int4_experts import INT4_LINEAR
from l4cli.planning import available_memory
from l4cli.text import Tokenizer, load_tokenizer
from l4cli.training.device import torch_device

ENVIRONMENT = "L4_MODEL"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
SMALL_ACTIVE_PARAMETERS = 16_000_000  # read in about a millisecond
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": None}


@dataclass(frozen=True)
class ChatModel:
    """Everything an answer needs."""

    folder: Path
    tokenizer: Tokenizer
    engine: Engine
    geometry: PictureGeometry | None  # None: the model cannot see
    generation: Mapping[str, Any]  # the checkpoint's generation_config.json

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer: the chat format's own ids and those the checkpoint names."""
        named = self.generation.get("eos_token_id", [])
        return list(dict.fromkeys([*self.tokenizer.stop_ids, *_as_list(named)]))

    def sampling(self, flags: Mapping[str, Any], seed: int) -> SamplingOptions:
        """The checkpoint's way to choose, changed by what was asked for."""
        names = {field.name for field in fields(SamplingOptions)}
        values: dict[str, Any] = {"temperature": 0.0}
        if self.generation.get("do_sample"):
            values["temperature"] = 1.0
            values |= {k: v for k, v in self.generation.items() if k in names and v is not None}
        elif any(flags[name] is not None for name in ("top_k", "top_p", "min_p")):
            values["temperature"] = 1.0  # filters are for sampling
        elif self.generation.get("repetition_penalty") is not None:
            values["repetition_penalty"] = self.generation["repetition_penalty"]
        values |= {name: value for name, value in flags.items() if value is not None}
        if values["temperature"] == 0:
            values = {k: v for k, v in values.items() if k in ("temperature", "repetition_penalty")}
        return SamplingOptions(**values, seed=seed)


def load(
    checkpoint: Path | None,
    device: str,
    dtype: str,
    *,
    is_raw: bool,
    offload: Offload | None = None,
    before_weights: Callable[[Path, Tokenizer], None] | None = None,
) -> ChatModel:
    """Load the model; what can be known from small files is checked before the weights."""
    place = torch_device(device)
    folder = find(checkpoint)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    require_vocabulary(folder, tokenizer, config)
    if not is_raw:
        _require_chat_format(folder, tokenizer)
    geometry = geometry_of(folder, tokenizer, config)
    generation = _generation(folder, config)
    if before_weights is not None:
        before_weights(folder, tokenizer)
    model = open_model(folder, config, place, dtype, offload)
    engine = Engine(model, num_token_ids=tokenizer.vocab_size)
    return ChatModel(folder, tokenizer, engine, geometry, generation)


def open_model(
    folder: Path,
    config: Llama4Config,
    place: torch.device,
    dtype: str,
    offload: Offload | None = None,
) -> Any:
    """The weights, laid out for answering; refused where they do not fit."""
    if offload is not None and place.type == "cpu":
        terminal.say("`--offload experts` changes nothing on a CPU: experts are in host memory")
        offload = None
    model: Any = native_model(folder, config, place, dtype)
    if model is not None:
        return model
    plan = coded_plan(folder, config, place, dtype) if offload is None else None
    if plan is not None:
        _require_bytes(folder, plan.size_bytes, place, fix="use a smaller checkpoint")
        return load_planned(plan, place)
    if offload is None:
        _require_memory(folder, dtype, place)
        model = load_model(folder, device=place, dtype=DTYPES[dtype])
    else:
        _require_offload_memory(folder, config, dtype, place)
        model = open_offloaded(folder, place, DTYPES[dtype], offload.memory_bytes)
    model = in_cpp(model, folder, place)
    if isinstance(model, NativeModel):
        return model
    reason = pack_weights(model)
    if reason is not None and place.type == "cpu":
        terminal.say(f"decoding from plain weights: {reason}")
    return model


def native_model(
    folder: Path, config: Llama4Config, device: torch.device, dtype: str
) -> NativeModel | None:
    """The checkpoint in C++ where it can be, and `dtype` leaves the choice; says which runs."""
    if device.type != "cpu" or dtype != "auto":
        return None

    def on_making() -> None:
        terminal.say(f"laying out the weights of `{folder}` for this processor, once")

    found = find_native(folder, config, on_making)
    if isinstance(found, str):
        if is_quantized_folder(folder):
            how = "run in torch" if why_not() is not None else "are unpacked to bf16"
            terminal.say(f"quantized weights {how}: {found}")
        return None
    terminal.say(f"quantized weights run in C++ ({found.instructions})")
    return found


def in_cpp(model: Any, folder: Path, device: torch.device) -> Any:
    """A loaded model, in C++ on a CPU; says why where torch goes on with it."""
    if device.type != "cpu":
        return model
    found = native_from_plain(model)
    if not isinstance(found, str):
        return found
    if why_not() is None or not is_quantized_folder(folder):  # else `native_model` has said it
        terminal.say(f"plain weights run in torch: {found}")
    return model


def coded_plan(
    folder: Path, config: Llama4Config, device: torch.device, dtype: str
) -> CodedPlan | None:
    """How a GPU computes from int4 codes, where `dtype` leaves the choice; says what runs."""
    if device.type != "cuda" or not is_quantized_folder(folder):
        return None
    if dtype != "auto":
        terminal.say(f"quantized weights are widened to {dtype}, as `--dtype` says")
        return None
    plan = plan_coded(folder, config)
    if isinstance(plan, str):
        terminal.say(f"quantized weights are widened to bf16: {plan}")
        return None
    rest = plan.num_quantized - plan.num_coded
    others = f"; {rest} maps in other formats are widened to bf16" if rest else ""
    version, reason = INT4_LINEAR.choose(device, torch.bfloat16)
    way = version.name if version.name == TRITON else f"{version.name}: {reason}"
    terminal.say(f"{plan.num_coded} int4 maps are computed from their codes ({way}){others}")
    return plan


@dataclass(frozen=True)
class Offload:
    """Experts stay on the host; so much memory of the device holds some of them."""

    memory_bytes: int | None = None  # None: half of what is free


@contextmanager
def fitting_threads(model: ChatModel) -> Iterator[None]:
    """One thread for a model whose steps are shorter than waking a second one.

    Measured on nano, 2 cores: 370 tokens a second with one thread, 280 with two, and on a busy
    machine 170 and 24. `OMP_NUM_THREADS` decides where it is set.
    """
    before = torch.get_num_threads()
    num_active = count_parameters(model.engine.config).active
    if num_active < SMALL_ACTIVE_PARAMETERS and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find(checkpoint: Path | None) -> Path:
    """The folder named, or `$L4_MODEL`, or the newest run here that can chat."""
    if checkpoint is not None:
        return _named(checkpoint)
    named = os.environ.get(ENVIRONMENT)
    if named:
        terminal.say(f"model: `{named}` (`${ENVIRONMENT}`)")
        return resolve_checkpoint(named)
    runs = [run for run in Path("runs").glob("*/latest") if has_chat_template(run)]
    if not runs:
        raise L4Error(
            "no model to talk to",
            why=f"no `runs/*/latest` here has a chat template, and `${ENVIRONMENT}` is not set",
            fix="train one with `sh examples/quickstart.sh`, or name one: `l4 chat CHECKPOINT`",
        )
    # The link itself: it is made anew with every checkpoint.
    newest = max(runs, key=lambda run: (run.lstat().st_mtime_ns, str(run)))
    terminal.say(f"model: `{newest}` (the newest here)")
    return resolve_checkpoint(newest)


def _named(checkpoint: Path) -> Path:
    try:
        return resolve_checkpoint(checkpoint)
    except L4Error as error:
        if checkpoint.exists() or checkpoint.is_symlink():
            raise
        # Someone may have typed a question where the checkpoint goes.
        fix = f'{error.fix}; a question without a checkpoint: `l4 chat -p "..."`'
        raise L4Error(error.what, why=error.why, fix=fix) from None


def has_chat_template(folder: Path) -> bool:
    """Whether a folder says how to write a conversation."""
    if any((folder / name).is_file() for name in TEMPLATE_FILES):
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _require_chat_format(folder: Path, tokenizer: Tokenizer) -> None:
    needed = {
        "<|begin_of_text|>": tokenizer.bos_id,
        "<|header_start|>": tokenizer.header_start_id,
        "<|header_end|>": tokenizer.header_end_id,
        "<|eot|>": tokenizer.eot_id,
    }
    missing = [f"`{name}`" for name, token_id in needed.items() if token_id is None]
    if missing:
        why = f"its tokenizer has no {', '.join(missing)}"
    elif not has_chat_template(folder):
        why = "it has no chat template, so it has not learned the chat format"
    else:
        return
    fix = "continue plain text with `--raw`, or name a checkpoint trained on chats"
    raise L4Error(f"cannot chat with `{folder}`", why=why, fix=fix)


def require_vocabulary(folder: Path, tokenizer: Tokenizer, config: Llama4Config) -> None:
    """raises: L4Error where the tokenizer has more ids than the model"""
    if tokenizer.vocab_size > config.text.vocab_size:
        why = f"{tokenizer.vocab_size} tokens, and the model knows {config.text.vocab_size}"
        fix = "put the tokenizer it was trained with into the folder"
        raise L4Error(f"the tokenizer in `{folder}` does not fit the model", why=why, fix=fix)


def geometry_of(folder: Path, tokenizer: Tokenizer, config: Llama4Config) -> PictureGeometry | None:
    """How pictures are cut for this model."""
    if config.vision is None:
        return None
    files = read_processor_files(folder, "restore the folder's processor files")
    names = ("image_size", "patch_size", "pixel_shuffle_ratio")
    tower = {name: getattr(config.vision, name) for name in names}
    geometry = PictureGeometry.from_processor_files(files) or PictureGeometry(**tower)
    fix = "restore the folder's processor and tokenizer files"
    wrong = [name for name in names if getattr(geometry, name) != tower[name]]
    if wrong:
        name = wrong[0]
        why = f"`{name}` is {getattr(geometry, name)} there and {tower[name]} in `config.json`"
        what = f"the processor config in `{folder}` does not fit the model"
        raise L4Error(what, why=why, fix=fix)
    if tokenizer.patch_id not in (None, config.image_token_index):
        why = f"`<|patch|>` is {tokenizer.patch_id}, the model wants {config.image_token_index}"
        what = f"the tokenizer in `{folder}` does not fit the model"
        raise L4Error(what, why=why, fix=fix)
    return None if tokenizer.patch_id is None else geometry


def _generation(folder: Path, config: Llama4Config) -> dict[str, Any]:
    """The checkpoint's `generation_config.json`, checked; stop ids at least from `config.json`."""
    path = folder / "generation_config.json"
    found: Any = {}
    if path.is_file():
        what, fix = f"cannot use `{path}`", "correct the file, or remove it"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise L4Error(what, why=f"it is not JSON: {error}", fix=fix) from None
        if not isinstance(found, dict):
            raise L4Error(what, why="it is not a JSON object", fix=fix)
        numbers = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
        for name in numbers:
            value = found.get(name)
            is_count = name in ("top_k", "max_new_tokens")
            if isinstance(value, bool) or not isinstance(
                value, int | None if is_count else int | float | None
            ):
                wanted = "a whole number" if is_count else "a number"
                raise L4Error(what, why=f"`{name}` is {value!r}, not {wanted}", fix=fix)
        stop = found.get("eos_token_id")
        ids = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise L4Error(what, why=f"`eos_token_id` is {stop!r}, not token ids", fix=fix)
    found.setdefault("eos_token_id", config.text.eos_token_id)
    return found


def _require_memory(folder: Path, dtype: str, device: torch.device) -> None:
    stored = open_weights(folder)
    # Codes become the values they stand for.
    per_value = {"fp32": 4, "bf16": 2}.get(dtype, 2 if stored.quantization else None)
    needed = stored.num_parameters * per_value if per_value else stored.size_bytes
    _require_bytes(folder, needed, device, fix="use a smaller checkpoint, or `--dtype bf16`")


def _require_bytes(folder: Path, needed: int, device: torch.device, fix: str) -> None:
    available = available_memory(str(device))
    if needed > available:
        text = terminal.bytes_text
        why = f"its weights take {text(needed)}, and {text(available)} of memory are free"
        raise L4Error(f"cannot load `{folder}`", why=why, fix=fix)


def _require_offload_memory(
    folder: Path, config: Llama4Config, dtype: str, device: torch.device
) -> None:
    """raises: L4Error where the experts do not fit the host, or all else the device"""
    stored, counts = open_weights(folder), count_parameters(config)
    per_value = {"fp32": 4, "bf16": 2}.get(dtype, stored.size_bytes / stored.num_parameters)
    experts = counts.by_group["routed experts"]
    text = terminal.bytes_text
    for what, count, place in (
        ("experts", experts, "cpu"),
        ("weights without experts", counts.total - experts, str(device)),
    ):
        available = available_memory(place)
        if count * per_value > available:
            why = f"its {what} take {text(count * per_value)}, and {text(available)} are free"
            fix = "use a smaller checkpoint, or `--dtype bf16`"
            raise L4Error(f"cannot load `{folder}`", why=f"{why} ({place})", fix=fix)


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, list) else [int(ids)]
