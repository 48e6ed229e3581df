"""A run in its folder: begin, continue, or say that it is finished. The same for every command.

in: a folder, the options that make the run, how to build its loop; out: the newest checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from l4cli import terminal
from l4cli.checkpoint import RunFolder, read_state_json
from l4cli.training import run_record
from l4cli.training.loop import Loop


@dataclass(frozen=True)
class Run:
    """What is the same from the first call of a command to the one that finishes it."""

    command: str
    folder: Path
    options: Mapping[str, Any]  # everything the weights depend on; other values are another run
    settings: Mapping[str, Any]  # the rest: for `run.toml` only
    num_steps: int
    device: torch.device
    fresh: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)  # saved too, never compared

    def identity(self) -> dict[str, Any]:
        """What stands in every checkpoint, to be compared when the run continues."""
        return {
            "options": {"command": self.command, **self.options},
            "num_steps": self.num_steps,
            "environment": run_record.environment(self.device),
            "notes": dict(self.notes),
        }

    def train(self, build: Callable[[RunFolder], Loop], start: Callable[[Loop], None]) -> Path:
        """Train as `go_on` does, and say where the result is."""
        checkpoint = self.go_on(build, start)
        report_done(checkpoint)
        return checkpoint

    def go_on(self, build: Callable[[RunFolder], Loop], start: Callable[[Loop], None]) -> Path:
        """Lock the folder, then go on from its newest checkpoint or call `start` on a new loop.

        raises: UsageError when the folder holds something else or a run with other options
        """
        run_record.require_usable(self.folder, fresh=self.fresh)
        with RunFolder(self.folder) as folder:
            newest = folder.latest()
            if newest is not None and self._is_finished(newest):
                terminal.say(f"finished: `{newest}` has all {self.num_steps} steps")
                return newest
            identity = self.identity()
            options = {**self.options, "num_steps": self.num_steps, **self.settings}
            run_record.write_record(self.folder, self.command, options, identity["environment"])
            loop = build(folder)
            loop.identity = identity
            if newest is None:
                start(loop)
            else:
                loop.resume([newest])
                terminal.say(f"continuing from `{newest}`")
                self._tell_schedule(loop)
            return loop.run()

    def finished(self) -> bool | None:
        """Whether the folder's run has all its steps; None without a run in it.

        raises: UsageError when the folder holds a run with other options
        """
        newest = RunFolder(self.folder).latest()
        return None if newest is None else self._is_finished(newest)

    def _is_finished(self, newest: Path) -> bool:
        identity = self.identity()
        done = run_record.require_same_run(
            newest, identity["options"], self.num_steps, identity["environment"]
        )
        return done >= self.num_steps and not read_state_json(newest)["owes_evaluation"]

    def _tell_schedule(self, loop: Loop) -> None:
        """More steps move the decay; say so when the run had already begun it."""
        for trainee in loop.trainees:
            planned = loop.resumed_num_steps
            if planned is None or planned >= self.num_steps or loop.step == 0:
                continue
            before = trainee.schedule.with_steps(planned).lr(loop.step - 1)
            after = trainee.schedule.lr(loop.step)
            if after > before:
                terminal.warn(
                    f"the learning rate goes back up from {before:.1e} to {after:.1e}: the run "
                    f"was planned for {planned} steps and had begun its decay"
                )


def report_done(checkpoint: Path) -> None:
    """Say which checkpoint a command ends with, to people and to programs."""
    terminal.emit({"event": "done", "checkpoint": str(checkpoint)})
    terminal.result(str(checkpoint))
