"""Pieces of documents: what the packers place, cut so that each fits one row.

in: frames of a token stream; out: `Pieces`, flat arrays over many pieces, no token added or lost

A picture block (`<|image_start|>` .. `<|image_end|>`) is never cut. Positions of media count
from the start of the flat `tokens`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from l4cli.data.frame import Frame, Labels
from l4cli.data.geometry import PictureGeometry
from l4cli.errors import L4Error

# Asked only when there is a picture: reading a large vocabulary takes a while.
PictureBorders = Callable[[], tuple[int | None, int | None]]
# How much of a window a picture takes beside its tokens: this many encoded bytes count as one.
MEDIA_BYTES_PER_TOKEN = 64


@dataclass
class Pieces:
    """Many pieces, one after the other; a piece is a run of tokens of one document."""

    tokens: np.ndarray  # uint32 [n]
    offsets: np.ndarray  # int64 [pieces+1]
    documents: np.ndarray  # int64 [pieces], the number of the document in the input
    begins: np.ndarray  # int64 [pieces], where in its document the piece begins
    loss_mask: np.ndarray | None  # uint8 [n]; None: all ones
    media: list[bytes]
    media_positions: np.ndarray  # int64 [m], the first placeholder
    block_starts: np.ndarray  # int64 [m], `<|image_start|>`
    block_ends: np.ndarray  # int64 [m], one past `<|image_end|>`
    media_tiles: np.ndarray  # int32 [m,2]
    labels: dict[str, np.ndarray] = field(default_factory=dict)  # int32 [pieces], -1: no value

    @property
    def num_pieces(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def media_owners(self) -> np.ndarray:
        """The piece of each picture; int64 [m]."""
        return np.searchsorted(self.offsets, self.media_positions, side="right") - 1

    def weights(self) -> np.ndarray:
        """What each piece takes of a window: its tokens, and its encoded pictures as tokens."""
        weights = self.lengths
        if self.media:
            sizes = np.array([len(item) for item in self.media]) // MEDIA_BYTES_PER_TOKEN
            np.add.at(weights, self.media_owners(), sizes)
        return weights

    def slice(self, start: int, stop: int) -> Pieces:
        """Pieces `start` to `stop`, as views."""
        if (start, stop) == (0, self.num_pieces):
            return self
        a, b = int(self.offsets[start]), int(self.offsets[stop])
        first, last = np.searchsorted(self.media_positions, [a, b])
        return Pieces(
            tokens=self.tokens[a:b],
            offsets=self.offsets[start : stop + 1] - a,
            documents=self.documents[start:stop],
            begins=self.begins[start:stop],
            loss_mask=None if self.loss_mask is None else self.loss_mask[a:b],
            media=self.media[first:last],
            media_positions=self.media_positions[first:last] - a,
            block_starts=self.block_starts[first:last] - a,
            block_ends=self.block_ends[first:last] - a,
            media_tiles=self.media_tiles[first:last],
            labels={name: codes[start:stop] for name, codes in self.labels.items()},
        )

    def select(self, order: np.ndarray) -> Pieces:
        """Copy the pieces named by `order`, in that order."""
        lengths = self.lengths[order]
        offsets = offsets_of(lengths)
        take = ranges(self.offsets[order], lengths)
        media, shift = self._select_media(order, offsets)
        return Pieces(
            tokens=self.tokens[take],
            offsets=offsets,
            documents=self.documents[order],
            begins=self.begins[order],
            loss_mask=None if self.loss_mask is None else self.loss_mask[take],
            media=[self.media[i] for i in media],
            media_positions=self.media_positions[media] + shift,
            block_starts=self.block_starts[media] + shift,
            block_ends=self.block_ends[media] + shift,
            media_tiles=self.media_tiles[media],
            labels={name: codes[order] for name, codes in self.labels.items()},
        )

    def _select_media(
        self, order: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which pictures come along, in their new order, and how far each moves."""
        if not self.media:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        place = np.full(self.num_pieces, -1)
        place[order] = np.arange(len(order))
        owners = self.media_owners()
        kept = np.flatnonzero(place[owners] >= 0)
        kept = kept[np.argsort(place[owners[kept]], kind="stable")]
        return kept, offsets[place[owners[kept]]] - self.offsets[owners[kept]]

    def recut(self, offsets: np.ndarray) -> Pieces:
        """The same tokens with more borders; `offsets` holds all the present ones."""
        owners = np.searchsorted(self.offsets, offsets[:-1], side="right") - 1
        return Pieces(
            tokens=self.tokens,
            offsets=offsets,
            documents=self.documents[owners],
            begins=self.begins[owners] + offsets[:-1] - self.offsets[owners],
            loss_mask=self.loss_mask,
            media=self.media,
            media_positions=self.media_positions,
            block_starts=self.block_starts,
            block_ends=self.block_ends,
            media_tiles=self.media_tiles,
            labels={name: codes[owners] for name, codes in self.labels.items()},
        )

    @classmethod
    def join(cls, parts: Sequence[Pieces]) -> Pieces:
        """Put pieces one after the other; always a copy, so that no frame is kept alive."""
        bases = offsets_of(np.array([len(part.tokens) for part in parts], np.int64))
        shifted = {
            name: np.concatenate(
                [getattr(part, name) + base for part, base in zip(parts, bases, strict=False)]
            )
            for name in ("media_positions", "block_starts", "block_ends")
        }
        has_mask = any(part.loss_mask is not None for part in parts)
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            offsets=offsets_of(np.concatenate([part.lengths for part in parts])),
            documents=np.concatenate([part.documents for part in parts]),
            begins=np.concatenate([part.begins for part in parts]),
            loss_mask=np.concatenate([_full_mask(part) for part in parts]) if has_mask else None,
            media=[item for part in parts for item in part.media],
            media_tiles=np.concatenate([part.media_tiles for part in parts]),
            labels=join_labels([part.labels for part in parts], [p.num_pieces for p in parts]),
            **shifted,
        )


