"""The model under test: opened from small files first, loaded when everything else is known good.

in: a checkpoint folder, a tokenizer; out: an `Engine`; raises L4Error saying what does not fit
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from l4cli import terminal
from l4cli.checkpoint import (
    load_config,
    load_model,
    open_weights,
    require_weights_fit,
    resolve_checkpoint,
)
from l4cli.commands.chat_model import (
    DTYPES,
    coded_plan,
    has_chat_template,
    in_cpp,
    native_model,
)
from l4cli.commands.needle_options import Request
from l4cli.errors import L4Error, UsageError
from l4cli.evals.cells import length_text
from l4cli.evals.needle.engine_subject import EngineSubject, Frame
from l4cli.evals.needle.layer_subject import LayerSubject
from l4cli.inference import CacheOptions, Engine
from l4cli.inference.coded import CodedPlan, load_planned
from l4cli.inference.layer_major import open_streamed
from l4cli.model import Llama4Config
from l4cli.planning import available_memory
from l4cli.planning.memory import ITEM_BYTES
from l4cli.planning.reading import Machine, ReadingPlan, plan_reading
from l4cli.text import Tokenizer, load_tokenizer
from l4cli.training.device import torch_device
from l4cli.training.model_setup import apply_overrides
from l4cli.training.run_record import environment

_SAMPLED_BYTES = 1 << 16  # of each weights file, at both ends
HIDDEN = ".hidden-states"
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class TestedModel:
    """A checkpoint whose weights are not loaded yet."""

    folder: Path
    config: Llama4Config
    tokenizer: Tokenizer
    device: torch.device
    dtype: str  # auto, fp32, bf16
    kv_dtype: str = "auto"
    is_chat: bool = False
    layer_major: bool = False
    sparse_topk: int = 0
    scratch: Path | None = None  # where hidden states go that memory does not hold

    @classmethod
    def of(cls, request: Request) -> TestedModel:
        """The model that was asked for. raises: UsageError when there is nothing to test"""
        if request.checkpoint is None:
            why = "no checkpoint was named"
            fix = "`l4 needle-test CHECKPOINT`, or `--dry-run --preset scout` without one"
            raise UsageError("nothing to test", why=why, fix=fix)
        return cls.open(
            request.checkpoint,
            request.tokenizer,
            request.device.value,
            request.dtype.value,
            request.kv_dtype.value,
            is_chat=request.chat,
            overrides=request.set_ or (),
            layer_major=request.layer_major,
            sparse_topk=request.sparse_topk,
            scratch=request.out / HIDDEN,
        )

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        tokenizer: str | None,
        device: str,
        dtype: str,
        kv_dtype: str,
        *,
        is_chat: bool = False,
        overrides: Sequence[str] = (),
        layer_major: bool = False,
        sparse_topk: int = 0,
        scratch: Path | None = None,
    ) -> TestedModel:
        """Read config and tokenizer; `overrides`: `key=value` words that change the config."""
        place = torch_device(device)
        folder = resolve_checkpoint(checkpoint)
        config = load_config(folder)
        if overrides:
            config = _changed(config, overrides, folder)
        found = _tokenizer(folder, tokenizer)
        if found.vocab_size > config.text.vocab_size:
            named = tokenizer or f"in `{folder}`"
            why = f"{found.vocab_size} tokens, and the model knows {config.text.vocab_size}"
            fix = "name the one it was trained with: `--tokenizer`"
            raise L4Error(f"the tokenizer {named} does not fit the model", why=why, fix=fix)
        kinds = (dtype, kv_dtype, is_chat, layer_major, sparse_topk, scratch)
        return cls(folder, config, found, place, *kinds)

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def kind(self) -> str:
        """How it runs, in a few words."""
        way = ", layer by layer" if self.layer_major else ""
        return f"{self.compute_dtype}, {self.device}{way}"

    @property
    def reserve(self) -> int:
        """Tokens around a text and its question."""
        return Frame.of(self.tokenizer, is_chat=self.is_chat).num_tokens

    def facts(self) -> dict[str, Any]:
        """What tells it from other models."""
        return {
            "model": str(self.folder),
            "weights": self.weights_id,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def weight(self, length: int) -> float:
        """What a text of this length costs beside others."""
        return self.plan(length).time_s

    @property
    def compute_dtype(self) -> str:
        """What is computed in."""
        if self.dtype != "auto":
            return self.dtype
        stored = open_weights(self.folder)
        return "fp32" if stored.size_bytes >= 4 * stored.num_parameters else "bf16"

    @cached_property
    def weights_id(self) -> str:
        """Tells other weights in the same folder apart, from their sizes and ends."""
        return id_of_weights(self.folder)

    def plan(self, length: int) -> ReadingPlan:
        """What reading a text of this length takes here; rates are none of its business."""
        free = available_memory(str(self.device))
        machine = Machine(str(self.device), 1, free, 1.0, 1.0, 1.0)
        plan = plan_reading(
            self.config,
            length,
            machine,
            dtype=self.compute_dtype,
            kv_dtype=self.kv_dtype,
            is_layer_major=self.layer_major,
        )
        return plan if self.coded is None else replace(plan, weights_bytes=self.coded.size_bytes)

    @cached_property
    def coded(self) -> CodedPlan | None:
        """How a GPU computes from the checkpoint's codes, where it can."""
        if self.layer_major:
            return None
        return coded_plan(self.folder, self.config, self.device, self.dtype)

    def check_lengths(self, lengths: tuple[int, ...]) -> None:
        """Warn of what was never learned. raises: L4Error for lengths beyond memory"""
        if self.is_chat and not has_chat_template(self.folder):
            terminal.warn(f"`{self.folder}` has no chat template: `--chat` may be new to it")
        limit = self.config.text.max_position_embeddings
        if lengths[-1] > limit:
            terminal.warn(
                f"{length_text(lengths[-1])} tokens are more than `max_position_embeddings` "
                f"({limit}) of `{self.folder}`: it is tested beyond what it claims"
            )
        fitting = None
        for length in lengths:
            plan = self.plan(length)
            if not plan.fits:
                raise _too_long(plan, fitting)
            fitting = length

    def load(self, *, is_streamed: bool = False) -> Engine:
        """Load the weights, or all but the layers; the engine takes texts of any length."""
        dtype = DTYPES[self.dtype]
        model: Any = None
        if not self.layer_major:
            model = native_model(self.folder, self.config, self.device, self.dtype)
        if model is not None:
            pass
        elif self.coded is not None:
            model = load_planned(self.coded, self.device)
        elif is_streamed:
            model = open_streamed(self.folder, self.device, dtype, self.config)
        else:
            model = load_model(self.folder, device=self.device, dtype=dtype, config=self.config)
            if not self.layer_major:
                model = in_cpp(model, self.folder, self.device)
        return Engine(
            model,
            num_token_ids=self.tokenizer.vocab_size,
            max_context=_NO_LIMIT,
            cache_options=CacheOptions(self.kv_dtype, self.sparse_topk),  # type: ignore[arg-type]
        )

    def subject(self, longest: int) -> EngineSubject:
        """Load it, to be asked about texts of at most so many tokens."""
        if not self.layer_major:
            return EngineSubject(self.load(), self.tokenizer, is_chat=self.is_chat)
        plan = self.plan(longest)
        free = available_memory(str(self.device))
        stored = open_weights(self.folder)
        item = ITEM_BYTES[self.compute_dtype]
        is_streamed = max(stored.size_bytes, stored.num_parameters * item) > free / 2
        # Half of what is left once a layer is there: the rest of the machine lives on it too.
        host = available_memory("cpu") - (plan.total_bytes if self.device.type == "cpu" else 0)
        store: str | Path = "memory"
        if plan.host_bytes > host / 2:
            assert self.scratch is not None
            self.scratch.unlink(missing_ok=True)  # of a test that was killed
            store = self.scratch
            size = terminal.bytes_text(plan.host_bytes)
            terminal.say(f"the states of a text, up to {size}, go to `{store}`")
        return LayerSubject(
            self.load(is_streamed=is_streamed),
            self.tokenizer,
            hidden_store=store,
            weights=self.folder if is_streamed else None,
        )

    def report(self) -> dict[str, Any]:
        """What there is to say of the machine afterwards."""
        return {"machine": environment(self.device)}


