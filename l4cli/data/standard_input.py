"""Read stdin so that Ctrl-C and SIGTERM are never missed, and a producer is not held up.

in: `sys.stdin`; out: a binary file that reads the same bytes
"""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from typing import Any, BinaryIO, cast

from l4cli.errors import L4Error

_WAKE_S = 0.5
_PIPE_BYTES = 1 << 20


class _Pipe(io.RawIOBase):
    """A pipe that is asked whether it has bytes before it is read.

    Python runs a signal's handler between two instructions. A signal that comes just before the
    system call of a blocking read waits for the read's end, and an idle pipe has none.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def readinto(self, buffer: Any) -> int:
        while not select.select([self._descriptor], [], [], _WAKE_S)[0]:
            pass
        return os.readv(self._descriptor, [buffer])


def standard_input() -> BinaryIO:
    """Give stdin's bytes. raises: L4Error when it is closed"""
    if sys.stdin is None:
        why, fix = "it is closed", "name a file, or pipe something in"
        raise L4Error("cannot read standard input", why=why, fix=fix)
    try:
        descriptor = sys.stdin.fileno()
        is_pipe = not stat.S_ISREG(os.fstat(descriptor).st_mode) and os.name == "posix"
    except (OSError, ValueError):  # something in memory that stands in for stdin
        is_pipe = False
    if not is_pipe:
        return sys.stdin.buffer
    _widen(descriptor)
    return cast(BinaryIO, io.BufferedReader(_Pipe(descriptor), _PIPE_BYTES))


def _widen(descriptor: int) -> None:
    """Ask for a larger pipe, so that the producer goes on while we are busy."""
    try:
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        pass  # no pipe, or a system without this call: it works as it is
