"""Read sources into units of work of bounded size: parts of text, rows, pictures, videos.

in: `Source`s of any length, endless ones too; out: `Unit`s in order, enough for one thread each
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from l4cli.data.inputs import HEAD_BYTES, Inputs, Kind, Source, binary_kind
from l4cli.data.standard_input import standard_input
from l4cli.errors import L4Error
from l4cli.terminal import bytes_text

READ_BYTES = 1 << 20
UNIT_BYTES = 1 << 18  # small enough to share among threads, large enough to hand over
UNIT_ROWS = 1024
UNIT_PICTURES = 8
MAX_ROW_BYTES = 64 << 20
# A foreign tokenizer takes a document whole; this much of it is held at most.
MAX_WHOLE_CHARS = 256 << 20

Divide = Callable[[Iterable[str]], Iterator[str]]


class BadInput(L4Error):
    """A document that cannot be used; `reason` groups it in the report of `--skip-bad`."""

    def __init__(self, place: str, reason: str, why: str, fix: str) -> None:
        super().__init__(f"cannot tokenize {place}", why=why, fix=fix)
        self.reason = reason


@dataclass
class Report:
    """What was left out: bad documents by reason, with the first of each."""

    skip_bad: bool = False
    bad: Counter[str] = field(default_factory=Counter)
    first: dict[str, BadInput] = field(default_factory=dict)
    videos: Counter[str] = field(default_factory=Counter)  # how many, their frames, those spread

    def leave_out(self, error: BadInput) -> None:
        """Count a bad document, or stop if bad documents are not to be skipped."""
        if not self.skip_bad:
            raise error
        self.bad[error.reason] += 1
        self.first.setdefault(error.reason, error)


@dataclass(frozen=True)
class TextPart:
    """A piece of a plain-text document; long documents come in several, in order."""

    text: str
    starts: bool = True
    ends: bool = True


@dataclass(frozen=True)
class RawRow:
    """One line of a file of rows, not yet looked into."""

    data: bytes
    place: str  # for errors: file and line
    folder: Path  # paths of pictures are relative to it
    is_json: bool


@dataclass(frozen=True)
class PictureFile:
    """A picture that is a document of its own."""

    path: Path


@dataclass(frozen=True)
class VideoFile:
    """A video that is a document of its own."""

    path: Path


Item = TextPart | RawRow | PictureFile | VideoFile


@dataclass
class Unit:
    """Work for one thread; `num_bytes` were read since the unit before."""

    items: list[Item]
    num_bytes: int


class DocumentReader:
    """Reads all sources in order; `divide` says where a long text may be cut."""

    def __init__(self, inputs: Inputs, divide: Divide, report: Report) -> None:
        self.inputs, self.divide, self.report = inputs, divide, report
        self._num_bytes = 0  # read and not yet in a unit
        self._num_held = 0  # characters gone into `divide` since a piece came out

    def units(self) -> Iterator[Unit]:
        """Group items into units, small documents together."""
        items: list[Item] = []
        weight = 0.0
        for item in self._items():
            items.append(item)
            weight += _weight(item)
            if weight >= 1:
                yield self._unit(items)
                items, weight = [], 0.0
        yield self._unit(items)

    def _unit(self, items: list[Item]) -> Unit:
        unit = Unit(items, self._num_bytes)
        self._num_bytes = 0
        return unit

    def _items(self) -> Iterator[Item]:
        for source in self.inputs.sources():
            try:
                if source.kind in (Kind.picture, Kind.video):
                    assert source.path is not None
                    self._num_bytes += source.size or 0
                    is_picture = source.kind is Kind.picture
                    yield PictureFile(source.path) if is_picture else VideoFile(source.path)
                elif source.kind is Kind.text:
                    yield from self._text(source)
                else:
                    yield from self._rows(source)
            except BadInput as error:
                self.report.leave_out(error)

    def _is_passed_over(self, source: Source, head: bytes) -> bool:
        """A folder may hold anything; of it only text is taken."""
        if source.was_named or binary_kind(head) is None:
            return False
        self.inputs.skipped["binary files"] += 1
        self.inputs.skipped_bytes += source.size or 0
        return True

    def _text(self, source: Source) -> Iterator[TextPart]:
        with _opened(source) as file:
            head = file.read(HEAD_BYTES)
            if self._is_passed_over(source, head):
                return
            # A bad byte far into a file must not leave half a document behind.
            if self.report.skip_bad and source.size is not None and source.size > READ_BYTES:
                num_bytes = self._num_bytes
                for _ in self._decoded(file, source.name, head):
                    pass
                file.seek(0)
                head, self._num_bytes = b"", num_bytes
            yield from self._parts(file, source.name, head)

    def _parts(self, file: BinaryIO, name: str, head: bytes) -> Iterator[TextPart]:
        waiting: str | None = None  # known to be the last piece only when no other follows
        starts = True
        try:
            for piece in self.divide(self._bounded(self._decoded(file, name, head), name)):
                self._num_held = 0
                if waiting is not None:
                    yield TextPart(waiting, starts, ends=False)
                    starts = False
                waiting = piece
        except BadInput as error:
            if starts:
                raise
            # A pipe cannot be checked beforehand: what came before stays, as a whole document.
            self.report.leave_out(error)
        yield TextPart(waiting or "", starts, ends=True)

    def _decoded(self, file: BinaryIO, name: str, head: bytes) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        line, data = 1, head + file.read(READ_BYTES - len(head))
        first = data[:HEAD_BYTES]
        while True:
            self._num_bytes += len(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise _not_utf8(f"`{name}` line {line}", error, first) from error
            if text:
                yield text
            if not data:
                return
            line += data.count(b"\n")
            data = file.read(READ_BYTES)

    def _bounded(self, parts: Iterator[str], name: str) -> Iterator[str]:
        """Stop a tokenizer that must see a document whole from gathering an endless one."""
        self._num_held = 0
        for part in parts:
            self._num_held += len(part)
            if self._num_held > MAX_WHOLE_CHARS:
                why = f"this tokenizer takes a document whole, up to {MAX_WHOLE_CHARS} characters"
                fix = "split the text into documents, or pass `--format lines`"
                raise BadInput(f"`{name}`", "document too long", why, fix)
            yield part

    def _rows(self, source: Source) -> Iterator[RawRow]:
        is_json = source.kind is Kind.jsonl
        folder = source.path.parent if source.path is not None else Path()
        with _opened(source) as file:
            for number, data in enumerate(self._lines(file), start=1):
                if number == 1 and self._is_passed_over(source, data[:HEAD_BYTES]):
                    return
                if len(data) > MAX_ROW_BYTES:
                    why = f"the row is longer than {bytes_text(MAX_ROW_BYTES)}"
                    fix = "pass `--format text` if this is one long document"
                    place = f"`{source.name}` line {number}"
                    self.report.leave_out(BadInput(place, "row too long", why, fix))
                    continue
                if is_json and not data.strip():
                    continue
                yield RawRow(data, f"`{source.name}` line {number}", folder, is_json)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Read line by line; of a line that is too long, just enough to see that it is."""
        while line := file.readline(MAX_ROW_BYTES + 1):
            self._num_bytes += len(line)
            yield line
            is_cut = len(line) > MAX_ROW_BYTES and not line.endswith(b"\n")
            while is_cut and (rest := file.readline(READ_BYTES)):
                self._num_bytes += len(rest)
                is_cut = not rest.endswith(b"\n")


