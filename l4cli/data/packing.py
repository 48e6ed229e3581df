"""Place pieces of documents in rows of fixed length.

in: `Pieces`; out: `Rows`, full but for a fraction of a percent, every token in exactly one row
source: best-fit decreasing as in arXiv 2404.10830 (Fewer Truncations Improve Language Modeling)

Packing sees a window of pieces at a time. Rows that stay loose give their pieces back to the
next window, up to half of it; so memory is bounded and a small window still packs well.
With a random generator the order of pieces within a window is shuffled, and rows go through a
buffer as large as the window; without one rows keep the order of their first pieces.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from l4cli.data.pieces import (
    MEDIA_BYTES_PER_TOKEN,
    Pieces,
    cuts_between,
    join_labels,
    offsets_of,
    ranges,
)

# A row with less than this share of room is done; a looser one is packed again.
_TIGHT = 1 / 256


@dataclass
class Rows:
    """Packed rows; documents within a row are numbered 1, 2, ..., padding is 0."""

    input_ids: np.ndarray  # uint32 [R,T]
    document_ids: np.ndarray  # int32 [R,T]
    num_documents: np.ndarray  # int64 [R]
    loss_mask: np.ndarray | None  # uint8 [R,T]; None: all ones
    media: list[bytes]
    media_rows: np.ndarray  # int64 [m], rising
    media_positions: np.ndarray  # int64 [m], within the row
    media_tiles: np.ndarray  # int32 [m,2]
    labels: dict[str, np.ndarray] = field(default_factory=dict)  # int32 [documents of all rows]

    @property
    def num_rows(self) -> int:
        return len(self.input_ids)

    def media_bytes(self) -> np.ndarray:
        """Encoded bytes of the pictures of each row; int64 [R]."""
        sizes = np.zeros(self.num_rows, np.int64)
        np.add.at(sizes, self.media_rows, [len(item) for item in self.media])
        return sizes

    def select(self, order: np.ndarray) -> Rows:
        """Copy the rows named by `order`, in that order."""
        first_media = np.searchsorted(self.media_rows, np.arange(self.num_rows + 1))
        media_counts = np.diff(first_media)[order]
        media = ranges(first_media[order], media_counts)
        counts = self.num_documents[order]
        documents = ranges(offsets_of(self.num_documents)[order], counts)
        return Rows(
            input_ids=self.input_ids[order],
            document_ids=self.document_ids[order],
            num_documents=counts,
            loss_mask=None if self.loss_mask is None else self.loss_mask[order],
            media=[self.media[i] for i in media],
            media_rows=np.repeat(np.arange(len(order)), media_counts),
            media_positions=self.media_positions[media],
            media_tiles=self.media_tiles[media],
            labels={name: codes[documents] for name, codes in self.labels.items()},
        )

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Put rows one after the other."""
        if len(parts) == 1:
            return parts[0]
        bases = offsets_of(np.array([part.num_rows for part in parts]))
        has_mask = any(part.loss_mask is not None for part in parts)
        documents = [int(part.num_documents.sum()) for part in parts]
        rows = [part.media_rows + base for part, base in zip(parts, bases, strict=False)]
        return cls(
            input_ids=np.concatenate([part.input_ids for part in parts]),
            document_ids=np.concatenate([part.document_ids for part in parts]),
            num_documents=np.concatenate([part.num_documents for part in parts]),
            loss_mask=np.concatenate([_full_mask(part) for part in parts]) if has_mask else None,
            media=[item for part in parts for item in part.media],
            media_rows=np.concatenate(rows),
            media_positions=np.concatenate([part.media_positions for part in parts]),
            media_tiles=np.concatenate([part.media_tiles for part in parts]),
            labels=join_labels([part.labels for part in parts], documents),
        )


def _full_mask(rows: Rows) -> np.ndarray:
    return np.ones(rows.input_ids.shape, np.uint8) if rows.loss_mask is None else rows.loss_mask


