"""What `--student` says: a shape or a checkpoint, and what is this student's alone.

in: words such as `preset:nano,name=dense,lr=4e-3,num_local_experts=2`; out: a `Student` (no torch)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from l4cli.commands import training_options as train
from l4cli.errors import L4Error, UsageError
from l4cli.training.soft_share import LOSSES, SoftShare, StudentLoss, parse_share

TEACHER = "teacher"  # the student that is cut from the teacher; the folder of one in training
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_STEP = re.compile(r"latest|step-\d+")  # what a run calls its checkpoints
# Options of the command that no student has for itself.
_OF_ALL = frozenset(
    {"temperature", "burn_in", "init_from_teacher", "steps", "tokens", "epochs", "seq_len"}
    | {"batch_size", "micro_batch_size", "decay_shape", "clip_grad", "dtype", "balance_rate"}
    | {"seed", "save_every", "eval_every", "eval_data", "log_every"}
)
# What stands after the commas and is neither of training nor of the model's config.
_ONLY_STUDENTS = frozenset(
    {"name", "layers", "experts", "loss", "alpha", "scaling_factor", "hard_targets"}
    | {"match", "match_weight"}
)


@dataclass(frozen=True)
class Cut:
    """How first weights are taken from the teacher."""

    layers: tuple[int, ...] | None = None
    experts: str = "drop"  # of a teacher trained from scratch an average keeps nothing


@dataclass(frozen=True)
class Student:
    """One student as the command line describes it; None is what all students have."""

    name: str
    preset: str | None = None
    file: Path | None = None  # a `config.json`
    checkpoint: Path | None = None
    cut: Cut | None = None  # first weights from the teacher
    overrides: Sequence[str] = ()  # `key=value` of the model's config
    training: Mapping[str, Any] = field(default_factory=dict)  # fields of the command's options
    loss: StudentLoss = field(default_factory=StudentLoss)
    match: tuple[tuple[int, int], ...] | None = None  # layers; None: spread over the depth

    @property
    def word(self) -> str:
        """What the command line names the shape by, for messages."""
        option = "--teacher" if self.name == TEACHER else "--student"
        preset = f"preset:{self.preset}" if self.preset else None
        return f"{option} {self.file or self.checkpoint or preset or TEACHER}"


@dataclass(frozen=True)
class Defaults:
    """What the command's own options say for all students."""

    loss: str
    alpha: str | None
    factor: float | None
    temperature: float
    hard_targets: str
    match_weight: float
    burn_in: float
    cut: Cut | None


def parse_students(words: Sequence[str], defaults: Defaults) -> list[Student]:
    """Read every `--student`. raises: UsageError naming the word that cannot be used"""
    students = [_parse(word, defaults) for word in words]
    names = [student.name for student in students]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two students are named `{name}`",
                why="each has a run folder of its own",
                fix=f"name one of them: `--student {words[names.index(name)]},name=other`",
            )
    return students


def parse_teacher(word: str) -> Student:
    """Read `--teacher` where the teacher is in training: a shape or a checkpoint to go on from.

    raises: UsageError
    """
    said = f"--teacher {word}"
    what, settings = _split(word, said)
    if what == TEACHER:
        raise _bad(said, "the teacher cannot be cut from itself", "`--teacher preset:mini`")
    teacher = replace(_shape_of(what, said, None), name=TEACHER)
    if own := _ONLY_STUDENTS & settings.keys():
        why = f"`{sorted(own)[0]}` is a student's, and this teacher learns from the data alone"
        raise _bad(said, why, "leave it out")
    training = _training_of(said, settings)
    return replace(teacher, overrides=_overrides(settings), training=training)


