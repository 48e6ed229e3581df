"""A run in its folder: begin, continue, or say that it is finished. The same for every command.

in: a folder, the options that make the run, how to build its loop; out: the newest checkpoints
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from l4cli import terminal
from l4cli.checkpoint import RunFolder, read_state_json
from l4cli.errors import UsageError
from l4cli.training import run_record
from l4cli.training.loop import Loop

Build = Callable[[Sequence[RunFolder]], Loop]


@dataclass(frozen=True)
class Run:
    """What is the same from the first call of a command to the one that finishes it.

    One model is trained in the folder itself, several in a folder of their own below it.
    """

    command: str
    folder: Path
    options: Mapping[str, Any]  # everything the weights depend on; other values are another run
    settings: Mapping[str, Any]  # the rest: for `run.toml` only
    num_steps: int
    device: torch.device
    fresh: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)  # saved too, never compared
    members: Sequence[str] = ()  # names of the folders of several models

    def identity(self) -> dict[str, Any]:
        """What stands in every checkpoint, to be compared when the run continues."""
        return {
            "options": {"command": self.command, **self.options},
            "num_steps": self.num_steps,
            "environment": run_record.environment(self.device),
            "notes": dict(self.notes),
        }

    def train(self, build: Build, start: Callable[[Loop], None]) -> list[Path]:
        """Train as `go_on` does, and say where the results are."""
        checkpoints = self.go_on(build, start)
        for checkpoint in checkpoints:
            report_done(checkpoint)
        return checkpoints

    def go_on(self, build: Build, start: Callable[[Loop], None]) -> list[Path]:
        """Lock the folders, then go on from the newest step or call `start` on a new loop.

        raises: UsageError when the folder holds something else or a run with other options
        """
        run_record.require_usable(self.folder, fresh=self.fresh)
        self._require_same_members()
        with ExitStack() as locks:
            folders = [locks.enter_context(folder) for folder in self._folders()]
            newest = self._newest(folders)
            if newest and self._is_finished(newest[0]):
                names = ", ".join(f"`{path}`" for path in newest)
                has = "has" if len(newest) == 1 else "have"
                terminal.say(f"finished: {names} {has} all {self.num_steps} steps")
                return newest
            identity = self.identity()
            options = {**self.options, "num_steps": self.num_steps, **self.settings}
            for path in dict.fromkeys([self.folder, *(folder.path for folder in folders)]):
                run_record.write_record(path, self.command, options, identity["environment"])
            loop = build(folders)
            loop.identity = identity
            if newest:
                loop.resume(newest)
                terminal.say("continuing from " + ", ".join(f"`{path}`" for path in newest))
                self._tell_schedule(loop)
            else:
                start(loop)
            return loop.run()

    def finished(self) -> bool | None:
        """Whether the folder's run has all its steps; None without a run in it.

        raises: UsageError when the folder holds a run with other options
        """
        newest = self._newest(self._folders())
        return self._is_finished(newest[0]) if newest else None

    def _folders(self) -> list[RunFolder]:
        return [RunFolder(self.folder / name) for name in self.members or ("",)]

    def _require_same_members(self) -> None:
        """Refuse a folder in which a run of other models was begun."""
        begun = sorted(path.parent.name for path in self.folder.glob(f"*/{run_record.FILE}"))
        has_own_steps = bool(RunFolder(self.folder).steps())
        if self.members and has_own_steps:
            begun = []
        # One model's folder may have others' runs below it; its own steps tell that it is one.
        elif not begun or begun == sorted(self.members) or has_own_steps:
            return
        raise UsageError(
            f"`{self.folder}` holds a run of other models",
            why="it trains " + (", ".join(f"`{name}`" for name in begun) or "one model"),
            fix="choose another folder with `-o`, or give the same models to continue it",
        )

    def _newest(self, folders: Sequence[RunFolder]) -> list[Path]:
        """The checkpoints to go on from: of several models those of the newest common step."""
        if len(folders) == 1:
            newest = folders[0].latest()
            return [] if newest is None else [newest]
        common = set.intersection(*(set(folder.steps()) for folder in folders))
        return [folder.step_folder(max(common)) for folder in folders] if common else []

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