def _full_mask(pieces: Pieces) -> np.ndarray:
    return np.ones(len(pieces.tokens), np.uint8) if pieces.loss_mask is None else pieces.loss_mask


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Borders of runs of these lengths: 0, then the running sum."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices `start .. start + length` of every run, one after the other."""
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def join_labels(
    parts: Sequence[dict[str, np.ndarray]], counts: Sequence[int]
) -> dict[str, np.ndarray]:
    """Append label columns; a part without one has no value there."""
    names = {name: None for part in parts for name in part}
    pairs = list(zip(parts, counts, strict=True))
    return {
        name: np.concatenate([p[name] if name in p else np.full(n, -1, np.int32) for p, n in pairs])
        for name in names
    }


class LabelTable:
    """One code for each value of a label over all frames; each frame brings its own codes."""

    def __init__(self) -> None:
        self._codes: dict[str, dict[str, int]] = {}

    def intern(self, labels: Labels) -> dict[str, np.ndarray]:
        """Translate a frame's codes into ours."""
        columns = {}
        for name, (codes, values) in labels.items():
            table = self._codes.setdefault(name, {})
            # The last entry stands for code -1, no value.
            ours = [table.setdefault(value, len(table)) for value in values] + [-1]
            columns[name] = np.array(ours, np.int32)[codes]
        return columns

    def values(self) -> dict[str, list[str]]:
        """The values of every label, by code."""
        return {name: list(table) for name, table in self._codes.items()}


def _no_borders() -> tuple[int | None, int | None]:
    return None, None


