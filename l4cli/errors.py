"""What went wrong, in words a user can act on.

in: the fact found; out: an exception that the front door prints as `error:`, `why:`, `fix:`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OK = 0
FAILED = 1
USAGE = 2
BUG = 70
INTERRUPTED = 130
CLOSED_PIPE = 141
TERMINATED = 143


class L4Error(Exception):
    """The world's fault: a file, a flag, a machine. Our own faults are assertions."""

    exit_code = FAILED

    def __init__(self, what: str, *, why: str, fix: str, exit_code: int | None = None) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.fix = what, why, fix
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(L4Error):
    """A flag, a preset or a combination that cannot be meant."""

    exit_code = USAGE


class Terminated(BaseException):
    """SIGTERM arrived and everything worth keeping is on disk.

    Not an `Exception`: a handler that skips bad rows must not swallow it.
    """


def suggest(word: str, choices: Iterable[str]) -> str:
    """Say what exists, nearest first: the `fix:` of every unknown name."""
    names = sorted(set(choices))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    if not names:
        return "nothing of this kind exists"
    return "choose from " + ", ".join(f"`{name}`" for name in names)
