"""From token streams to shards: what `l4 pack` does, for every command that packs.

in: names of token streams (`-` is stdin); out: a folder of shards and its index
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from l4cli import terminal
from l4cli.data.frame import Frame
from l4cli.data.packing import BestFitPacker, ConcatPacker, Rows, RowShuffler
from l4cli.data.pieces import PictureBorders, Pieces, Splitter, offsets_of
from l4cli.data.shard_writer import ShardWriter
from l4cli.data.staging import StagedFolder
from l4cli.data.standard_input import standard_input
from l4cli.data.stream import StreamHeader, StreamReader, read_stream
from l4cli.errors import L4Error
from l4cli.text import tokenizer_from_files

STDIN = "-"
LONG, SHORT = "long", "short"  # the folders of `pack_by_length`


@dataclass(frozen=True)
class PackingOptions:
    """How to pack; stands in the index of the shards."""

    method: str  # "best-fit" or "concat"
    window: int  # tokens
    shuffle: bool
    seed: int


def pack_streams(
    names: Sequence[str],
    out: str | Path,
    seq_len: int,
    options: PackingOptions,
    shard_rows: int | None = None,
) -> dict[str, Any]:
    """Pack all streams into one folder, which appears whole or not at all; give its index."""
    packing = asdict(options)
    with ShardWriter(out, seq_len=seq_len, packing=packing, shard_rows=shard_rows) as writer:
        line = _Line(seq_len, options, writer)
        splitter = Splitter(seq_len, line.limit)
        header = _feed(names, splitter, line.add, [writer])
        line.finish()
        return writer.finish(header, splitter.labels.values())


def pack_frames(
    frames: Sequence[Frame],
    header: StreamHeader,
    out: str | Path,
    seq_len: int,
    options: PackingOptions,
) -> tuple[dict[str, Any], np.ndarray]:
    """Pack frames of text; give the index of the shards, and where each token of them came from.

    shapes: -> index, int64 [rows, seq_len]: the place in all frames' tokens, -1 for padding
    """
    places_N = offsets_of(np.array([len(frame.tokens) for frame in frames], np.int64))
    writer = _PlacesWriter(frames, out, seq_len, options)
    with writer:
        line = _Line(seq_len, options, writer)
        splitter = Splitter(seq_len, line.limit)
        for frame, first, end in zip(frames, places_N, places_N[1:], strict=False):
            assert not frame.media, "pictures are found by the tokens that stand for them"
            # Packing looks at lengths alone, so places can be packed in the tokens' stead.
            line.add(splitter.add(replace(frame, tokens=np.arange(first, end, dtype=np.uint32))))
        line.finish()
        return writer.finish(header, splitter.labels.values()), np.concatenate(writer.places)


class _PlacesWriter(ShardWriter):
    """Is given rows of places and writes the tokens that stand there."""

    def __init__(
        self, frames: Sequence[Frame], out: str | Path, seq_len: int, options: PackingOptions
    ) -> None:
        super().__init__(out, seq_len=seq_len, packing=asdict(options))
        self.tokens_N = np.concatenate([np.zeros(0, np.uint32), *(f.tokens for f in frames)])
        self.places = [np.zeros((0, seq_len), np.int64)]

    def add(self, rows: Rows) -> None:
        """Take rows of places."""
        is_padding_RT = rows.document_ids == 0
        self.places.append(np.where(is_padding_RT, -1, rows.input_ids.astype(np.int64)))
        ids_RT = np.where(is_padding_RT, 0, self.tokens_N[rows.input_ids])
        super().add(replace(rows, input_ids=ids_RT.astype(np.uint32)))


def pack_by_length(
    names: Sequence[str], out: str | Path, seq_len: int, options: PackingOptions
) -> dict[str, dict[str, Any]]:
    """Pack long documents into `out/long` and the others into `out/short`; give their indices.

    Long is what has at least half a row of tokens before its first cut. What no document falls
    into has no folder. All of `out` appears whole or not at all.
    """
    with StagedFolder(out) as staged:
        indices = _pack_by_length(names, staged.path, seq_len, options)
        staged.commit()
    return indices


def _pack_by_length(
    names: Sequence[str], out: Path, seq_len: int, options: PackingOptions
) -> dict[str, dict[str, Any]]:
    indices: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        lines = {}
        for name in (LONG, SHORT):
            writer = ShardWriter(out / name, seq_len=seq_len, packing=asdict(options))
            lines[name] = _Line(seq_len, options, stack.enter_context(writer))
        splitter = Splitter(seq_len, lines[LONG].limit)
        by_length = _ByLength(seq_len)

        def add(pieces: Pieces) -> None:
            is_long = by_length.is_long(pieces)
            lines[LONG].add(pieces.select(np.flatnonzero(is_long)))
            lines[SHORT].add(pieces.select(np.flatnonzero(~is_long)))

        header = _feed(names, splitter, add, [line.writer for line in lines.values()])
        for name, line in lines.items():
            line.finish()
            line.writer.packing["longest_short"] = by_length.longest_short
            if line.has_rows or (name == SHORT and not indices):  # which refuses empty streams
                indices[name] = line.writer.finish(header, splitter.labels.values())
    return indices


def _feed(
    names: Sequence[str],
    splitter: Splitter,
    add: Callable[[Pieces], None],
    writers: Sequence[ShardWriter],
) -> StreamHeader:
    """Read all streams through the splitter; return the header they share."""
    _check_headers(names)
    header = None
    read_bytes, began = 0, time.monotonic()
    with terminal.progress("pack", _total_bytes(names)) as progress:
        for name in names:
            with _opened(name) as reader:
                header = _agreed(header, reader.header, names[0], name)
                splitter.begin_stream(name, _picture_borders(header), header.geometry)
                for frame in reader:
                    add(splitter.add(frame))
                    num_tokens = sum(writer.num_tokens for writer in writers)
                    rate = num_tokens / (time.monotonic() - began)
                    progress.update(
                        read_bytes + reader.num_bytes,
                        rows=str(sum(writer.num_rows for writer in writers)),
                        tok_per_sec=terminal.count_text(rate),
                    )
                read_bytes += reader.num_bytes
    assert header is not None
    return header


class _Line:
    """Packer, shuffler and writer as the options want them."""

    def __init__(self, seq_len: int, options: PackingOptions, writer: ShardWriter) -> None:
        # Two generators: how much one of them is asked must not depend on the other.
        order, mixing = (
            np.random.default_rng([options.seed, i]) if options.shuffle else None for i in range(2)
        )
        is_concat = options.method == "concat"
        packer: type[BestFitPacker] | type[ConcatPacker]
        packer = ConcatPacker if is_concat else BestFitPacker
        self.packer = packer(seq_len, options.window, order)
        self.limit = options.window if is_concat else seq_len
        self.shuffler = RowShuffler(options.window, mixing)
        self.writer = writer
        self.has_rows = False

    def add(self, pieces: Pieces) -> None:
        """Take pieces and write the rows that are done."""
        self._write(self.packer.add(pieces))

    def finish(self) -> None:
        """Write what is held; the writer stays open."""
        self._write(self.packer.finish())
        for rows in self.shuffler.finish():
            self._put(rows)

    def _write(self, packed: Iterator[Rows]) -> None:
        for rows in packed:
            for shuffled in self.shuffler.add(rows):
                self._put(shuffled)

    def _put(self, rows: Rows) -> None:
        self.has_rows = self.has_rows or rows.num_rows > 0
        self.writer.add(rows)


class _ByLength:
    """Tells pieces of long documents; a document that is cut stays on its side."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.longest_short = 0  # tokens
        self._last_is_long = False

    def is_long(self, pieces: Pieces) -> np.ndarray:
        """bool [pieces]; only a first piece decides, so frames and windows do not matter."""
        is_first = pieces.begins == 0
        first = np.where(is_first, np.arange(pieces.num_pieces), -1)
        np.maximum.accumulate(first, out=first)  # -1: the document began before these pieces
        is_long = np.where(first >= 0, 2 * pieces.lengths[first] >= self.seq_len, False)
        is_long[first < 0] = self._last_is_long
        self.longest_short = max(self.longest_short, int(pieces.lengths[~is_long].max(initial=0)))
        if pieces.num_pieces:
            self._last_is_long = bool(is_long[-1])
        return is_long


