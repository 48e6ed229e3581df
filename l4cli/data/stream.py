"""The token stream: safetensors frames one after the other, through pipes, files and `cat`.

in: `Frame`s; out: bytes whose last frame says the end, and the same frames again, checked
source: the safetensors format (8 bytes of header length, JSON header, data); DESIGN.md section 2

The metadata of every frame says format, version, fingerprint, vocab_size and geometry. The first
one also carries the tensor `tokenizer`, the tokenizer's folder as a JSON object of file name to
text. A document too long for one frame goes on in the next: `open` says that the last document
of this frame is not finished. The last frame has no document; its `end` has the totals.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import BinaryIO, NoReturn, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from l4cli.data.frame import Frame as Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.errors import L4Error

FORMAT = "l4-tokens"
VERSION = 1
# A writer closes a frame that reaches either; one document with more media may exceed them.
FRAME_TOKENS = 1 << 20
FRAME_MEDIA_BYTES = 32 << 20
MAX_HEADER_BYTES = 64 << 20
MAX_FRAME_BYTES = 2 << 30
_READ_BYTES = 16 << 20  # so that a lying header cannot make us allocate what is not there


class StreamTokenizer(Protocol):
    """What a stream needs to know of a tokenizer."""

    vocab_size: int
    fingerprint: str

    def files(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class StreamHeader:
    """What all frames of a stream share; streams that differ in it cannot be joined."""

    tokenizer_files: dict[str, str]
    fingerprint: str
    vocab_size: int
    geometry: PictureGeometry
    version: int = VERSION


@dataclass
class Totals:
    """What a stream held, as its last frame says it; a document counts where it ends."""

    documents: int = 0
    tokens: int = 0
    media: int = 0
    frames: int = 0

    def add(self, frame: Frame) -> None:
        self.documents += frame.num_documents - int(frame.is_open)
        self.tokens += frame.num_tokens
        self.media += len(frame.media)
        self.frames += 1


class StreamWriter:
    """Writes frames to a binary file; without `close` the stream reads as cut off."""

    def __init__(
        self, file: BinaryIO, tokenizer: StreamTokenizer, geometry: PictureGeometry
    ) -> None:
        self.file, self.tokenizer, self.geometry = file, tokenizer, geometry
        self.totals = Totals()
        self._is_open = False
        self._has_begun = False
        self._metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": str(tokenizer.vocab_size),
            "geometry": _json(geometry.to_dict()),
        }

    def write(self, frame: Frame) -> None:
        """Append one frame of at least one document."""
        assert frame.num_documents > 0, "a frame without documents ends a stream"
        problem = frame.problem(self.tokenizer.vocab_size, self.geometry)
        assert problem is None, problem
        extra = {"open": "true"} if frame.is_open else {}
        if frame.labels:
            extra["labels"] = _json({name: values for name, (_, values) in frame.labels.items()})
        self._put(frame.to_tensors(), extra)
        self._is_open = frame.is_open
        self.totals.add(frame)

    def close(self) -> None:
        """Write the end frame with the totals."""
        assert not self._is_open, "the last document of the stream is not finished"
        empty = Frame(np.zeros(0, np.uint32), np.zeros(1, np.int64))
        self._put(empty.to_tensors(), {"end": _json(asdict(self.totals))})
        self.file.flush()

    def _put(self, tensors: dict[str, np.ndarray], extra: Mapping[str, str]) -> None:
        if not self._has_begun:
            files = _json(self.tokenizer.files()).encode()
            tensors["tokenizer"] = np.frombuffer(files, np.uint8)
            self._has_begun = True
        header, data = _with_ordered_header(save(tensors, {**self._metadata, **extra}))
        self.file.write(header)
        self.file.write(data)


def _with_ordered_header(blob: bytes) -> tuple[bytes, memoryview]:
    """Fix the order of the metadata: safetensors writes a hash map, in another order each run."""
    (size,) = struct.unpack_from("<Q", blob)
    fields = json.loads(blob[8 : 8 + size])
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data stay aligned
    return struct.pack("<Q", len(text)) + text, memoryview(blob)[8 + size :]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


@dataclass
class _Blob:
    """One frame as it was read: where it began, its metadata, its tensors."""

    start: int
    metadata: dict[str, str]
    tensors: dict[str, np.ndarray]


class StreamReader:
    """Iterates over the frames of one stream, or of several `cat`ed ones, from a file or pipe.

    The first frame is read at once, so that `header` is there before the loop begins.
    raises: L4Error naming the byte, for anything that is not a whole and valid stream
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self.totals = name, Totals()
        self.num_bytes = 0  # read so far
        self._file = file
        first = self._read_blob()
        if first is None:
            fix = "write one with `l4 tokenize FILES -o OUT.tokens`"
            raise L4Error(f"cannot read `{name}`", why="it is empty", fix=fix)
        self.header = self._header_of(first)
        self._frames = self._iterate(first)

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        return next(self._frames)

    def _iterate(self, first: _Blob) -> Iterator[Frame]:
        blob: _Blob | None = first
        while blob is not None:
            self._check_joins(self._header_of(blob), blob.start)
            yield from self._one_stream(blob)
            blob = self._read_blob()

    def _one_stream(self, blob: _Blob) -> Iterator[Frame]:
        totals, own = Totals(), self._shared(blob.metadata)
        is_open = False
        while "end" not in blob.metadata:
            frame = self._frame_of(blob)
            totals.add(frame)
            self.totals.add(frame)
            is_open = frame.is_open
            yield frame
            following = self._read_blob()
            if following is None:
                self._cut_off("there is no end frame")
            blob = following
            if "tokenizer" in blob.tensors:
                self._cut_off("another stream begins before the end frame", blob.start)
            if self._shared(blob.metadata) != own:
                self._damaged(blob.start, "the frame belongs to another stream")
        if is_open:
            self._cut_off("the last document is not finished", blob.start)
        if blob.metadata["end"] != _json(asdict(totals)) or len(blob.tensors.get("tokens", ())):
            self._damaged(blob.start, "the end frame does not agree with the frames before it")

    def _frame_of(self, blob: _Blob) -> Frame:
        try:
            labels = json.loads(blob.metadata.get("labels", "{}"))
            frame = Frame.from_tensors(blob.tensors, labels, "open" in blob.metadata)
        except (ValueError, AttributeError) as error:
            self._damaged(blob.start, str(error))
        problem = frame.problem(self.header.vocab_size, self.header.geometry)
        if problem is None and frame.num_documents == 0:
            problem = "it has no document and does not say `end`"
        if problem is not None:
            self._damaged(blob.start, problem)
        return frame

    def _shared(self, metadata: Mapping[str, str]) -> list[str | None]:
        names = ("format", "version", "fingerprint", "vocab_size", "geometry")
        return [metadata.get(name) for name in names]

    def _header_of(self, blob: _Blob) -> StreamHeader:
        meta = blob.metadata
        if meta.get("format") != FORMAT:
            self._foreign("it is a safetensors file, but not a token stream")
        if meta.get("version") != str(VERSION):
            why = f"it has version {meta.get('version')!r}, and this `l4` reads {VERSION}"
            raise L4Error(
                f"cannot read `{self.name}`", why=why, fix="update `l4`, or tokenize anew"
            )
        if "tokenizer" not in blob.tensors:
            self._damaged(blob.start, "a stream begins without its tokenizer")
        try:
            files = json.loads(blob.tensors["tokenizer"].tobytes())
            if not all(isinstance(text, str) for text in files.values()):
                raise ValueError("a tokenizer file is not text")
            vocab_size, fingerprint = int(meta["vocab_size"]), meta["fingerprint"]
            geometry = PictureGeometry.from_dict(json.loads(meta["geometry"]))
        except (ValueError, KeyError, AttributeError) as error:
            self._damaged(blob.start, f"the stream's header is not readable: {error}")
        return StreamHeader(files, fingerprint, vocab_size, geometry)

    def _check_joins(self, header: StreamHeader, start: int) -> None:
        """Refuse a second stream that was made otherwise than the first."""
        mine, what = self.header, f"cannot join the streams in `{self.name}`"
        if header.fingerprint != mine.fingerprint:
            why = (
                f"from byte {start} on the tokenizer is `{header.fingerprint[:12]}`, "
                f"before it was `{mine.fingerprint[:12]}`"
            )
            raise L4Error(what, why=why, fix="tokenize both with the same `--tokenizer`")
        if header.geometry != mine.geometry:
            why = (
                f"from byte {start} on pictures are {header.geometry.describe()}; "
                f"before: {mine.geometry.describe()}"
            )
            raise L4Error(what, why=why, fix="tokenize both with the same `--preset`")
        if header.vocab_size != mine.vocab_size:
            self._damaged(start, "one tokenizer has two vocabulary sizes")

    def _read_blob(self) -> _Blob | None:
        """Read one safetensors blob; None at a clean end of the file."""
        start = self.num_bytes
        prefix = self._read(8)
        if not prefix:
            return None
        if len(prefix) == 8 and int.from_bytes(prefix, "little") > MAX_HEADER_BYTES:
            self._foreign(f"byte {start} does not begin a frame")
        if len(prefix) < 8:
            if start == 0:
                self._foreign("it is too short")
            self._cut_off("a frame was begun")
        text = self._read_all(int.from_bytes(prefix, "little"))
        size, metadata = self._data_size(text, start)
        body = self._read_all(size)
        try:
            tensors = load(b"".join((prefix, text, body)))
        except (SafetensorError, KeyError, ValueError) as error:
            self._damaged(start, f"the frame is not valid safetensors: {error}")
        return _Blob(start, metadata, tensors)

    def _data_size(self, text: bytes, start: int) -> tuple[int, dict[str, str]]:
        try:
            fields = json.loads(text)
            metadata = fields.pop("__metadata__", {})
            size = max((int(field["data_offsets"][1]) for field in fields.values()), default=0)
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("metadata that is not text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            self._foreign(f"byte {start} does not begin a frame")
        if not 0 <= size <= MAX_FRAME_BYTES:
            self._damaged(start, f"a frame of {size} bytes is larger than {MAX_FRAME_BYTES}")
        return size, metadata

    def _read(self, size: int) -> bytes:
        """Read up to `size` bytes; fewer only at the end of the file (pipes give parts)."""
        parts: list[bytes] = []
        while size > 0:
            part = self._file.read(min(size, _READ_BYTES))
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self.num_bytes += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_all(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size:
            self._cut_off(f"the frame at hand is {size - len(data)} bytes short")
        return data

    def _cut_off(self, why: str, at: int | None = None) -> NoReturn:
        byte = self.num_bytes if at is None else at
        raise L4Error(
            f"cannot read `{self.name}` to its end",
            why=f"the stream was cut off at byte {byte}: {why}",
            fix="run the `l4 tokenize` that wrote it again, to its end",
        )

    def _damaged(self, start: int, why: str) -> NoReturn:
        raise L4Error(
            f"cannot read `{self.name}`",
            why=f"the frame at byte {start} is damaged: {why}",
            fix="run the `l4 tokenize` that wrote it again",
        )

    def _foreign(self, why: str) -> NoReturn:
        raise L4Error(
            f"cannot read `{self.name}` as a token stream",
            why=why,
            fix="pass what `l4 tokenize` wrote; text goes through `l4 tokenize FILES` first",
        )


def read_stream(file: BinaryIO, name: str) -> StreamReader:
    """Open a stream: an iterator of `Frame`s with a `header`; never seeks."""
    return StreamReader(file, name)
