"""Find what to tokenize: files, folders, patterns and stdin, in a fixed order.

in: the words on the command line; out: `Source`s, found as they are needed
"""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from l4cli.errors import L4Error

STDIN = "-"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
# Not `.ts`: that is TypeScript more often than a recording.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif")
ROW_SUFFIXES = (".jsonl", ".ndjson")
HEAD_BYTES = 8192  # a zero byte among the first ones marks a binary file, as in grep and git


class InputFormat(StrEnum):
    """How a file is cut into documents; without one, the file's name decides."""

    text = "text"
    lines = "lines"
    jsonl = "jsonl"


class Kind(StrEnum):
    """What a source holds."""

    text = "text"
    lines = "lines"
    jsonl = "jsonl"
    picture = "picture"
    video = "video"


@dataclass(frozen=True)
class Source:
    """One thing to read; `path` None is stdin, `size` None is unknown."""

    name: str
    path: Path | None
    kind: Kind
    size: int | None
    was_named: bool  # on the command line; what a folder holds is taken only if it is text


@dataclass
class Inputs:
    """What was asked for, and what was passed over while walking through it."""

    names: Sequence[str]
    format: InputFormat | None = None
    stdin_is_rows: bool = False
    exclude: Collection[tuple[int, int]] = ()  # device and inode of our own output
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_bytes: int = 0

    def total_bytes(self) -> int | None:
        """Add up the sizes; None where one cannot be known. Finds missing inputs on the way."""
        sizes = [source.size for source in self._walk(Counter())]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def sources(self) -> Iterator[Source]:
        """Walk through the inputs in order, counting what is passed over."""
        self.skipped.clear()
        return self._walk(self.skipped)

    def _walk(self, skipped: Counter[str]) -> Iterator[Source]:
        for name in self.names:
            if name == STDIN:
                kind = Kind.jsonl if self.stdin_is_rows else Kind.text
                yield Source("stdin", None, Kind(self.format) if self.format else kind, None, True)
                continue
            for path in _matches(name):
                if path.is_dir():
                    yield from self._folder(path, skipped)
                elif str(path) == name or not self._is_own_output(_status(path)):
                    yield self._file(path, was_named=True)

    def _folder(self, folder: Path, skipped: Counter[str]) -> Iterator[Source]:
        for parent, subfolders, names in os.walk(folder, onerror=_refuse_folder):
            linked = [name for name in subfolders if os.path.islink(os.path.join(parent, name))]
            skipped["linked folders"] += len(linked)  # they could lead back here
            hidden = [name for name in subfolders if name.startswith(".")]
            skipped["hidden folders"] += len(hidden)
            subfolders[:] = sorted(set(subfolders) - set(hidden) - set(linked))
            for name in sorted(names):
                path = Path(parent, name)
                reason = self._reason_to_skip(path)
                if reason is None:
                    yield self._file(path, was_named=False)
                elif reason:
                    skipped[reason] += 1

    def _reason_to_skip(self, path: Path) -> str | None:
        """Say why a file of a folder is passed over; "" for our own output."""
        if path.name.startswith("."):
            return "hidden files"
        if path.suffix.lower() in PICTURE_SUFFIXES:
            return "pictures (name them, or a pattern of them, to take them)"
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return "videos (name them, or a pattern of them, to take them)"
        status = _status(path)
        if status is None:
            return None
        if not stat.S_ISREG(status.st_mode):
            return "special files"
        return "" if self._is_own_output(status) else None

    def _is_own_output(self, status: os.stat_result | None) -> bool:
        return status is not None and (status.st_dev, status.st_ino) in self.exclude

    def _file(self, path: Path, was_named: bool) -> Source:
        suffix = path.suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            kind = Kind.picture
        elif suffix in VIDEO_SUFFIXES:
            kind = Kind.video
        elif self.format is not None:
            kind = Kind(self.format)
        else:
            kind = Kind.jsonl if suffix in ROW_SUFFIXES else Kind.text
        status = _status(path)
        size: int | None = 0
        if status is not None:
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
        return Source(str(path), path, kind, size, was_named)


def _status(path: Path) -> os.stat_result | None:
    """Look at a file; None if that fails, and reading it will say what is wrong."""
    try:
        return path.stat()
    except OSError:
        return None


def _matches(name: str) -> list[Path]:
    if os.path.lexists(name):  # a name as it is goes first, brackets and all
        return [Path(name)]
    if glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
        if found:
            return [Path(match) for match in found]
        why = "nothing matches the pattern"
    else:
        why = "there is no such file or folder"
    fix = "check the path; `-` reads stdin"
    raise L4Error(f"cannot find `{name}`", why=why, fix=fix)


def _refuse_folder(error: OSError) -> None:
    fix = "check its permissions, or name only the files to take"
    why = (error.strerror or str(error)).lower()
    raise L4Error(f"cannot list the folder `{error.filename}`", why=why, fix=fix) from error


_BINARY_BEGINNINGS = (
    (b"\x1f\x8b", "a gzip archive", "unpack it: `zcat FILE | l4 tokenize`"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it: `zstdcat FILE | l4 tokenize`"),
    (b"\xfd7zXZ", "an xz archive", "unpack it: `xzcat FILE | l4 tokenize`"),
    (b"BZh", "a bzip2 archive", "unpack it: `bzcat FILE | l4 tokenize`"),
    (b"PK\x03\x04", "a zip archive or an office document", "unpack or export it as text"),
    (b"%PDF", "a PDF", "convert it: `pdftotext FILE - | l4 tokenize`"),
    (b"\xff\xfe", "UTF-16 text", "convert it: `iconv -f UTF-16 -t UTF-8 FILE | l4 tokenize`"),
    (b"\xfe\xff", "UTF-16 text", "convert it: `iconv -f UTF-16 -t UTF-8 FILE | l4 tokenize`"),
    (b"\x89PNG", "a PNG picture", "give it a name that ends in `.png`"),
    (b"\xff\xd8\xff", "a JPEG picture", "give it a name that ends in `.jpg`"),
    (b"\x7fELF", "a program", "leave it out"),
)


def binary_kind(head: bytes) -> tuple[str, str] | None:
    """Recognise what is no UTF-8 text from its first bytes: what it is, what to do with it."""
    for beginning, what, fix in _BINARY_BEGINNINGS:
        if head.startswith(beginning):
            return what, fix
    if b"\0" in head:
        return "a binary file", "leave it out"
    return None