def check_names(names: Sequence[str]) -> None:
    """Refuse what cannot be opened, before anything is read."""
    for name in names:
        if name == STDIN:
            continue
        if not os.path.exists(name):
            fix = "check the path; `l4 tokenize FILES -o OUT.tokens` writes one"
            raise L4Error(f"cannot read `{name}`", why="there is no such file", fix=fix)
        if os.path.isdir(name):
            why, fix = "it is a folder", f"tokenize it first: `l4 tokenize {name} | l4 pack`"
            raise L4Error(f"cannot read `{name}`", why=why, fix=fix)


def _is_regular(name: str) -> bool:
    """Whether it can be read twice: a named pipe or stdin cannot."""
    return name != STDIN and stat.S_ISREG(os.stat(name).st_mode)


def _total_bytes(names: Sequence[str]) -> float | None:
    if all(_is_regular(name) for name in names):
        return sum(os.path.getsize(name) for name in names)
    return None


def _check_headers(names: Sequence[str]) -> None:
    """With several files, see that they agree before the first is packed."""
    if len(names) < 2:
        return
    first: tuple[str, StreamHeader] | None = None
    for name in filter(_is_regular, names):
        with _opened(name) as reader:
            if first is not None:
                _agreed(first[1], reader.header, first[0], name)
            first = first or (name, reader.header)


@contextmanager
def _opened(name: str) -> Iterator[StreamReader]:
    if name == STDIN:
        yield read_stream(standard_input(), "stdin")
        return
    with open(name, "rb") as file:
        yield read_stream(file, name)


def _agreed(
    first: StreamHeader | None, header: StreamHeader, first_name: str, name: str
) -> StreamHeader:
    """The header of all streams; refuse one that was made otherwise."""
    if first is None:
        return header
    what = f"cannot pack `{first_name}` and `{name}` together"
    if header.fingerprint != first.fingerprint:
        why = f"their tokenizers are `{first.fingerprint[:12]}` and `{header.fingerprint[:12]}`"
        raise L4Error(what, why=why, fix="tokenize both with the same `--tokenizer`")
    if header.geometry != first.geometry:
        why = (
            f"the pictures of one are {first.geometry.describe()}; "
            f"of the other {header.geometry.describe()}"
        )
        raise L4Error(what, why=why, fix="tokenize both with the same `--preset`")
    return first


def _picture_borders(header: StreamHeader) -> PictureBorders:
    @functools.cache
    def borders() -> tuple[int | None, int | None]:
        tokenizer = tokenizer_from_files(header.tokenizer_files)
        return tokenizer.image_start_id, tokenizer.image_end_id

    return borders