class Splitter:
    """Cuts documents longer than `limit` tokens, across frames as if there were none.

    What it gives does not depend on where the stream's frames end. A document that is not
    finished holds back at most `limit` tokens.
    """

    def __init__(self, seq_len: int, limit: int | None = None) -> None:
        self.seq_len, self.limit = seq_len, limit or seq_len
        self.labels = LabelTable()
        self.num_documents = 0  # finished ones
        self._held: Pieces | None = None
        self._name, self._base = "", 0
        self._picture_borders: PictureBorders = _no_borders
        self._geometry = PictureGeometry()

    def begin_stream(
        self,
        name: str,
        picture_borders: PictureBorders,
        geometry: PictureGeometry | None = None,
    ) -> None:
        """Name the stream for errors, and say which tokens border a picture, if one comes."""
        assert self._held is None, "a stream ended within a document"
        self._name, self._base = name, self.num_documents
        self._picture_borders = picture_borders
        self._geometry = geometry or PictureGeometry()

    def add(self, frame: Frame) -> Pieces:
        """Take one frame and give its pieces of at most `limit` tokens, in order."""
        documents = self._documents_of(frame)
        pieces = documents.recut(self._cuts(documents))
        last = pieces.num_pieces - 1
        # The open document may be empty so far; then there is nothing to hold.
        if not frame.is_open or last < 0 or pieces.documents[last] != self.num_documents:
            self._held = None
            return pieces
        # A copy: the held part must not keep its frame alive.
        self._held = Pieces.join([pieces.slice(last, last + 1)])
        return pieces.slice(0, last)

    def _documents_of(self, frame: Frame) -> Pieces:
        """The frame's documents, the first one joined to what was held of it; empty ones go."""
        starts, ends = self._blocks(frame)
        numbers = self.num_documents + np.arange(frame.num_documents)
        self.num_documents += frame.num_documents - int(frame.is_open)
        pieces = Pieces(
            tokens=frame.tokens,
            offsets=frame.offsets,
            documents=numbers,
            begins=np.zeros(frame.num_documents, np.int64),
            loss_mask=frame.loss_mask,
            media=frame.media,
            media_positions=frame.media_positions,
            block_starts=starts,
            block_ends=ends,
            media_tiles=frame.media_tiles,
            labels=self.labels.intern(frame.labels),
        )
        held, skip = self._held, np.flatnonzero(pieces.lengths == 0)
        if held is not None:
            pieces = Pieces.join([held, pieces])
            # The first border of the frame is none: the held document goes on.
            skip = np.concatenate([[0], skip[skip > 0]]) + 1
        if not len(skip):
            return pieces
        keep = np.ones(pieces.num_pieces, bool)
        keep[skip] = False
        pieces.offsets = np.append(pieces.offsets[:-1][keep], pieces.offsets[-1])
        pieces.documents, pieces.begins = pieces.documents[keep], pieces.begins[keep]
        pieces.labels = {name: codes[keep] for name, codes in pieces.labels.items()}
        return pieces

    def _blocks(self, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
        """Where each picture's block begins and ends; refuse one that no row can hold."""
        positions = frame.media_positions
        if not len(positions):
            return positions, positions
        start_id, end_id = self._picture_borders()
        starts = np.flatnonzero(frame.tokens == start_id)
        ends = np.flatnonzero(frame.tokens == end_id)
        before = np.searchsorted(starts, positions) - 1
        after = np.searchsorted(ends, positions)
        if start_id is None or end_id is None or before.min() < 0 or after.max() >= len(ends):
            self._damaged("`<|image_start|>` or `<|image_end|>` is missing around a picture")
        starts, ends = starts[before], ends[after] + 1
        owners = np.searchsorted(frame.offsets, positions, side="right") - 1
        inside = (starts >= frame.offsets[owners]) & (ends <= frame.offsets[owners + 1])
        if not inside.all() or (ends[:-1] > starts[1:]).any():
            self._damaged("the tokens of one picture reach into another or leave their document")
        longest = int((ends - starts).argmax())
        length = int(ends[longest] - starts[longest])
        if length > self.seq_len:
            number = self.num_documents - self._base + int(owners[longest]) + 1
            rows, cols = frame.media_tiles[longest]
            most = longest_block(self._geometry)
            raise L4Error(
                f"cannot pack document {number} of `{self._name}` into rows of {self.seq_len}",
                why=f"it holds a picture of {rows} x {cols} tiles, {length} tokens in one block",
                fix=f"pass `--seq-len {length}` or more; {most} holds any picture of this geometry",
            )
        return starts, ends

    def _damaged(self, why: str) -> NoReturn:
        raise L4Error(
            f"cannot pack `{self._name}`",
            why=why,
            fix="run the `l4 tokenize` that wrote it again",
        )

    def _cuts(self, documents: Pieces) -> np.ndarray:
        """Borders of the pieces: every `limit` tokens of a document, before a block if inside."""
        begins, lengths = documents.offsets[:-1], documents.lengths
        is_long = lengths > self.limit
        if not is_long.any():
            return documents.offsets
        has_media = np.zeros(len(lengths), bool)
        has_media[documents.media_owners()] = True
        counts = np.where(is_long & ~has_media, -(-lengths // self.limit), 1)
        steps = ranges(np.zeros(len(counts), np.int64), counts) * self.limit
        cuts = [np.repeat(begins, counts) + steps, documents.offsets[-1:]]
        starts, ends = documents.block_starts.tolist(), documents.block_ends.tolist()
        for i in np.flatnonzero(is_long & has_media):
            begin, end = int(documents.offsets[i]), int(documents.offsets[i + 1])
            cuts.append(np.array(cuts_between(begin, end, self.limit, starts, ends), np.int64))
        return np.sort(np.concatenate(cuts))


def longest_block(geometry: PictureGeometry) -> int:
    """Tokens of the picture with the most tiles: those, one separator each, the global tile, the
    border tokens and `<|image|>`."""
    num_tiles, num_tokens = geometry.max_patches, geometry.tokens_per_tile
    if num_tiles == 1:
        return num_tokens + 3
    return num_tiles * (num_tokens + 1) + num_tokens + 3


def cuts_between(
    begin: int, end: int, limit: int, starts: Sequence[int], ends: Sequence[int]
) -> list[int]:
    """Where to cut a run of tokens so that no part is over `limit` and no block is cut."""
    cuts = []
    while end - begin > limit:
        begin += limit
        block = bisect_left(starts, begin) - 1
        if block >= 0 and ends[block] > begin:
            begin = starts[block]
        cuts.append(begin)
    return cuts
