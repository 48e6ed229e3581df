"""From token streams to shards: what `l4 pack` does, for every command that packs.

in: names of token streams (`-` is stdin); out: a folder of shards and its index
"""

from __future__ import annotations

import functools
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l4cli import terminal
from l4cli.data.packing import BestFitPacker, ConcatPacker, Rows, RowShuffler
from l4cli.data.pieces import PictureBorders, Splitter
from l4cli.data.shard_writer import ShardWriter
from l4cli.data.standard_input import standard_input
from l4cli.data.stream import StreamHeader, StreamReader, read_stream
from l4cli.errors import L4Error
from l4cli.text import tokenizer_from_files

STDIN = "-"


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
    line = _Line(seq_len, options)
    header = None
    packing = asdict(options)
    with ShardWriter(out, seq_len=seq_len, packing=packing, shard_rows=shard_rows) as writer:
        _check_headers(names)
        read_bytes, began = 0, time.monotonic()
        with terminal.progress("pack", _total_bytes(names)) as progress:
            for name in names:
                with _opened(name) as reader:
                    header = _agreed(header, reader.header, names[0], name)
                    line.splitter.begin_stream(name, _picture_borders(header), header.geometry)
                    for frame in reader:
                        line.write(line.packer.add(line.splitter.add(frame)), writer)
                        rate = writer.num_tokens / (time.monotonic() - began)
                        progress.update(
                            read_bytes + reader.num_bytes,
                            rows=str(writer.num_rows),
                            tok_per_sec=terminal.count_text(rate),
                        )
                    read_bytes += reader.num_bytes
        line.write(line.packer.finish(), writer)
        for rows in line.shuffler.finish():
            writer.add(rows)
        assert header is not None
        return writer.finish(header, line.splitter.labels.values())


class _Line:
    """Splitter, packer and shuffler as the options want them."""

    def __init__(self, seq_len: int, options: PackingOptions) -> None:
        # Two generators: how much one of them is asked must not depend on the other.
        order, mixing = (
            np.random.default_rng([options.seed, i]) if options.shuffle else None for i in range(2)
        )
        is_concat = options.method == "concat"
        packer: type[BestFitPacker] | type[ConcatPacker]
        packer = ConcatPacker if is_concat else BestFitPacker
        self.packer = packer(seq_len, options.window, order)
        limit = options.window if is_concat else seq_len
        self.splitter = Splitter(seq_len, limit)
        self.shuffler = RowShuffler(options.window, mixing)

    def write(self, packed: Iterator[Rows], writer: ShardWriter) -> None:
        for rows in packed:
            for shuffled in self.shuffler.add(rows):
                writer.add(shuffled)


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
