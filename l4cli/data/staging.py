"""A folder that appears whole or not at all.

in: where it shall stand; out: a hidden sibling to write to, synced and renamed at the end

The sibling `.NAME.partial` is guarded by a lock on `.NAME.lock`: a second writer is refused, and
what a killed one left behind is removed by the next, who holds the lock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from l4cli.errors import L4Error


class StagedFolder:
    """Context manager; `path` is the folder to write to until `commit`."""

    def __init__(self, target: str | Path) -> None:
        self.shown = str(target)
        # Through a link we write to where it points; the link itself stays.
        self.target = Path(target).resolve()
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self._lock_path = self.target.with_name(f".{self.target.name}.lock")
        self._lock: int | None = None

    def __enter__(self) -> StagedFolder:
        self._check()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._check()  # another writer may have finished in between
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir()
        except OSError as error:
            self._drop_lock()
            raise self.failed(error) from error
        except L4Error:
            self._drop_lock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._drop_lock()

    def commit(self) -> None:
        """Make everything durable, then give the folder its name."""
        for folder, _, _ in os.walk(self.path):
            _sync(folder)
        # Replaces an empty folder; fails on one that was filled meanwhile.
        os.rename(self.path, self.target)
        _sync(self.target.parent)

    def failed(self, error: OSError) -> L4Error:
        """The same failure in a user's words."""
        return L4Error(
            f"cannot write `{self.shown}`",
            why=(error.strerror or str(error)).lower() + "; nothing was left behind",
            fix="free some space or check the permissions, or write elsewhere with `-o`",
        )

    def _check(self) -> None:
        """Refuse a place that holds something, or that cannot be renamed to."""
        what, other = f"cannot write to `{self.shown}`", "name another folder with `-o`"
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise L4Error(what, why="a file stands there", fix=other)
        try:
            is_empty = not os.listdir(self.target)
        except OSError as error:
            raise self.failed(error) from error
        if not is_empty:
            raise L4Error(what, why="the folder is not empty", fix=f"{other}, or remove it first")
        if os.path.ismount(self.target) or self.target == Path.cwd():
            why = "it is the current folder or a mount point, which nothing can replace"
            raise L4Error(what, why=why, fix="name a new folder in it with `-o`")

    def _take_lock(self) -> None:
        while True:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(lock, 32).decode(errors="replace").strip()
                os.close(lock)
                raise L4Error(
                    f"cannot write to `{self.shown}`",
                    why=f"another process (number {owner or 'unknown'}) is writing it",
                    fix="wait until it is done, or name another folder with `-o`",
                ) from None
            # The owner before us may have removed the file between our open and our lock.
            if _is_same(lock, self._lock_path):
                self._lock = lock  # from here on `_drop_lock` clears it away
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                return
            os.close(lock)

    def _drop_lock(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _sync(folder: str | Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