@contextmanager
def in_words_of(student: Student) -> Iterator[None]:
    """Inside, errors about a model name the options of this command."""
    try:
        yield
    except L4Error as error:
        # Elsewhere `--set` has the keys that stand after the commas here.
        error.what = re.sub(r"`--set (.+?)`", rf"`\1` in `{student.word}`", error.what)
        error.fix = re.sub(r"`--set (.+?)`", r"`\1`", error.fix)
        words = {"`--set`": f"`{student.word}`", "`--preset ": "`--student preset:"}
        if student.cut is not None and not (student.preset or student.file):
            words["leave `--init-from-teacher` out"] = "begin with another shape than `teacher`"
        for theirs, ours in words.items():
            error.what = error.what.replace(theirs, ours)
            error.fix = error.fix.replace(theirs, ours)
        raise


def _parse(word: str, defaults: Defaults) -> Student:
    said = f"--student {word}"
    what, settings = _split(word, said)
    student = _shape_of(what, said, defaults.cut)
    if (name := settings.pop("name", None)) is not None:
        student = replace(student, name=name)
    if not _NAME.fullmatch(student.name) or _is_taken(student.name):
        raise UsageError(
            f"cannot name a student `{student.name}`",
            why="it names a folder: letters, digits, `-` and `_`, and is no step's or teacher's",
            fix=f"`--student {what},name=small`",
        )
    student = replace(student, cut=_cut_of(student, settings, said))
    loss = _loss_of(said, settings, defaults)
    match = _value(said, settings, "match", _parse_pairs)
    if match is not None and not loss.match_weight:
        why = "`match` names layers whose states are matched, and nothing says how much that counts"
        raise _bad(said, why, "add `match_weight=0.1`, or leave `match` out")
    training = _training_of(said, settings)
    overrides = _overrides(settings)
    return replace(student, overrides=overrides, training=training, loss=loss, match=match)


def _is_taken(name: str) -> bool:
    """Whether a run folder has another use for the name."""
    return name == TEACHER or _STEP.fullmatch(name) is not None


def _split(word: str, said: str) -> tuple[str, dict[str, str]]:
    """What stands before the first comma, and the pairs after it."""
    what, *pairs = _parts(word)
    settings: dict[str, str] = {}
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if not is_pair:
            fix = f"write `key=value` after the comma, as in `{what},lr=3e-3`"
            raise _bad(said, f"`{pair}` has no `=`", fix)
        if key in settings:
            raise _bad(said, f"`{key}` is given twice", "leave one of them out")
        if key in _OF_ALL:
            option = "--" + key.replace("_", "-")
            raise _bad(said, f"`{key}` is the same for all models", f"use `{option}` for it")
        settings[key] = value
    return what, settings


def _parts(word: str) -> list[str]:
    """What commas part, apart from those inside a list or an object."""
    parts, depth = [""], 0
    for letter in word:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _training_of(said: str, settings: dict[str, str]) -> dict[str, Any]:
    keys = [key for key in _TRAINING if key in settings]
    return {key: _value(said, settings, key, _TRAINING[key]) for key in keys}


def _overrides(settings: Mapping[str, str]) -> list[str]:
    """What no option has claimed are keys of the model's config."""
    return [f"{key}={value}" for key, value in settings.items()]


def _shape_of(what: str, said: str, cut: Cut | None) -> Student:
    if what == TEACHER:
        return Student("student", cut=cut or Cut())
    if what.startswith("preset:"):
        preset = what.removeprefix("preset:")
        return Student(preset, preset=preset, cut=cut)
    path = Path(what)
    if path.suffix == ".json":
        return Student(path.stem, file=path, cut=cut)
    if not what or not path.is_dir():
        why = "it is no `preset:NAME`, no `teacher`, no `config.json`, and there is no such folder"
        option = said.partition(" ")[0]
        raise _bad(said, why, f"`{option} preset:nano`")
    if cut is not None:
        why = "`--init-from-teacher` gives first weights, and a checkpoint brings its own"
        raise _bad(said, why, "leave one of them out")
    folder = path.resolve()
    name = folder.parent.name if _STEP.fullmatch(folder.name) else folder.name
    return Student(name, checkpoint=path)