def _changed(config: Llama4Config, overrides: Sequence[str], folder: Path) -> Llama4Config:
    """Apply `--set`; what gives the weights another shape is no test of them."""
    changed = apply_overrides(config, overrides)
    try:
        require_weights_fit(changed, folder)
    except L4Error as error:
        what = f"cannot test `{folder}` with " + " ".join(f"`--set {word}`" for word in overrides)
        raise UsageError(what, why=error.why, fix="set only what leaves weights alone") from None
    return changed


def _too_long(plan: ReadingPlan, fitting: int | None) -> L4Error:
    parts = {
        "weights": plan.weights_bytes,
        "keys and values": plan.full_cache_bytes + plan.local_cache_bytes,
        "activations": plan.activation_bytes,
    }
    text = terminal.bytes_text
    listed = ", ".join(f"{name} {text(size)}" for name, size in parts.items())
    free = text(plan.machine.total_memory_bytes)
    fix = "use a smaller model or a larger machine"
    if fitting is not None:
        fix = (
            f"ask for `--lengths` up to {length_text(fitting)}, keep less with `--kv-dtype int4`, "
            "or hold one layer at a time with `--layer-major`"
        )
    return L4Error(
        f"a text of {length_text(plan.num_tokens)} tokens does not fit this machine",
        why=f"it needs {text(plan.total_bytes)} ({listed}), and {free} is free",
        fix=fix,
    )


def _tokenizer(folder: Path, named: str | None) -> Tokenizer:
    if named is not None:
        return load_tokenizer(named)
    try:
        return load_tokenizer(folder)
    except L4Error as error:
        fix = "name the one it was trained with: `--tokenizer FOLDER`"
        raise L4Error(error.what, why=error.why, fix=fix) from None


def id_of_weights(folder: Path) -> str:
    """Tells a folder's weights from others without reading all of them."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]
