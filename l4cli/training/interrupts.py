"""Ctrl-C and SIGTERM in a training run: finish the step, save, leave; the second one at once.

in: signals; out: a flag between steps, an exception for the front door at the end
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from l4cli import terminal
from l4cli.errors import Terminated


class EvaluationCut(Exception):
    """An evaluation was stopped by a signal; it is done again when the run continues."""


class Interrupts:
    """Which signal asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note the first signal instead of dying of it; one that is ignored stays ignored."""
        both = (signal.SIGINT, signal.SIGTERM)
        signals = [number for number in both if signal.getsignal(number) != signal.SIG_IGN]
        previous = [signal.signal(number, self._note) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, previous, strict=True):
                signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(signum, signal.SIG_DFL)  # a third one does not even unwind
            raise self.as_exception()
        self.signal = signal.Signals(signum)
        again = "Ctrl-C again" if self.signal is signal.SIGINT else "a second signal"
        terminal.say(f"stopping after this step and a checkpoint; {again} stops at once")

    def cut_evaluation(self) -> None:
        """Called between the batches of an evaluation. raises: EvaluationCut"""
        if self.signal is not None:
            raise EvaluationCut

    def as_exception(self) -> BaseException:
        """What tells the front door how the run ended: exit code 130 or 143."""
        return Terminated() if self.signal is signal.SIGTERM else KeyboardInterrupt()
