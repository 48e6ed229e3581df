"""Train every student, and its teacher where it is in training, in the one loop.

in: what the command line said; out: a run folder a student, or a plan under `--dry-run`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands import shard_training as shared
from l4cli.commands import training_report as report
from l4cli.commands.distill_prepare import Member, Ready, plan_cut_of, prepare
from l4cli.commands.distill_students import TEACHER
from l4cli.commands.distill_teacher import load_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from l4cli.checkpoint import RunFolder
    from l4cli.commands.distill_request import Request
    from l4cli.training.hidden_match import HiddenMatch
    from l4cli.training.loop import Loop

COMMAND = "distill"
_STATES_PER_WIDTH = 16  # tokens for each channel: enough to tell directions apart


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
            member.recipe, member.prepared, warmup=request.rate_of(student.training).warmup
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
            plan = plan_cut_of(member, ready.teacher)
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
