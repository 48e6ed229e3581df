"""Rows of text to measure a model on: from a token stream or from packed shards.

in: a `.tokens` file or a folder of shards; out: `TextRows`, batches of whole rows
A stream's documents are laid end to end and cut. Where there is more text than asked for, rows
are taken from all over it (of a stream: of its beginning), as neighbours are alike. Rows with
pictures are passed over: what is measured here is the text half.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4cli.data.geometry import PictureGeometry
from l4cli.data.loader import BatchMaker
from l4cli.data.shards import Row, ShardSet
from l4cli.data.stream import read_stream
from l4cli.errors import L4Error
from l4cli.ops.batch import Batch

ROW_TOKENS = 2048  # of a row cut from a stream
_BATCH_TOKENS = 8192
_SPREAD = 16  # how much of a stream is read, times what is asked for


@dataclass(frozen=True)
class TextRows:
    """Rows of one length; nothing of them is longer than memory, as the caller chose how many."""

    path: Path
    rows: list[Row]
    geometry: PictureGeometry
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(int(np.count_nonzero(row.document_ids)) for row in self.rows)

    def batches(self, attention_chunk_size: int | None) -> list[Batch]:
        """All rows in order, a few at a time."""
        maker = BatchMaker(self.geometry, None, attention_chunk_size)
        size = max(1, _BATCH_TOKENS // len(self.rows[0].input_ids))
        starts = range(0, len(self.rows), size)
        return [maker.batch(part, [""] * len(part)) for part in self._parts(starts, size)]

    def _parts(self, starts: range, size: int) -> Iterator[list[Row]]:
        for start in starts:
            yield self.rows[start : start + size]


def read_text_rows(
    path: Path, num_tokens: int | None, what: str, row_tokens: int = ROW_TOKENS
) -> TextRows:
    """Read `num_tokens` (None: all) of a stream, in rows of at most `row_tokens`, or of shards.

    `what` begins the error. raises: L4Error when there are fewer, or none
    """
    if path.is_dir():
        found = _of_shards(path, num_tokens)
    else:
        found = _of_stream(path, num_tokens, row_tokens)
    if not found.rows:
        fix = "tokenize text for it: `l4 tokenize FILES -o OUT.tokens`"
        raise L4Error(f"{what} `{path}`", why="it holds no text without pictures", fix=fix)
    if num_tokens is not None and found.num_tokens < num_tokens:
        why = f"it has {found.num_tokens} tokens of text, and {num_tokens} are asked for"
        fix = f"bring more text, or ask for {found.num_tokens} tokens"
        raise L4Error(f"{what} `{path}`", why=why, fix=fix)
    return found


def _of_shards(path: Path, num_tokens: int | None) -> TextRows:
    shards = ShardSet.open(path)
    rows: list[Row] = []
    total = 0
    for number in _spread(shards.num_rows, _num_rows(num_tokens, shards.seq_len)):
        if num_tokens is not None and total >= num_tokens:
            break
        row = shards.row(number)
        if not row.media:
            rows.append(row)
            total += int(np.count_nonzero(row.document_ids))
    return TextRows(path, rows, shards.geometry, shards.fingerprint)


def _num_rows(num_tokens: int | None, row_tokens: int) -> int | None:
    return None if num_tokens is None else -(-num_tokens // row_tokens)


def _spread(num_rows: int, wanted: int | None) -> Iterator[int]:
    """All rows, in an order whose first `wanted` lie all over."""
    step = 1 if wanted is None else max(1, num_rows // wanted)
    for first in range(step):
        yield from range(first, num_rows, step)


def _of_stream(path: Path, num_tokens: int | None, row_tokens: int) -> TextRows:
    try:
        with open(path, "rb") as file:
            stream = read_stream(file, str(path))
            parts: list[tuple[np.ndarray, int]] = []  # tokens, number of their document
            total = document = 0
            for frame in stream:
                has_media = _with_media(frame.offsets, frame.media_positions)
                for i in range(frame.num_documents):
                    tokens = frame.tokens[frame.offsets[i] : frame.offsets[i + 1]]
                    if not has_media[i]:
                        parts.append((tokens, document))
                        total += len(tokens)
                    goes_on = frame.is_open and i == frame.num_documents - 1
                    document += int(not goes_on)
                if num_tokens is not None and total >= _SPREAD * num_tokens:
                    break
            header = stream.header
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise L4Error(f"cannot read `{path}`", why=why, fix="check the path") from error
    rows = _cut(parts, num_tokens, row_tokens)
    return TextRows(path, rows, header.geometry, header.fingerprint)


def _with_media(offsets: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Whether each document of a frame shows pictures. shapes: -> bool [documents]"""
    found = np.zeros(len(offsets) - 1, bool)
    found[np.searchsorted(offsets, positions, side="right") - 1] = True
    return found


def _cut(parts: list[tuple[np.ndarray, int]], num_tokens: int | None, row_tokens: int) -> list[Row]:
    """Lay documents end to end and cut rows; the last one is filled with padding."""
    if not parts:
        return []
    tokens = np.concatenate([part for part, _ in parts])
    numbers = np.concatenate([np.full(len(part), number) for part, number in parts])
    length = min(row_tokens, len(tokens))
    wanted = _num_rows(num_tokens, row_tokens)
    if num_tokens is not None and wanted is not None:
        length = min(-(-num_tokens // wanted), len(tokens))  # rows alike, and no more than asked
    starts = range(0, len(tokens), length)
    rows = [_row(tokens[i : i + length], numbers[i : i + length], length) for i in starts]
    if wanted is None or len(tokens) < length * wanted:
        return rows
    whole = len(tokens) // length
    return [rows[i] for i in itertools.islice(_spread(whole, wanted), wanted)]


def _row(tokens: np.ndarray, numbers: np.ndarray, length: int) -> Row:
    ids, documents = np.zeros(length, np.uint32), np.zeros(length, np.int32)
    ids[: len(tokens)] = tokens
    # 1, 2, ... within the row, as in shards.
    documents[: len(tokens)] = np.cumsum(np.diff(numbers, prepend=numbers[0]) != 0) + 1
    return Row(ids, documents, None, [], np.zeros(0, np.int64), np.zeros((0, 2), np.int32))
