"""Run a needle test in films and pictures, or say what one would take.

in: a request with frames or hours; out: the results' folder and events as of texts, lengths being
numbers of frames; exit code 1 below `--require`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from l4cli import terminal
from l4cli.checkpoint import RunFolder
from l4cli.commands import needle_report as report
from l4cli.commands.chat_model import geometry_of
from l4cli.commands.needle_frames import Axis, axis_of, tasks_of
from l4cli.commands.needle_model import TestedModel
from l4cli.commands.needle_options import Request
from l4cli.data.geometry import PictureGeometry
from l4cli.data.longcontext.video import ShownSample, make_video_sample
from l4cli.errors import L4Error
from l4cli.evals.heatmap import Style, draw_heatmap
from l4cli.evals.needle import GridOptions, Job, ResultsStore, Role, plan_jobs, run_grid
from l4cli.evals.needle.cells import collect_cells, outcomes_of
from l4cli.evals.needle.grid import remaining
from l4cli.evals.needle.shown_subject import ShownSubject
from l4cli.evals.needle.store import require_usable
from l4cli.evals.needle.summary import summarize
from l4cli.text import image_block


def run(request: Request) -> None:
    """The test, or with `--dry-run` its plan."""
    if request.dry_run:
        from l4cli.commands import needle_video_plan

        return needle_video_plan.show(request)
    require_usable(request.out, fresh=request.fresh)
    axis, tested = axis_of(request), TestedModel.of(request)
    geometry = _geometry(tested)
    jobs = jobs_of(request)
    _check_memory(tested, geometry, axis)
    settings = _settings(request, axis) | tested.facts()
    with RunFolder(request.out):
        store = ResultsStore.open(request.out, settings)
        _read(request, tested, geometry, jobs, store)
        summary = _summary(request, tested, geometry, settings, store)
        report.write_summary(request.out, summary)
        _draw(request, axis, summary)
    report.show(summary)
    terminal.result(
        f"lengths are frames at {axis.fps:g} a second; each is {summary['tokens_per_frame']} tokens"
    )
    means = summary["means_by_task"]
    terminal.emit(
        {
            "event": "done",
            "out": str(request.out),
            "unit": "frames",
            "effective_length": summary["effective_length"],
            "means_by_task": means,
        }
    )
    report.require(means, request.require)


def jobs_of(request: Request) -> list[Job]:
    """Every film and album to read; a film has one needle, an album is asked for all depths."""
    jobs: list[Job] = []
    for task in tasks_of(request):
        options = _grid_options(request, (task,), is_separate=task != "pictures")
        jobs += plan_jobs(options, lambda _: True, {})
    return jobs


def _grid_options(request: Request, tasks: tuple[str, ...], *, is_separate: bool) -> GridOptions:
    return GridOptions(
        tasks=tasks,
        lengths=axis_of(request).num_frames,
        depths=request.depth_list,
        num_samples=request.samples,
        seed=request.seed,
        is_separate=is_separate or request.separate,
        has_controls=request.controls,
    )


def _settings(request: Request, axis: Axis) -> dict[str, Any]:
    names = ("samples", "seed", "controls", "question")
    return {
        "tasks": list(tasks_of(request)),
        "frames": list(axis.num_frames),
        "hours": None if axis.hours is None else list(axis.hours),
        "fps": axis.fps,
        "depths": list(request.depth_list),
        **{name: getattr(request, name) for name in names},
        "separate": request.separate,
        "chat": request.chat,
        "dtype": request.dtype.value,
        "kv_dtype": request.kv_dtype.value,
        "sparse_topk": request.sparse_topk,
        "set": request.set_,
    }


def _geometry(tested: TestedModel) -> PictureGeometry:
    geometry = geometry_of(tested.folder, tested.tokenizer, tested.config)
    if geometry is None:
        why = "it has no picture encoder, or its tokenizer no tokens for pictures"
        fix = "name a checkpoint with vision, or test texts with `--lengths`"
        raise L4Error(f"`{tested.folder}` sees no frames", why=why, fix=fix)
    return geometry


def _check_memory(tested: TestedModel, geometry: PictureGeometry, axis: Axis) -> None:
    """Refuse films that do not fit, before anything is loaded."""
    per_frame = len(image_block(tested.tokenizer, 1, 1, geometry.tokens_per_tile))
    try:
        tested.check_lengths(tuple(num * per_frame for num in axis.num_frames))
    except L4Error as error:
        fix = "ask for fewer with `--frames` or `--hours`, or keep less: `--kv-dtype int4`"
        raise L4Error(error.what, why=error.why, fix=fix) from None


class _Maker:
    """The sample of a job."""

    def __init__(self, request: Request, geometry: PictureGeometry) -> None:
        self.request, self.geometry = request, geometry

    def __call__(self, job: Job) -> ShownSample:
        return make_video_sample(
            job.task,
            num_frames=job.length,
            depths=job.depths,
            fps=self.request.fps,
            side=self.geometry.image_size,
            rng=np.random.default_rng(job.seed(self.request.seed)),
            question=self.request.question,
        )


def _read(
    request: Request,
    tested: TestedModel,
    geometry: PictureGeometry,
    jobs: list[Job],
    store: ResultsStore,
) -> None:
    """Read what the store lacks; cells are told when their last film is read."""
    cells = _CellTeller(jobs, store)
    for job in jobs:
        cells.after(job)
    missing = remaining(jobs, store.finished)
    if not missing:
        return terminal.say(f"`{request.out}` holds all {len(jobs)} films of this test already")
    already = f", {len(jobs) - len(missing)} of them kept from before" * (len(missing) < len(jobs))
    terminal.say(f"`{tested.name}` ({tested.kind}): {', '.join(tasks_of(request))}")
    terminal.say(f"{len(jobs)} films, controls included{already} -> `{request.out}`")
    subject = ShownSubject(tested.load(), tested.tokenizer, geometry, is_chat=request.chat)
    total = sum(job.length for job in missing if job.role is not Role.closed_book)
    done = 0
    try:
        with terminal.progress("reading", total) as bar:

            def before(job: Job) -> None:
                subject.on_progress = lambda num_read: bar.update(
                    done + min(num_read // len(subject.block), job.length),
                    film=f"{job.task} {axis_of(request).text(job.length)}",
                )

            def after(job: Job) -> None:
                nonlocal done
                done += 0 if job.role is Role.closed_book else job.length
                cells.after(job)

            maker = _Maker(request, geometry)
            run_grid(missing, maker, subject, store, before_job=before, after_job=after)
    except BaseException:
        kept = f"{store.num_kept()} of {len(jobs)} films are kept"
        terminal.say(f"{kept}; the same command again reads the rest")
        raise


class _CellTeller:
    """Tells the cells of a task and length once, when nothing of them is missing."""

    def __init__(self, jobs: list[Job], store: ResultsStore) -> None:
        self.store = store
        self.groups: dict[tuple[str, int], set[str]] = {}
        for job in jobs:
            if job.role is Role.test:
                self.groups.setdefault((job.task, job.length), set()).add(job.key)

    def after(self, job: Job) -> None:
        """Called when a film was read."""
        keys = self.groups.get((job.task, job.length), set())
        if keys and keys <= self.store.finished:
            del self.groups[job.task, job.length]
            records = [record for record in self.store.records if record["key"] in keys]
            report.emit_cells(collect_cells(outcomes_of(records)))


def _summary(
    request: Request,
    tested: TestedModel,
    geometry: PictureGeometry,
    settings: Mapping[str, Any],
    store: ResultsStore,
) -> dict[str, Any]:
    options = _grid_options(request, tasks_of(request), is_separate=True)
    return {
        "model": tested.name,
        "settings": dict(settings),
        "unit": "frames",  # of every length
        "tokens_per_frame": len(image_block(tested.tokenizer, 1, 1, geometry.tokens_per_tile)),
        **summarize(store.records, options, {}, ruler_threshold=request.threshold),
        "time_s": round(sum(record["time_s"] for record in store.records), 3),
        **tested.report(),
    }


def _draw(request: Request, axis: Axis, summary: Mapping[str, Any]) -> None:
    settings = summary["settings"]
    hours = "" if axis.hours is None else f" ({', '.join(f'{h:g}' for h in axis.hours)} h)"
    caption = (
        f"Model: {summary['model']} (weights {settings['weights']}, {settings['dtype']}). "
        f"Films of moving shapes, sampled at {axis.fps:g} frames a second{hours}, "
        f"{summary['tokens_per_frame']} tokens a frame. {settings['samples']} films of each "
        f"length and depth, seed {settings['seed']}"
        f"{', chat format' if settings['chat'] else ''}. Intervals: 95% Wilson."
    )
    is_films = any(task != "pictures" for task in settings["tasks"])
    axis_title = "length of the film (frames)" if is_films else "pictures"
    draw_heatmap(
        report.task_grids(summary),
        request.out / report.HEATMAP,
        title=f"Needle test of {summary['model']}",
        caption=caption,
        style=Style(x_title=axis_title),
    )
