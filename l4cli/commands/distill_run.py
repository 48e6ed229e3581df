"""Open the data, make every student and its teacher ready, and train them in the one loop.

in: what the command line said; out: a run folder a student, or a plan under `--dry-run`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands import shard_training as shared
from l4cli.commands import training_report as report
from l4cli.commands.distill_students import TEACHER, Student, in_words_of
from l4cli.commands.distill_teacher import (
    Teacher,
    load_teacher,
    matched_layers,
    open_cache,
    prepare_teacher,
    shape_from_teacher,
)
from l4cli.errors import L4Error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from l4cli.checkpoint import RunFolder
    from l4cli.commands.distill_request import Request
    from l4cli.data.loader import ShardSource
    from l4cli.data.teacher_cache import TeacherCache
    from l4cli.model import Llama4Config
    from l4cli.training.cut_plan import CutPlan
    from l4cli.training.hidden_match import HiddenMatch
    from l4cli.training.loop import Loop

COMMAND = "distill"
_STATES_PER_WIDTH = 16  # tokens for each channel: enough to tell directions apart


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


def run(request: Request) -> None:
    """Train, from the beginning or from where the folder's run stands."""
    from l4cli.training.device import make_repeatable
    from l4cli.training.run import Run

    ready = prepare(request)
    try:
        if request.dry_run:
            for member in ready.members:
                report.show_dry_run(
                    member.prepared.plan,
                    ready.source,
                    member.prepared.schedule,
                    member.recipe.dtype,
                    ready.device,
                    name=member.student.name if ready.names else "",
                )
            available = ready.members[0].prepared.plan.available_bytes
            terminal.say(
                f"all models together {terminal.bytes_text(ready.num_bytes)}, "
                f"{terminal.bytes_text(available)} is free"
            )
            return
        make_repeatable(request.seed, ready.device)
        settings = {
            "data_paths": request.shards,
            "eval_data": None if request.eval_data is None else str(request.eval_data),
            **ready.members[0].recipe.settings(),
        }
        training = Run(
            COMMAND,
            request.folder,
            _identity(request, ready),
            settings,
            ready.num_steps,
            ready.device,
            fresh=request.fresh,
            notes={"seq_len": ready.source.seq_len},
            members=ready.names,
        )
        for member in ready.members:
            prepared = member.prepared
            report.describe(member.student.name, prepared.plan, ready.source, prepared.schedule)
        _describe_teacher(request, ready)
        training.train(
            lambda folders: _build_loop(request, ready, folders),
            lambda loop: _start(ready, loop),
        )
    finally:
        ready.source.close()


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
                _plan_cut(member, teacher)
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

    recipe = request.recipe_of(student)
    init_from = student.checkpoint
    if init_from is not None:
        model_setup.require_same_tokenizer(init_from, source.tokenizer())
    sets_size = any(word.split("=")[0].endswith("vocab_size") for word in student.overrides)
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
    schedule = request.rate_of(student).for_steps(num_steps, config.text.hidden_size)
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


def _plan_cut(member: Member, teacher: Teacher) -> CutPlan:
    from l4cli.training.cut_plan import CutOptions, plan_cut

    cut = member.student.cut
    assert cut is not None
    return plan_cut(teacher.config, member.config, CutOptions(cut.layers, cut.experts))


def _identity(request: Request, ready: Ready) -> dict[str, Any]:
    """Everything the weights depend on; of several models each one's own under its name."""
    from l4cli.checkpoint import resolve_checkpoint
    from l4cli.training import continuation

    teacher = None if ready.teacher is None else ready.teacher.fingerprint
    of_all: dict[str, Any] = {
        "teacher": teacher,
        "teacher_cache": None if ready.cache is None else ready.cache.identity,
        "codistill": request.codistill,
    }
    single = not ready.names
    for member in ready.members:
        student = member.student
        own = shared.identity(
            member.recipe, member.prepared, warmup=request.rate_of(student).warmup
        )
        init_from = member.init_from
        own["init_from"] = (
            None if init_from is None else continuation.fingerprint(resolve_checkpoint(init_from))
        )
        own["cut"] = None if student.cut is None else [student.cut.layers, student.cut.experts]
        if student.name != TEACHER:
            loss = student.loss
            share = loss.share
            own |= {
                "loss": loss.loss,
                "alpha": None if share is None else [share.start, share.end],
                "alpha_gap_scale": None if share is None else share.gap_scale,
                "alpha_gap_window": None if share is None else share.window,
                "alpha_follows_lr": None if share is None else share.follows_lr,
                "scaling_factor": loss.factor,
                "temperature": loss.temperature,
                "hard_targets": "teacher" if loss.hard_from_teacher else "data",
                "match_weight": loss.match_weight,
                "match": student.match if loss.match_weight else None,
                "burn_in": loss.burn_in,
            }
        for key in ("data", "seed", "batch_size", "micro_batch_size", "dtype"):
            of_all[key] = own.pop(key)
        of_all |= own if single else {f"{student.name}.{key}": v for key, v in own.items()}
    return of_all