def best_fit(lengths: np.ndarray, capacity: int, order: np.ndarray | None = None) -> np.ndarray:
    """Give every piece the fullest row that still has room for it, longest pieces first.

    Equal lengths are placed together, so that the work grows with the number of different
    lengths and not of pieces. `order` breaks ties; the row numbers say only what is together.
    """
    order = np.arange(len(lengths)) if order is None else order
    order = order[np.argsort(-lengths[order], kind="stable")]
    descending = lengths[order]
    borders = np.flatnonzero(np.diff(descending, prepend=-1, append=-1)).tolist()
    assert len(lengths) == 0 or 0 < descending[-1] <= descending[0] <= capacity
    placed = np.empty(len(lengths), np.int64)  # rows by rank in `order`
    rooms: list[int] = []  # the amounts of room that some row has, rising
    rows_with: dict[int, list[int]] = {}  # room -> its rows
    num_rows = 0
    for i, end in itertools.pairwise(borders):
        length = int(descending[i])
        while i < end:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                rows = rows_with[room]
            else:
                room = capacity
                num_new = -(-(end - i) // (capacity // length))
                rows = list(range(num_rows, num_rows + num_new))
                num_rows += num_new
            per_row = room // length
            num_used = min(len(rows), -(-(end - i) // per_row))
            used = rows[-num_used:]
            num_placed = min(end - i, num_used * per_row)
            if num_used == 1:
                placed[i : i + num_placed] = used[0]
            else:
                placed[i : i + num_placed] = np.repeat(used, per_row)[:num_placed]
            i += num_placed
            if at < len(rooms):
                del rows[-num_used:]
                if not rows:
                    del rows_with[room], rooms[at]
            num_last = num_placed - (num_used - 1) * per_row
            for group, num in ((used[:-1], per_row), (used[-1:], num_last)):
                left = room - num * length
                if left and group:
                    if left not in rows_with:
                        rows_with[left] = []
                        insort(rooms, left)
                    rows_with[left] += group
    rows_of = np.empty(len(lengths), np.int64)
    rows_of[order] = placed
    return rows_of


def fill_rows(pieces: Pieces, rows_of: np.ndarray, num_rows: int, seq_len: int) -> Rows:
    """Write pieces into rows; `rows_of` rises, and pieces of a row stay in their order."""
    lengths, tokens = pieces.lengths, pieces.tokens
    filled = np.bincount(rows_of, lengths, num_rows).astype(np.int64)
    # A piece that goes on where its left neighbour ended is one document with it.
    is_new = np.ones(len(lengths), bool)
    is_new[1:] = (
        (rows_of[1:] != rows_of[:-1])
        | (pieces.documents[1:] != pieces.documents[:-1])
        | (pieces.begins[1:] != pieces.begins[:-1] + lengths[:-1])
    )
    num_documents = np.bincount(rows_of[is_new], minlength=num_rows)
    numbers = np.cumsum(is_new) - offsets_of(num_documents)[rows_of]
    document_ids = np.repeat(numbers.astype(np.int32), lengths)
    media_rows = rows_of[pieces.media_owners()]
    return Rows(
        input_ids=_spread(tokens, filled, seq_len),
        document_ids=_spread(document_ids, filled, seq_len),
        num_documents=num_documents,
        loss_mask=None if pieces.loss_mask is None else _spread(pieces.loss_mask, filled, seq_len),
        media=pieces.media,
        media_rows=media_rows,
        media_positions=pieces.media_positions - offsets_of(filled)[media_rows],
        media_tiles=pieces.media_tiles,
        labels={name: codes[is_new] for name, codes in pieces.labels.items()},
    )


def _spread(values: np.ndarray, filled: np.ndarray, seq_len: int) -> np.ndarray:
    """Give every row its share of the flat values, then zeros."""
    if (filled == seq_len).all():
        return values.reshape(len(filled), seq_len)
    rows = np.zeros((len(filled), seq_len), values.dtype)
    rows[np.arange(seq_len) < filled[:, None]] = values
    return rows


class _Window:
    """Collects pieces until their weight reaches a size, wherever frames end."""

    def __init__(self, size: int) -> None:
        self.size, self.weight = size, 0
        self.parts: list[Pieces] = []

    def add(self, pieces: Pieces) -> Iterator[Pieces]:
        """Take pieces; give all that is collected each time the window is full."""
        weights = np.cumsum(pieces.weights())
        start, before = 0, 0
        while start < pieces.num_pieces:
            missing = self.size - self.weight
            stop = int(np.searchsorted(weights, before + missing)) + 1
            stop = min(max(stop, start + 1), pieces.num_pieces)
            self.parts.append(pieces.slice(start, stop))
            self.weight += int(weights[stop - 1]) - before
            start, before = stop, int(weights[stop - 1])
            if self.weight >= self.size:
                yield self.take()
        # What stays must not keep a whole frame alive.
        if self.parts and start:
            self.parts[-1] = Pieces.join(self.parts[-1:])

    def take(self) -> Pieces:
        """All that is collected; the window is empty then."""
        pieces, self.parts, self.weight = Pieces.join(self.parts), [], 0
        return pieces

    def give_back(self, pieces: Pieces) -> None:
        """Begin the next window with these."""
        assert not self.parts
        if pieces.num_pieces:
            self.parts, self.weight = [pieces], int(pieces.weights().sum())


class BestFitPacker:
    """Packs pieces of at most `seq_len` tokens, window by window."""

    def __init__(self, seq_len: int, window: int, rng: np.random.Generator | None) -> None:
        self.seq_len, self.rng = seq_len, rng
        self._window = _Window(window)

    def add(self, pieces: Pieces) -> Iterator[Rows]:
        """Take pieces and give the rows that are done."""
        for full in self._window.add(pieces):
            yield self._pack(full, is_last=False)

    def finish(self) -> Iterator[Rows]:
        """Give the rest; only the last rows may be loose."""
        if self._window.parts:
            yield self._pack(self._window.take(), is_last=True)

    def _pack(self, pieces: Pieces, is_last: bool) -> Rows:
        tie_order = None if self.rng is None else self.rng.permutation(pieces.num_pieces)
        rows_of = best_fit(pieces.lengths, self.seq_len, tie_order)
        num_rows = int(rows_of.max()) + 1
        room = self.seq_len - np.bincount(rows_of, pieces.lengths, num_rows).astype(np.int64)
        is_kept = np.zeros(num_rows, bool)
        if not is_last:
            weight = np.bincount(rows_of, pieces.weights(), num_rows).astype(np.int64)
            loosest = np.argsort(-room, kind="stable")
            fits = np.cumsum(weight[loosest]) <= self._window.size // 2
            is_kept[loosest] = fits & (room[loosest] > self.seq_len * _TIGHT)
        kept = np.flatnonzero(is_kept[rows_of])
        self._window.give_back(pieces.select(kept))
        return self._write(pieces, rows_of, is_kept)

    def _write(self, pieces: Pieces, rows_of: np.ndarray, is_kept: np.ndarray) -> Rows:
        """Number the rows that are done and put them, and their pieces, into order."""
        done = np.flatnonzero(~is_kept[rows_of])
        if self.rng is None:
            found, first = np.unique(rows_of[done], return_index=True)
            ranking, within = found[np.argsort(first)], done
        else:
            ranking = self.rng.permutation(np.flatnonzero(~is_kept))
            within = self.rng.permutation(len(rows_of))[done]
        rank = np.empty(len(is_kept), np.int64)
        rank[ranking] = np.arange(len(ranking))
        order = np.lexsort((within, rank[rows_of[done]]))
        taken = pieces.select(done[order])
        return fill_rows(taken, rank[rows_of[done[order]]], len(ranking), self.seq_len)


class ConcatPacker:
    """Cuts the concatenation of all pieces every `seq_len` tokens; never a picture, which makes
    the row before it short."""

    def __init__(self, seq_len: int, window: int, rng: np.random.Generator | None) -> None:
        self.seq_len, self.rng = seq_len, rng
        self._window = _Window(window)
        self._num_begun = 0  # pieces at the head of the window that begin the next row

    def add(self, pieces: Pieces) -> Iterator[Rows]:
        """Take pieces and give the rows that are done."""
        for full in self._window.add(pieces):
            yield self._pack(full, is_last=False)

    def finish(self) -> Iterator[Rows]:
        """Give the rest; the last row may be short."""
        if self._window.parts:
            yield self._pack(self._window.take(), is_last=True)

    def _pack(self, pieces: Pieces, is_last: bool) -> Rows:
        if self.rng is not None:
            begun = np.arange(self._num_begun)
            new = self._num_begun + self.rng.permutation(pieces.num_pieces - self._num_begun)
            pieces = pieces.select(np.concatenate([begun, new]))
        end = len(pieces.tokens)
        cuts = self._cuts(pieces)
        if not is_last and end - ([0, *cuts])[-1] < self.seq_len:
            end = ([0, *cuts])[-1]
        borders = np.array([cut for cut in cuts if cut < end], np.int64)
        offsets = np.unique(np.concatenate([pieces.offsets, cuts]).astype(np.int64))
        pieces = pieces.recut(offsets)
        num_done = int(np.searchsorted(offsets, end))
        self._window.give_back(Pieces.join([pieces.slice(num_done, pieces.num_pieces)]))
        self._num_begun = pieces.num_pieces - num_done
        pieces = pieces.slice(0, num_done)
        rows_of = np.searchsorted(borders, pieces.offsets[:-1], side="right")
        # Heavy pictures can fill a window before their tokens fill one row.
        num_rows = len(borders) + 1 if num_done else 0
        return fill_rows(pieces, rows_of, num_rows, self.seq_len)

    def _cuts(self, pieces: Pieces) -> list[int]:
        end = len(pieces.tokens)
        if not pieces.media:
            return list(range(self.seq_len, end, self.seq_len))
        starts, ends = pieces.block_starts.tolist(), pieces.block_ends.tolist()
        return cuts_between(0, end, self.seq_len, starts, ends)


class RowShuffler:
    """Mixes rows with those of earlier windows through a buffer of bounded weight."""

    def __init__(self, size: int, rng: np.random.Generator | None) -> None:
        self.size, self.rng = size, rng
        self._held: Rows | None = None

    def add(self, rows: Rows) -> Iterator[Rows]:
        """Take rows; give as many others as the buffer cannot hold."""
        if self.rng is None or not rows.num_rows:
            yield rows
            return
        mixed = rows if self._held is None else Rows.join([self._held, rows])
        order = self.rng.permutation(mixed.num_rows)
        weights = mixed.input_ids.shape[1] + mixed.media_bytes() // MEDIA_BYTES_PER_TOKEN
        num_kept = int(np.searchsorted(np.cumsum(weights[order]), self.size, side="right"))
        self._held = mixed.select(order[:num_kept])
        if num_kept < mixed.num_rows:
            yield mixed.select(order[num_kept:])

    def finish(self) -> Iterator[Rows]:
        """Give what is held; it is in random order already."""
        if self._held is not None and self._held.num_rows:
            yield self._held
        self._held = None
