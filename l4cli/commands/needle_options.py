"""What the command line of `needle-test` said, checked as far as words can be.

in: words; out: a `Request` with lists of lengths, depths and tasks (no torch)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from l4cli.commands.longcontext_options import haystack_digest
from l4cli.commands.needle_lists import parse_depths, parse_lengths
from l4cli.commands.options import DEFAULT_FPS, Device, WeightsDtype
from l4cli.errors import UsageError

NLL = "nll"  # not a question about a text, but how likely the text is


class KvDtype(StrEnum):
    """How keys and values of layers that see everything are kept; `auto` is as computed."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class Api(StrEnum):
    """How a server is asked."""

    chat = "chat"
    completions = "completions"


@dataclass(frozen=True)
class Request:
    """The fields are the parameters of `needle_test`."""

    checkpoint: Path | None
    lengths: str
    depths: str
    samples: int
    tasks: str
    frames: str | None
    hours: str | None
    fps: float
    haystack: list[str] | None
    qa: list[str] | None
    needle: str | None
    question: str | None
    keys: str | None
    values: str | None
    tokenizer: str | None
    set_: list[str] | None
    separate: bool
    chat: bool
    controls: bool
    threshold: float
    require: float | None
    dtype: WeightsDtype
    kv_dtype: KvDtype
    layer_major: bool
    sparse_topk: int
    endpoint: str | None
    model: str | None
    api: Api
    api_key_env: str | None
    jobs: int
    timeout: float
    max_tokens: int | None
    answer_tokens: int | None
    preset: str | None
    gpus: str | None
    out: Path
    fresh: bool
    dry_run: bool
    seed: int
    device: Device
    json: bool
    quiet: bool

    @cached_property
    def length_list(self) -> tuple[int, ...]:
        return parse_lengths(self.lengths)

    @cached_property
    def depth_list(self) -> tuple[float, ...]:
        return parse_depths(self.depths)

    @cached_property
    def shows(self) -> bool:
        """Whether frames or pictures are read instead of texts."""
        from l4cli.commands.needle_frames import is_shown

        return is_shown(self)

    @cached_property
    def task_list(self) -> tuple[str, ...]:
        """The tasks with a question, `nll` aside. raises: UsageError"""
        from l4cli.data.longcontext.tasks import parse_tasks

        words = [word.strip() for word in self.tasks.split(",")]
        asked = [word for word in words if word != NLL]
        return tuple(parse_tasks(",".join(asked))) if asked or NLL not in words else ()

    @property
    def wants_nll(self) -> bool:
        return NLL in [word.strip() for word in self.tasks.split(",")]

    def check(self) -> None:
        """Refuse what cannot be meant, before torch is loaded."""
        if self.shows:
            from l4cli.commands.needle_frames import check

            check(self)
        else:
            self.length_list, self.task_list  # noqa: B018
            if self.fps != DEFAULT_FPS:
                why, fix = "it is a rate of films", "add `--tasks video`, or leave it out"
                raise UsageError(f"`--fps {self.fps:g}` given", why=why, fix=fix)
            if self.qa and not {"qa", "qa-hops"} & set(self.task_list):
                why, fix = "no task asks about its rows", "add `--tasks qa` or `qa-hops`"
                raise UsageError(f"`--qa {self.qa[0]}` given", why=why, fix=fix)
        self.depth_list  # noqa: B018
        for name, value in (("preset", self.preset), ("gpus", self.gpus)):
            if value is not None and not self.dry_run:
                why = "it is for planning, and a test needs a checkpoint and this machine"
                fix = "add `--dry-run`, or leave it out"
                raise UsageError(f"`--{name} {value}` given", why=why, fix=fix)
        self._check_endpoint()
        for name, is_given in (("--chat", self.chat), ("--tasks nll", self.wants_nll)):
            if self.layer_major and is_given:
                why = "nothing can be written or read on after a reading layer by layer"
                fix = f"leave out `{name}` or `--layer-major`"
                raise UsageError(f"`{name}` and `--layer-major` given", why=why, fix=fix)
        if self.preset is not None and self.checkpoint is not None:
            why = "both name a model"
            raise UsageError(f"`{self.checkpoint}` and `--preset` given", why=why, fix="give one")

    def _check_endpoint(self) -> None:
        if self.endpoint is None:
            if self.model is not None:
                why = "it is the name of a model on a server"
                fix = "add `--endpoint URL`, or name a checkpoint folder without `--model`"
                raise UsageError(f"`--model {self.model}` given", why=why, fix=fix)
            return
        others = {
            f"`{self.checkpoint}`": self.checkpoint is not None,
            "`--preset`": self.preset is not None,
            "`--dry-run`": self.dry_run,
            "`--chat`": self.chat,
            f"`--kv-dtype {self.kv_dtype}`": self.kv_dtype is not KvDtype.auto,
            "`--layer-major`": self.layer_major,
            f"`--sparse-topk {self.sparse_topk}`": self.sparse_topk > 0,
            f"`--dtype {self.dtype}`": self.dtype is not WeightsDtype.auto,
            "`--set`": bool(self.set_),
            "`--tasks nll`": self.wants_nll,
        }
        for name, is_given in others.items():
            if is_given:
                why = "with `--endpoint` the model is the server's affair"
                fix = f"leave out {name} or `--endpoint`"
                raise UsageError(f"{name} and `--endpoint` given", why=why, fix=fix)

    def settings(self) -> dict[str, Any]:
        """What makes this test that one and no other, the model's own facts aside."""
        return {
            "lengths": list(self.length_list),
            "depths": list(self.depth_list),
            "samples": self.samples,
            "tasks": [*self.task_list, *([NLL] if self.wants_nll else [])],
            "seed": self.seed,
            "separate": self.separate,
            "controls": self.controls,
            "chat": self.chat,
            "api": None if self.endpoint is None else self.api.value,
            "dtype": self.dtype.value,
            "kv_dtype": self.kv_dtype.value,
            "layer_major": self.layer_major,
            "sparse_topk": self.sparse_topk,
            "set": self.set_,
            "haystack": self.haystack,
            "haystack_digest": haystack_digest(self.haystack or []),
            "qa": self.qa,
            "qa_digest": haystack_digest(self.qa or []),
            "needle": self.needle,
            "question": self.question,
            "keys": self.keys,
            "values": self.values,
        }