def _weight(item: Item) -> float:
    """How much of a unit an item fills."""
    if isinstance(item, TextPart):
        return len(item.text) / UNIT_BYTES + 1 / UNIT_ROWS
    if isinstance(item, PictureFile):
        return 1 / UNIT_PICTURES
    if isinstance(item, VideoFile):
        return 1
    # A glance, not a parse: the threads do that.
    pictures = item.data.count(b'"image') if item.is_json else 0
    videos = item.data.count(b'"video') if item.is_json else 0
    return len(item.data) / UNIT_BYTES + 1 / UNIT_ROWS + pictures / UNIT_PICTURES + videos


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    if source.path is None:
        yield standard_input()
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(source.path, "rb"))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            fix = "check its permissions, or leave it out"
            raise BadInput(f"`{source.name}`", "unreadable file", why, fix) from error
        yield file


def _not_utf8(place: str, error: UnicodeDecodeError, head: bytes) -> BadInput:
    known = binary_kind(head)
    if known is not None:
        what, fix = known
        return BadInput(place, "invalid UTF-8", f"it is {what}, not UTF-8 text", fix)
    bad = error.object[error.start : error.start + 1].hex().upper()
    why = f"byte 0x{bad} is not valid UTF-8 there"
    fix = "convert the text to UTF-8 (`iconv -f LATIN1 -t UTF-8`), or pass `--skip-bad`"
    return BadInput(place, "invalid UTF-8", why, fix)
