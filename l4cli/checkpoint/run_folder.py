"""A run's folder: one writer at a time, whole checkpoints only, the newest kept.

in: a path and the files of each step; out: `step-000500/` folders and `latest`, a relative symlink
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l4cli import terminal
from l4cli.checkpoint.atomic import replace_symlink, sync_folder, sync_tree
from l4cli.checkpoint.manifest import recorded_hashes, write_manifest
from l4cli.errors import L4Error

LATEST = "latest"
LOCK = ".lock"
_LOCK_TRIES = 5
_STEP = re.compile(r"step-(\d{6,})")
_UNFINISHED = re.compile(r"\.step-\d+\.tmp|\.latest\.tmp-\d+")
_REPLACED = re.compile(r"\.(step-\d+)\.old")


class RunFolder:
    """`with RunFolder(path) as run:` locks it; reading (`latest`, `steps`) needs no lock."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        self.lock()
        return self

    def __exit__(self, *exc: object) -> None:
        self.unlock()

    def lock(self) -> None:
        """Become the only writer, and clear away what a killed one left behind.

        raises: L4Error naming the process that has the folder
        """
        if self.path.exists() and not self.path.is_dir():
            what, why = f"cannot write to `{self.path}`", "it is a file, and a run needs a folder"
            raise L4Error(what, why=why, fix="choose another folder with `-o`")
        link = self.path / LATEST
        if link.exists() and not link.is_symlink():
            why = f"`{link}` is not a link to a checkpoint, and a run needs that name"
            what, fix = f"cannot write to `{self.path}`", "rename it, or choose another folder"
            raise L4Error(what, why=why, fix=fix)
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(descriptor)
        except BlockingIOError as error:
            owner = _number(os.pread(descriptor, 32, 0))
            os.close(descriptor)
            why = f"process {owner or 'unknown'} is writing to it"
            stop = f"stop it with `kill {owner}`, " if owner else ""
            fix = f"wait for it, {stop}or choose another folder with `-o`"
            raise L4Error(f"cannot write to `{self.path}`", why=why, fix=fix) from error
        except OSError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor
        # A forked worker that outlives us must not hold the lock in our name.
        os.register_at_fork(after_in_child=self._forget_lock)
        self._clean()

    def unlock(self) -> None:
        """Let others write; a process that dies does so too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def owner(self) -> int | None:
        """The process that is writing to the folder, if any."""
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _number(os.pread(descriptor, 32, 0))
        finally:
            os.close(descriptor)
        return None

    def _forget_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clean(self) -> None:
        for path in sorted(self.path.iterdir()):
            replaced = _REPLACED.fullmatch(path.name)
            if replaced and not (self.path / replaced[1]).exists():
                path.rename(self.path / replaced[1])  # killed between two renames
            elif replaced or _UNFINISHED.fullmatch(path.name):
                terminal.say(f"removing `{path}`, left by a save that did not finish")
                _remove(path)
        link, newest = self.path / LATEST, self._newest()
        if link.is_symlink() and not link.exists():
            target = os.readlink(link)
            if newest is None:
                link.unlink()
                terminal.warn(f"`{link}` pointed to `{target}`, which is gone; no step is left")
            else:
                replace_symlink(link, newest.name)
                terminal.warn(f"`{link}` pointed to `{target}`, which is gone; now `{newest.name}`")

    def steps(self) -> list[int]:
        """The steps that have a folder, in order; a folder has its name only once it is whole."""
        if not self.path.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.path.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def step_folder(self, step: int) -> Path:
        """Where a step's checkpoint is, or will be."""
        return self.path / f"step-{step:06d}"

    def latest(self) -> Path | None:
        """The checkpoint to go on from: what `latest` names, else the newest step's."""
        link = self.path / LATEST
        if link.is_symlink() and link.is_dir():
            return self.path / os.readlink(link)
        return self._newest()

    def _newest(self) -> Path | None:
        steps = self.steps()
        return self.step_folder(steps[-1]) if steps else None

    @contextmanager
    def writing(self, step: int, keep: int | None = None) -> Iterator[Path]:
        """Give a hidden folder to fill; when the block ends well it becomes the step's.

        Then its manifest is written, everything is on the disk, `latest` names it and all but
        the newest `keep` are removed. When the block fails, nothing of it stays.
        """
        assert self._lock is not None, "a run folder is written under its lock"
        temporary = self.path / f".step-{step:06d}.tmp"
        _remove(temporary)
        try:
            temporary.mkdir()
            yield temporary
            write_manifest(temporary, recorded_hashes(temporary))
            sync_tree(temporary)
            self._put_in_place(temporary, self.step_folder(step))
        except BrokenPipeError:  # of the terminal, not of the disk
            raise
        except OSError as error:
            raise self._save_error(step, error) from error
        finally:
            _remove(temporary)
        replace_symlink(self.path / LATEST, self.step_folder(step).name)
        if keep is not None:
            self.prune(keep)

    def _put_in_place(self, temporary: Path, folder: Path) -> None:
        replaced = self.path / f".{folder.name}.old"
        if folder.exists():  # a step done again, after going back to an earlier one
            _remove(replaced)
            folder.rename(replaced)
        temporary.rename(folder)
        sync_folder(self.path)
        _remove(replaced)

    def _save_error(self, step: int, cause: OSError) -> L4Error:
        free = terminal.bytes_text(shutil.disk_usage(self.path).free)
        last = self.latest()
        kept = f"; `{last}` is whole" if last else ""
        return L4Error(
            f"cannot save step {step} in `{self.path}`",
            why=f"{(cause.strerror or str(cause)).lower()}, {free} free{kept}",
            fix="make room and run the same command again, which continues; "
            "fewer checkpoints stay with `--keep 1`",
        )

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` steps, never the one `latest` names."""
        assert keep >= 1
        last = self.latest()
        for step in self.steps()[:-keep]:
            folder = self.step_folder(step)
            if last is None or folder.name != last.name:
                # Renamed first: half a folder must not look like a checkpoint.
                dying = self.path / f".{folder.name}.tmp"
                folder.rename(dying)
                _remove(dying)


def _flock(descriptor: int) -> None:
    for _ in range(_LOCK_TRIES - 1):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # someone may just be asking who the owner is
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _number(data: bytes) -> int | None:
    text = data.strip()
    return int(text) if text.isdigit() else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
