"""Run a needle test: open, check, read what is not read yet, report.

in: a request; out: the results' folder, events, exit code 1 below `--require`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from l4cli import terminal
from l4cli.checkpoint import RunFolder
from l4cli.commands import needle_nll as nll
from l4cli.commands import needle_report as report
from l4cli.commands.needle_grid import HARD_VARIANTS, SampleMaker, grid_options, jobs_of
from l4cli.commands.needle_options import NLL, Request
from l4cli.data.longcontext.sample import Match, Sample
from l4cli.errors import UsageError
from l4cli.evals.cells import length_text
from l4cli.evals.needle import Job, ResultsStore, Role, Subject, run_grid
from l4cli.evals.needle.cells import collect_cells, outcomes_of
from l4cli.evals.needle.engine_subject import EngineSubject
from l4cli.evals.needle.grid import remaining
from l4cli.evals.needle.store import require_usable
from l4cli.evals.needle.summary import summarize
from l4cli.text import Tokenizer


def run(request: Request) -> None:
    """Everything but the dry run."""
    require_usable(request.out, fresh=request.fresh)
    tested = _open(request)
    tested.check_lengths(request.length_list)
    maker = SampleMaker(request, tested.tokenizer, tested.reserve)
    jobs = jobs_of(request)
    samples = maker.check(jobs)
    if request.layer_major:
        _require_checked(samples)
    documents = None
    if request.wants_nll:
        longest = request.length_list[-1] - 1  # BOS counts as well
        if longest < 1:
            why, fix = "it has BOS alone, and nothing to foretell", "write `--lengths 4k`"
            raise UsageError("cannot measure `nll` on one token", why=why, fix=fix)
        documents = nll.documents_of(request.haystack, longest, tested.tokenizer)
    settings = request.settings() | tested.facts()
    with RunFolder(request.out):
        store = ResultsStore.open(request.out, settings)
        _read(request, tested, maker, jobs, documents, store)
        summary = {
            "model": tested.name,
            "settings": settings,
            **summarize(
                [record for record in store.records if record["role"] != NLL],
                grid_options(request),
                HARD_VARIANTS,
                ruler_threshold=request.threshold,
            ),
            "nll": nll.summarized(store.records),
            "time_s": round(sum(record["time_s"] for record in store.records), 3),
            **tested.report(),
        }
        report.write_summary(request.out, summary)
        report.draw(request.out, summary, tested.name)
        if summary["nll"]:
            nll.draw(request.out, summary["nll"], tested.name)
    report.show(summary)
    if summary["nll"]:
        nll.show(summary["nll"])
    terminal.emit(
        {
            "event": "done",
            "out": str(request.out),
            "effective_length": summary["effective_length"],
            "means_by_task": summary["means_by_task"],
            "nll_falls": {order: found["falls"] for order, found in summary["nll"].items()},
        }
    )
    report.require(summary["means_by_task"], request.require)


class Tested(Protocol):
    """A model whose weights are not loaded, or whose server is not asked, yet."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def reserve(self) -> int: ...
    def facts(self) -> dict[str, Any]: ...
    def check_lengths(self, lengths: tuple[int, ...]) -> None: ...
    def weight(self, length: int) -> float: ...
    def subject(self, longest: int) -> Subject: ...
    def report(self) -> dict[str, Any]: ...


def _open(request: Request) -> Tested:
    if request.endpoint is not None:
        from l4cli.commands.needle_endpoint import TestedEndpoint

        return TestedEndpoint.open(request)
    from l4cli.commands.needle_model import TestedModel

    return TestedModel.of(request)


def _require_checked(samples: Sequence[Sample]) -> None:
    """Nothing can be written after a reading layer by layer. raises: UsageError"""
    for sample in samples:
        if any(question.match is not Match.exact for question in sample.questions):
            raise UsageError(
                f"cannot test `{sample.task}` with `--layer-major`",
                why="its answers are written word by word, and after such a reading no layer holds "
                "what was read",
                fix="leave out the task or `--layer-major`",
            )