def _cut_of(student: Student, settings: dict[str, str], said: str) -> Cut | None:
    layers = _value(said, settings, "layers", _parse_layers)
    experts = _value(said, settings, "experts", _one_of("drop", "merge"))
    if layers is None and experts is None:
        return student.cut
    if student.checkpoint is not None:
        why = "`layers` and `experts` say how to cut the teacher, and a checkpoint has weights"
        raise _bad(said, why, "leave them out")
    cut = student.cut or Cut()
    return Cut(layers or cut.layers, experts or cut.experts)


def _loss_of(said: str, settings: dict[str, str], defaults: Defaults) -> StudentLoss:
    """The student's own words, where it has any, else the command's."""
    loss = _value(said, settings, "loss", _one_of(*LOSSES)) or defaults.loss
    text = settings.pop("alpha", None)
    own_factor = _value(said, settings, "scaling_factor", _positive)
    alpha, factor = text or defaults.alpha, own_factor or defaults.factor
    for option, value, own in (
        ("--alpha", alpha, text),
        ("--scaling-factor", factor, own_factor),
    ):
        if loss == "hybrid" or value is None:
            continue
        if own is None and defaults.loss == "hybrid":
            continue  # said for the students that have both losses
        why = f"it weighs soft targets against hard ones, and the loss is `{loss}`"
        raise UsageError(f"cannot use `{option} {value}`", why=why, fix="`--loss hybrid`")
    hard = _value(said, settings, "hard_targets", _one_of("data", TEACHER))
    match_weight = _value(said, settings, "match_weight", _not_negative)
    return StudentLoss(
        loss=loss,
        share=parse_alpha(alpha) if loss == "hybrid" and alpha is not None else None,
        factor=factor or 1.0 if loss == "hybrid" else 1.0,
        temperature=defaults.temperature,
        hard_from_teacher=(hard or defaults.hard_targets) == TEACHER,
        match_weight=defaults.match_weight if match_weight is None else match_weight,
        burn_in=defaults.burn_in,
    )


def parse_alpha(text: str) -> SoftShare:
    """Read `--alpha`. raises: UsageError"""
    try:
        return parse_share(text)
    except ValueError as error:
        raise UsageError(
            f"cannot use `--alpha {text}`",
            why=str(error),
            fix="write a share such as `0.5`, a schedule `0.1..0.9` (over the steps), `lr:0.9` "
            "(with the learning rate) or `token:0.9` (by the teacher's lead)",
        ) from None


def _value(said: str, settings: dict[str, str], key: str, read: Callable[[str], Any]) -> Any:
    text = settings.pop(key, None)
    if text is None:
        return None
    try:
        return read(text)
    except ValueError as error:
        raise _bad(said, f"`{key}={text}`: {error}", "correct it, or leave it out") from None


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError("it is none of " + ", ".join(f"`{choice}`" for choice in choices))
        return text

    return read


def _kind(kinds: type[StrEnum]) -> Callable[[str], StrEnum]:
    read = _one_of(*kinds)
    return lambda text: kinds(read(text))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("it is not a number") from None


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < float("inf"):
        raise ValueError("it is not above 0")
    return number


def _not_negative(text: str) -> float:
    number = _number(text)
    if not 0 <= number < float("inf"):
        raise ValueError("it is not 0 or above")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise ValueError("it is not from 0 to 1")
    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("it is not a whole number from 0 on")
    return int(text)


def _parse_layers(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split("+")))


def _parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Read `1:3+2:7`: the student's layer, the teacher's."""
    pairs = [part.split(":") for part in text.split("+")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("write pairs such as `0:1+1:3`, the student's layer first")
    return tuple((_count(student), _count(teacher)) for student, teacher in pairs)


# Options of training that a student may have of its own, and how they are read.
_TRAINING: dict[str, Callable[[str], Any]] = {
    "lr": _positive,
    "min_lr": _not_negative,
    "warmup": _count,
    "schedule": _kind(train.ScheduleKind),
    "decay_frac": _share,
    "optim": _kind(train.Optim),
    "weight_decay": _not_negative,
    "balance": _kind(train.BalanceKind),
}


def _bad(said: str, why: str, fix: str) -> UsageError:
    return UsageError(f"cannot use `{said}`", why=why, fix=fix)
