"""The gate after a stage: a small needle grid at the stage's length and twice it.

in: a checkpoint, a format of needles; out: a line in `OUT/gates.jsonl`; exit 1 below the gate
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands.extend_data import key_of
from l4cli.commands.extend_synthetic import Needles
from l4cli.errors import L4Error, UsageError
from l4cli.training.stages import Stage

if TYPE_CHECKING:
    from l4cli.data.longcontext.sample import Sample
    from l4cli.evals.needle.grid import Job
    from l4cli.inference import Engine
    from l4cli.text import Tokenizer

FILE, FOLDER = "gates.jsonl", "gates"
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
NUM_SAMPLES = 4  # texts of each length, asked at every depth
TASK = "single"
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Gate:
    """What a stage has to reach: a share of right answers at each length."""

    required: float
    needles: Needles
    seed: int

    def try_out(self, stages: Sequence[Stage], tokenizer: Tokenizer) -> None:
        """Make one text a stage: a length without room for needles shows before any training."""
        for stage in stages:
            try:
                self._maker(tokenizer)(self._jobs((stage.seq_len,))[0])
            except UsageError as error:
                raise UsageError(
                    f"`--gate` cannot test stage {stage.number}: {error.what}",
                    why=error.why,
                    fix=f"leave `--gate` out, or take a longer stage: {len(DEPTHS)} needles have "
                    "to fit",
                ) from error

    def _jobs(self, lengths: Sequence[int]) -> list[Job]:
        from l4cli.evals.needle.grid import GridOptions, plan_jobs

        options = GridOptions(
            (TASK,), tuple(lengths), DEPTHS, NUM_SAMPLES, self.seed, has_controls=False
        )
        return plan_jobs(options, lambda task: True, {})

    def _maker(self, tokenizer: Tokenizer) -> Callable[[Job], Sample]:
        """How a text of the grid is made."""
        import numpy as np

        from l4cli.data.longcontext.tasks import make
        from l4cli.evals.needle.engine_subject import Frame

        frame = Frame.of(tokenizer, is_chat=False)
        haystack = self.needles.open_haystack(self.seed)
        fmt = self.needles.format()

        def sample_of(job: Job) -> Sample:
            return make(
                job.task,
                length=job.length,
                depths=job.depths,
                tokenizer=tokenizer,
                haystack=haystack,
                rng=np.random.default_rng(job.seed(self.seed)),
                fmt=fmt,
                reserve=frame.num_tokens,
                repeat_keys=True,
            )

        return sample_of

    def check(self, out: Path, stage: Stage, checkpoint: Path, device: str) -> None:
        """Test the stage, unless that is done, and write down what came of it.

        raises: L4Error with the numbers when a length is below the gate
        """
        lengths = (stage.seq_len, 2 * stage.seq_len)
        records = self._read(out, stage, checkpoint, lengths, device)
        found = _by_length(records)
        passed = all(figures["score"] >= self.required for figures in found.values())
        event = {
            "event": "gate",
            "stage": stage.number,
            "seq_len": stage.seq_len,
            "checkpoint": str(checkpoint.relative_to(out)),
            "required": self.required,
            "passed": passed,
            "lengths": found,
        }
        _keep(out / FILE, event)
        terminal.emit(event)
        shown = ", ".join(_shown(length, figures) for length, figures in found.items())
        if passed:
            terminal.say(f"stage {stage.number} passes the gate of {self.required:g}: {shown}")
            return
        raise L4Error(
            f"stage {stage.number} does not pass the gate of {self.required:g}",
            why=f"needles found: {shown}",
            fix=f"`{checkpoint}` is kept; train with more tokens, more `--synthetic-fraction` or a "
            "higher `--lr` in another folder, or go on with a lower `--gate`",
        )

    def _read(
        self, out: Path, stage: Stage, checkpoint: Path, lengths: Sequence[int], device: str
    ) -> list[dict[str, Any]]:
        """The answers of the grid; those on disk are not asked again."""
        from l4cli.evals.needle.engine_subject import EngineSubject
        from l4cli.evals.needle.grid import remaining, run_grid
        from l4cli.evals.needle.store import ResultsStore
        from l4cli.text import load_tokenizer
        from l4cli.training.continuation import fingerprint

        jobs = self._jobs(lengths)
        settings = {
            "weights": fingerprint(checkpoint),
            "needles": asdict(self.needles),
            "seed": self.seed,
            "lengths": list(lengths),
        }
        store = ResultsStore.open(
            out / FOLDER / f"{stage.name}-{key_of(settings=settings)}", settings
        )
        missing = remaining(jobs, store.finished)
        if not missing:
            return store.records
        terminal.say(f"gate of stage {stage.number}: {len(missing)} texts of {lengths} tokens")
        tokenizer = load_tokenizer(checkpoint)
        sample_of = self._maker(tokenizer)
        subject = EngineSubject(_engine(checkpoint, tokenizer, device), tokenizer)
        with terminal.progress("gate", len(jobs)) as bar:
            run_grid(
                missing,
                sample_of,
                subject,
                store,
                after_job=lambda job: bar.update(len(store.records)),
            )
        return store.records


def _engine(checkpoint: Path, tokenizer: Tokenizer, device: str) -> Engine:
    """The stage's model, ready for texts beyond what it claims to read."""
    from l4cli.checkpoint import load_model
    from l4cli.inference import Engine
    from l4cli.training.device import torch_device

    model = load_model(checkpoint, device=torch_device(device))
    return Engine(model, num_token_ids=tokenizer.vocab_size, max_context=_NO_LIMIT)


def _by_length(records: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    from l4cli.evals.needle.cells import outcomes_of
    from l4cli.evals.needle.summary import figures, grouped

    by_length = grouped(outcomes_of(records), lambda outcome: outcome.length)
    return {length: figures(group) for length, group in sorted(by_length.items())}


def _shown(length: int, figures: dict[str, Any]) -> str:
    return (
        f"{figures['num_correct']} of {figures['num_samples']} at {length} tokens "
        f"({figures['low']:.0%} to {figures['high']:.0%})"
    )


def _keep(file: Path, event: dict[str, Any]) -> None:
    """Append a line, once: the same result again is nothing new."""
    line = json.dumps(event)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if line not in lines:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(line + "\n")