def _read(
    request: Request,
    tested: Tested,
    maker: SampleMaker,
    jobs: list[Job],
    documents: list[Any] | None,
    store: ResultsStore,
) -> None:
    """Read what the store lacks; finished groups of cells are told as they come."""
    cells = _CellTeller(jobs, store)
    cells.tell_finished()
    missing = remaining(jobs, store.finished)
    orders = [order for order in nll.ORDERS if nll.key_of(order) not in store.finished]
    if documents is None:
        orders = []
    num_texts = len(jobs) + (0 if documents is None else len(nll.ORDERS))
    if not missing and not orders:
        terminal.say(f"`{request.out}` holds all {num_texts} texts of this test already")
        return
    _describe(request, tested, num_texts, num_texts - len(missing) - len(orders))
    weights = {length: tested.weight(length) for length in request.length_list}
    longest = weights[request.length_list[-1]]
    total = sum(_weight(job, weights) for job in missing) + len(orders) * longest
    subject = tested.subject(request.length_list[-1])
    try:
        with terminal.progress("reading", total) as bar:
            reader = _Reader(subject, bar, weights, cells.after)
            # The server, not this process, does the work: several texts may be under way.
            num_at_once = 1 if request.endpoint is None else request.jobs
            reader.run(missing, maker, store, num_at_once)
            if documents is not None:
                assert isinstance(subject, EngineSubject)
                nll.run(subject, documents, request.seed, store, reader.inside_run)
    except BaseException:
        kept = f"{store.num_kept()} of {num_texts} texts are kept"
        terminal.say(f"{kept}; the same command again reads the rest")
        raise


def _weight(job: Job, weights: dict[int, float]) -> float:
    return 0.0 if job.role is Role.closed_book else weights[job.length]


class _Reader:
    """Runs the grid and says how far it is."""

    def __init__(
        self,
        subject: Subject,
        bar: terminal.Progress,
        weights: dict[int, float],
        after_job: Callable[[Job], None],
    ) -> None:
        self.subject, self.bar, self.weights, self.after_job = subject, bar, weights, after_job
        self.done = 0.0
        self.job: Job | None = None
        if isinstance(subject, EngineSubject):
            subject.on_progress = self.inside

    def run(
        self, jobs: list[Job], maker: SampleMaker, store: ResultsStore, num_at_once: int
    ) -> None:
        run_grid(
            jobs,
            maker,
            self.subject,
            store,
            num_at_once=num_at_once,
            before_job=self.before,
            after_job=self.after,
        )

    def before(self, job: Job) -> None:
        self.job = job
        self.inside(0)

    def inside(self, num_read: int) -> None:
        """Called as tokens are read."""
        assert self.job is not None
        share = min(1.0, num_read / self.job.length) * _weight(self.job, self.weights)
        where = f"{self.job.task} {length_text(self.job.length)}"
        self.bar.update(self.done + share, text=where)

    def inside_run(self, order: str, num_read: int) -> None:
        """Called as tokens of a run for `nll` are read."""
        length, weight = max(self.weights.items())
        self.bar.update(self.done + weight * num_read / length, text=f"nll {order}")
        if num_read + 1 >= length:
            self.done += weight

    def after(self, job: Job) -> None:
        self.done += _weight(job, self.weights)
        self.after_job(job)


class _CellTeller:
    """Tells the cells of a task and length when their last text is read."""

    def __init__(self, jobs: list[Job], store: ResultsStore) -> None:
        self.store = store
        self.groups: dict[tuple[str, int], list[Job]] = {}
        for job in jobs:
            if job.role is Role.test:
                self.groups.setdefault((job.task, job.length), []).append(job)

    def tell_finished(self) -> None:
        """What an earlier run has finished, so that the events are complete."""
        for task, length in self.groups:
            self._tell(task, length)

    def after(self, job: Job) -> None:
        """Called when a text was read."""
        if job.role is Role.test:
            self._tell(job.task, job.length)

    def _tell(self, task: str, length: int) -> None:
        keys = {job.key for job in self.groups[task, length]}
        found: list[dict[str, Any]] = [r for r in self.store.records if r["key"] in keys]
        if len(found) == len(keys):
            report.emit_cells(collect_cells(outcomes_of(found)))


def _describe(request: Request, tested: Tested, num_texts: int, num_kept: int) -> None:
    """Say once what is tested and how."""
    lengths = ", ".join(map(length_text, request.length_list))
    terminal.say(
        f"`{tested.name}` ({tested.kind}): {', '.join(request.settings()['tasks'])} at {lengths} "
        f"tokens, {len(request.depth_list)} depths, {request.samples} texts each"
    )
    already = f", {num_kept} of them kept from before" if num_kept else ""
    terminal.say(f"{num_texts} texts, controls included{already} -> `{request.out}`")
