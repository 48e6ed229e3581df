"""What `l4 distill` was asked, and what cannot be meant.

in: words of the command line; out: a checked `Request` (no torch)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from l4cli.commands import shard_training as shared
from l4cli.commands import training_options as train
from l4cli.commands.distill_samples_options import ANSWER_OPTIONS, option_of
from l4cli.commands.distill_samples_request import SamplesRequest
from l4cli.commands.distill_students import (
    Cut,
    Defaults,
    Student,
    parse_alpha,
    parse_students,
    parse_teacher,
)
from l4cli.commands.needle_options import Api
from l4cli.errors import UsageError
from l4cli.posttraining.sample_choices import Keep, Reasoning

# Parameters of the command that neither a cache nor answers need.
_TRAINING = (
    *("student", "init_from_teacher", "codistill", "burn_in"),
    *("loss", "alpha", "scaling_factor", "hard_targets", "match_weight"),
    *("steps", "tokens", "epochs", "batch_size", "lr", "min_lr", "warmup", "schedule"),
    *("decay_frac", "decay_shape", "weight_decay", "clip_grad", "optim", "balance"),
    *("balance_rate", "activation_checkpointing", "save_every", "keep", "eval_every"),
    *("eval_data", "log_every"),
)
_CACHE = ("top_k", "tail_samples")
_PREDICTING = ("temperature", "dtype", "micro_batch_size")


class LossKind(StrEnum):
    """Which targets a student learns from."""

    hard = "hard"
    soft = "soft"
    hybrid = "hybrid"


class HardTargets(StrEnum):
    """What the hard target of a token is."""

    data = "data"
    teacher = "teacher"


@dataclass(frozen=True)
class Request(shared.TrainingRequest):
    """What the command line said; the fields are the parameters of `distill`."""

    shards: list[str]
    teacher: str | None
    student: list[str] | None
    out: Path | None
    init_from_teacher: bool
    codistill: bool
    burn_in: float
    write_cache: Path | None
    teacher_cache: Path | None
    top_k: int
    tail_samples: int
    teacher_endpoint: str | None
    from_samples: bool
    teacher_model: str | None
    api: Api | None
    api_key_env: str | None
    jobs: int | None
    timeout: float | None
    max_tokens: int | None
    samples_per_prompt: int | None
    max_new_tokens: int | None
    sampling_temperature: float | None
    sampling_top_p: float | None
    top_logprobs: int | None
    tokenizer: str | None
    checker: str | None
    checker_timeout: float | None
    keep_samples: Keep | None
    reasoning: Reasoning | None
    loss: LossKind
    alpha: str | None
    scaling_factor: float | None
    temperature: float
    hard_targets: HardTargets
    match_weight: float

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / "distill"

    @property
    def students(self) -> list[Student]:
        """Every `--student`, read."""
        defaults = Defaults(
            loss=self.loss.value,
            alpha=self.alpha,
            factor=self.scaling_factor,
            temperature=self.temperature,
            hard_targets=self.hard_targets.value,
            match_weight=self.match_weight,
            burn_in=self.burn_in,
            cut=Cut() if self.init_from_teacher else None,
        )
        return parse_students(self.student or [], defaults)

    @property
    def new_teacher(self) -> Student | None:
        """The teacher's shape and options where it is in training, too."""
        return parse_teacher(self.teacher) if self.codistill and self.teacher else None

    @property
    def samples(self) -> SamplesRequest | None:
        """What is asked of a teacher that only answers, if it is one."""
        if self.teacher_endpoint is None and not self.from_samples:
            return None
        given = {
            field: getattr(self, parameter)
            for parameter, field in ANSWER_OPTIONS.items()
            if getattr(self, parameter) is not None
        }
        if self.row_tokens is not None:
            given["seq_len"] = self.row_tokens
        return SamplesRequest(
            prompts=Path(self.shards[0]),
            out=self.out or Path("runs") / "answers",
            endpoint=self.teacher_endpoint,
            checkpoint=None if self.teacher is None else Path(self.teacher),
            seed=self.seed,
            device=self.device,
            fresh=self.fresh,
            dry_run=self.dry_run,
            **given,
        )

    def check(self, defaults: Mapping[str, Any]) -> None:
        """Refuse what needs no look at any file. `defaults`: of the command's parameters."""
        if (samples := self.samples) is not None:
            self._check_answers()
            self._check_used(defaults)
            samples.check()
            return
        for parameter in ANSWER_OPTIONS:
            if getattr(self, parameter) is not None:
                why = "it is about a teacher that answers prompts"
                fix = "add `--teacher-endpoint URL` or `--from-samples`, or leave it out"
                raise UsageError(f"cannot use `{option_of(parameter)}`", why=why, fix=fix)
        train.require_one_rank()
        self.length.check()
        if not 0 < self.temperature < float("inf"):
            why = "logits are divided by it"
            raise UsageError(
                f"cannot use `--temperature {self.temperature:g}`", why=why, fix="`--temperature 2`"
            )
        if self.scaling_factor is not None and not 0 < self.scaling_factor < float("inf"):
            raise UsageError(
                f"cannot use `--scaling-factor {self.scaling_factor:g}`",
                why="soft targets count times this",
                fix="`--scaling-factor 1`, or `--loss hard` without soft targets",
            )
        if self.match_weight == float("inf"):
            why = "no other loss would count"
            raise UsageError("cannot use `--match-weight inf`", why=why, fix="`--match-weight 1`")
        if self.alpha is not None:
            parse_alpha(self.alpha)
        self._check_teacher()
        if self.write_cache is not None:
            self._check_writing()
            self._check_used(defaults)
            return
        self._check_used(defaults)
        students = self.students
        if not students:
            why = "nothing would be trained"
            fix = "add `--student preset:nano`, or `--write-cache CACHE`"
            raise UsageError("no student given", why=why, fix=fix)
        for student in students:
            self._check_needs(student)
        new_teacher = self.new_teacher
        for member in [*students, *([] if new_teacher is None else [new_teacher])]:
            self.rate_of(member.training).check()

    def _check_teacher(self) -> None:
        """One source of targets, and what it can be combined with."""
        are_cut = any(student.cut is not None for student in self.students)
        if self.teacher is not None and self.teacher_cache is not None and not are_cut:
            why = "both say what the teacher predicts, and no student is cut from its weights"
            raise UsageError(
                "`--teacher` and `--teacher-cache` given", why=why, fix="give one of them"
            )
        if self.codistill and self.teacher is None:
            why = "`--codistill` trains a teacher"
            raise UsageError("no teacher given", why=why, fix="add `--teacher preset:mini`")
        is_shape = self.teacher is not None and self.teacher.startswith("preset:")
        if is_shape and not self.codistill:
            why = "a preset has no weights to predict with"
            fix = "name a checkpoint, or add `--codistill` to train the teacher, too"
            raise UsageError(f"cannot use `--teacher {self.teacher}`", why=why, fix=fix)
        if self.burn_in and not self.codistill:
            why = "a teacher that is not in training has nothing to learn first"
            raise UsageError(
                f"cannot use `--burn-in {self.burn_in:g}`", why=why, fix="leave it out"
            )

    def _check_used(self, defaults: Mapping[str, Any]) -> None:
        """Refuse options that would change nothing. `defaults`: of the command's parameters."""
        names: tuple[str, ...] = _CACHE
        why, fix = "it says what a cache keeps", "or add `--write-cache CACHE`"
        if self.samples is not None:
            names = (*_TRAINING, *_CACHE, *_PREDICTING, "write_cache", "teacher_cache")
            why = "first the teacher answers, then students learn"
            fix = "then give it to `l4 distill OUT/shards --teacher-cache OUT/cache ...`"
        elif self.write_cache is not None:
            names = (*_TRAINING, "out", "fresh")
            why = "`--write-cache` trains nothing"
            fix = "write the cache first, then train from it with `--teacher-cache`"
        for name in names:
            if getattr(self, name) == defaults[name]:
                continue
            if name == "temperature":
                fix = "or say `--sampling-temperature`, which answers are drawn at"
            elif name == "fresh":
                why, fix = "a cache is always continued", "or name a new folder"
            what = f"cannot use `{option_of(name)}` here"
            raise UsageError(what, why=why, fix=f"leave it out, {fix}")

    def _check_answers(self) -> None:
        if len(self.shards) > 1:
            why = "one file of prompts makes one folder of answers"
            raise UsageError(f"{len(self.shards)} files given", why=why, fix="name one of them")

    def _check_writing(self) -> None:
        if self.teacher is None:
            why = "a cache holds what a teacher predicts"
            raise UsageError("no teacher given", why=why, fix="add `--teacher CHECKPOINT`")
        if not self.top_k and not self.tail_samples:
            why = "beside the true tokens nothing of the teacher would be kept"
            raise UsageError(
                "`--top-k 0` and `--tail-samples 0` given", why=why, fix="leave one of them out"
            )

    def _check_needs(self, student: Student) -> None:
        """Refuse a student that needs more of a teacher than there is."""
        has_model = self.teacher is not None and self.teacher_cache is None
        what = f"the student `{student.name}` cannot be trained like this"
        if student.cut is not None and (self.teacher is None or self.codistill):
            why = "its first weights are to be cut from a teacher that is trained already"
            fix = "leave out `--codistill`" if has_model else "add `--teacher CHECKPOINT`"
            raise UsageError(what, why=why, fix=fix)
        if student.loss.match_weight and not has_model:
            why = (
                "hidden states are matched with those of a teacher that runs, and a cache has none"
            )
            raise UsageError(what, why=why, fix="`--teacher CHECKPOINT`, without a cache")
        if student.loss.needs_teacher and not has_model and self.teacher_cache is None:
            why = "it learns from a teacher's predictions, and no teacher is given"
            fix = "add `--teacher CHECKPOINT` or `--teacher-cache CACHE`, or use `--loss hard`"
            raise UsageError(what, why=why, fix=fix)