def _describe_teacher(request: Request, ready: Ready) -> None:
    if ready.teacher is not None:
        terminal.say(f"teacher `{ready.teacher.checkpoint}`, {ready.teacher.dtype}")
    if ready.cache is not None:
        terminal.say(f"teacher: cache `{request.teacher_cache}`")
    terminal.say(f"{ready.device.type}; run folder `{request.folder}`")


def _build_loop(request: Request, ready: Ready, folders: Sequence[RunFolder]) -> Loop:
    """Every model with its first weights, and the loop that trains them all."""
    from l4cli.planning import gemm_rate
    from l4cli.training.loop import Loop
    from l4cli.training.objectives.distillation import Distillation

    several = bool(ready.names)
    trainees = [
        shared.new_trainee(
            member.recipe,
            member.prepared,
            folder,
            name=member.student.name if several else "",
            extra=_match_of(request, ready, member),
        )
        for member, folder in zip(ready.members, folders, strict=True)
    ]
    students = [member.student for member in ready.members if member.student.name != TEACHER]
    needs_teacher = any(student.loss.needs_teacher for student in students)
    model = None
    if ready.asked is not None and needs_teacher:
        model = load_teacher(ready.asked, ready.device)
    objective = Distillation(
        [student.loss for student in students],
        model,
        codistills=request.codistill,
        attention_chunk_size=ready.members[-1].config.text.attention_chunk_size,
    )
    plans = [member.prepared.plan for member in ready.members]
    flops = sum(plan.flops_per_token for plan in plans)
    if model is not None and ready.asked is not None:
        flops += ready.asked.flops_per_token
    return Loop(
        trainees,
        ready.source,
        objective,
        shared.loop_options(ready.members[0].recipe, ready.num_steps),
        ready.device,
        passes_at_once=ready.source.passes_at_once,
        evaluations=[
            shared.evaluation(trainee, member.prepared)
            for trainee, member in zip(trainees, ready.members, strict=True)
            if member.prepared.held_out is not None
        ],
        flops_per_token=flops,
        flops_per_tile=sum(plan.flops_per_tile for plan in plans),
        peak_flops=gemm_rate(ready.members[0].recipe.dtype, str(ready.device)),
    )


def _match_of(request: Request, ready: Ready, member: Member) -> HiddenMatch | None:
    """The maps from a student's layers to the teacher's, where they are to be matched."""
    from l4cli.training.hidden_match import HiddenMatch

    if not (pairs := ready.matched_layers(member)):
        return None
    widths = member.config.text.hidden_size, ready.teacher_config().text.hidden_size
    return HiddenMatch(pairs, *widths, seed=request.seed)


def _start(ready: Ready, loop: Loop) -> None:
    """First weights: from a checkpoint, or cut from the teacher."""
    from l4cli.checkpoint import load_weights
    from l4cli.checkpoint.parameters import ParameterReader
    from l4cli.training.student_cut import cut_weights

    moments_DD = _state_moments(ready, loop)
    for member, trainee in zip(ready.members, loop.trainees, strict=True):
        if member.init_from is not None:
            load_weights(trainee.model, member.init_from)
        if member.student.cut is not None:
            assert ready.teacher is not None
            plan = _plan_cut(member, ready.teacher)
            weights = ParameterReader(ready.teacher.checkpoint)
            cut_weights(trainee.model, weights, plan, moments_DD)
            for line in plan.report():
                terminal.say(f"`{member.student.name}`: {line}")


def _state_moments(ready: Ready, loop: Loop) -> Tensor | None:
    """Where the teacher's states lie, for narrower students; None without it in memory."""
    from l4cli.data.loader import eval_batches
    from l4cli.training.objectives.distillation import Distillation
    from l4cli.training.residual_basis import state_moments

    assert isinstance(loop.objective, Distillation)
    model = loop.objective.teacher
    if model is None or ready.teacher is None:
        return None
    width, source = ready.teacher.config.text.hidden_size, ready.source
    cut = [member for member in ready.members if member.student.cut is not None]
    if all(member.config.text.hidden_size == width for member in cut):
        return None
    num_rows = -(-_STATES_PER_WIDTH * width // source.seq_len)
    chunk = ready.teacher.config.text.attention_chunk_size
    batches = eval_batches(source.datasets[0], source.micro_batch_size, chunk, num_rows)
    terminal.say(f"narrowing along the teacher's states in {num_rows} rows of the shards")
    return state_moments(model, batches)
