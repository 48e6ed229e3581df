"""What follows from a request and its data: every model of the run, checked, nothing allocated.

in: what the command line said; out: `Ready`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l4cli import terminal
from l4cli.commands import shard_training as shared
from l4cli.commands.distill_students import TEACHER, Student, in_words_of
from l4cli.commands.distill_teacher import (
    Teacher,
    matched_layers,
    open_cache,
    prepare_teacher,
    shape_from_teacher,
)
from l4cli.errors import L4Error

if TYPE_CHECKING:
    import torch

    from l4cli.commands.distill_request import Request
    from l4cli.data.loader import ShardSource
    from l4cli.data.teacher_cache import TeacherCache
    from l4cli.model import Llama4Config
    from l4cli.training.cut_plan import CutPlan


@dataclass(frozen=True)
class Member:
    """One model of the run: a student, or the teacher in training."""

    student: Student
    recipe: shared.Recipe
    prepared: shared.Prepared
    init_from: Path | None  # whose weights it begins with

    @property
    def config(self) -> Llama4Config:
        return self.prepared.config


@dataclass(frozen=True)
class Ready:
    """Everything checked, nothing large allocated."""

    members: Sequence[Member]
    teacher: Teacher | None
    cache: TeacherCache | None
    source: ShardSource
    num_steps: int
    device: torch.device

    @property
    def names(self) -> list[str]:
        """The folders of several models; one model has the run folder itself."""
        names = [member.student.name for member in self.members]
        return names if len(names) > 1 else []

    @property
    def asked(self) -> Teacher | None:
        """The teacher whose predictions are asked for: beside a cache its weights alone are."""
        return self.teacher if self.cache is None else None

    @property
    def num_bytes(self) -> int:
        """What all of them take together, with the teacher."""
        num_bytes = sum(member.prepared.plan.total_bytes for member in self.members)
        return num_bytes + (0 if self.asked is None else self.asked.num_bytes)

    def teacher_config(self) -> Llama4Config:
        """The shape of the teacher, trained already or in training."""
        return self.members[0].config if self.teacher is None else self.teacher.config

    def matched_layers(self, member: Member) -> list[tuple[int, int]]:
        """Whose states are matched, if any are. raises: UsageError for layers there are not"""
        student = member.student
        if student.name == TEACHER or not student.loss.match_weight:
            return []
        return matched_layers(student, member.config, self.teacher_config())


def prepare(request: Request) -> Ready:
    """Open the data, make the configs, refuse what cannot work."""
    from l4cli.training import data_setup
    from l4cli.training.device import torch_device

    device = torch_device(request.device.value)
    students = list(request.students)
    if (new_teacher := request.new_teacher) is not None:
        students.insert(0, new_teacher)
    teacher_config = None
    if request.teacher is not None and not request.codistill:
        from l4cli.checkpoint import load_config

        teacher_config = load_config(Path(request.teacher))
    shapes = []
    for student in students:
        with in_words_of(student):
            shapes.append(_shape(student, teacher_config))
    cache = None
    if request.teacher_cache is not None:
        takes_hard = any(student.loss.hard_from_teacher for student in request.students)
        cache = open_cache(request.teacher_cache, request.temperature, takes_hard=takes_hard)
    source = data_setup.open_source(
        request.shards,
        seq_len=request.row_tokens,
        batch_size=request.batch_size,
        micro_batch_size=request.micro_batch_size,
        seed=request.seed,
        attention_chunk_size=shapes[-1].text.attention_chunk_size,
        passes_at_once=_passes_at_once(shapes, None if cache else teacher_config, device),
        teacher_cache=cache,
    )
    num_steps = request.length.num_steps(source.num_rows, source.batch_size, source.seq_len)
    teacher = None
    if teacher_config is not None:
        teacher = prepare_teacher(Path(request.teacher or ""), request.dtype.value, source)
    members = []
    for student, shape in zip(students, shapes, strict=True):
        with in_words_of(student):
            member = _member(request, student, shape, source, num_steps, device)
            if student.cut is not None:
                assert teacher is not None
                plan_cut_of(member, teacher)
        members.append(member)
    ready = Ready(members, teacher, cache, source, num_steps, device)
    for member in members:
        ready.matched_layers(member)
    if not request.dry_run:
        _require_all_fit(ready)
    return ready


def _shape(student: Student, teacher: Llama4Config | None) -> Llama4Config:
    """The config before the shards' vocabulary is known."""
    from l4cli.training import model_setup

    if student.preset or student.file or student.checkpoint:
        config = model_setup.base_config(student.preset, student.file, student.checkpoint)
    else:
        assert teacher is not None
        config = shape_from_teacher(student, teacher)
    return model_setup.apply_overrides(config, student.overrides)


def _passes_at_once(
    shapes: Sequence[Llama4Config], teacher: Llama4Config | None, device: torch.device
) -> int:
    models = [*shapes, teacher] if teacher is not None else shapes
    return min(shared.passes_at_once(config, device) for config in models if config is not None)


def _member(
    request: Request,
    student: Student,
    config: Llama4Config,
    source: ShardSource,
    num_steps: int,
    device: torch.device,
) -> Member:
    from l4cli.training import data_setup, model_setup

    recipe = request.recipe_of(student.training)
    init_from = student.checkpoint
    if init_from is not None:
        model_setup.require_same_tokenizer(init_from, source.tokenizer())
    sets_size = model_setup.sets_vocab_size(student.overrides)
    grows = student.preset in model_setup.GROWING_PRESETS and not sets_size
    config = model_setup.fit_vocabulary(config, source.tokenizer(), name=student.name, grows=grows)
    data_setup.require_geometry(config, source.datasets)
    data_setup.require_context(config, source.seq_len)
    if init_from is not None:
        model_setup.require_weights(init_from, config, changed=student.overrides)
    plan = shared.plan_run(
        recipe, config, source, device, name=student.name, must_fit=not request.dry_run
    )
    held_out = None
    if request.eval_data is not None:
        held_out = data_setup.open_held_out(request.eval_data, source, config)
    schedule = request.rate_of(student.training).for_steps(num_steps, config.text.hidden_size)
    prepared = shared.Prepared(source, held_out, config, schedule, plan, device)
    return Member(student, recipe, prepared, init_from)


def _require_all_fit(ready: Ready) -> None:
    """Each fits alone; refuse when all of them together do not."""
    plans = [member.prepared.plan for member in ready.members]
    available = plans[0].available_bytes
    if ready.num_bytes <= available:
        return
    parts = [
        f"`{member.student.name}` {terminal.bytes_text(member.prepared.plan.total_bytes)}"
        for member in ready.members
    ]
    if ready.asked is not None:
        parts.append(f"the teacher {terminal.bytes_text(ready.asked.num_bytes)}")
    raise L4Error(
        "the models of this run do not fit this machine together",
        why=f"they need {', '.join(parts)}, and {terminal.bytes_text(available)} is free",
        fix="train fewer students at once, lower `--micro-batch-size`, or write the teacher's "
        "predictions first with `--write-cache`",
    )


def plan_cut_of(member: Member, teacher: Teacher) -> CutPlan:
    """Which of the teacher's weights a student begins with. raises: UsageError"""
    from l4cli.training.cut_plan import CutOptions, plan_cut

    cut = member.student.cut
    assert cut is not None
    return plan_cut(teacher.config, member.config, CutOptions(cut.layers, cut.experts))
