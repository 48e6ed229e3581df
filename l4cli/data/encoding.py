"""Turn documents into token frames, on all cores, in the order they came.

in: `Unit`s of work; out: `Frame`s of bounded size, the same whatever the number of threads
source: DESIGN.md section 2 (a document is BOS, its tokens, EOS); HF Llama4Processor for pictures
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from l4cli.data.documents import BadInput, Item, PictureFile, Report, TextPart, Unit, VideoFile
from l4cli.data.frame import Frame, Labels
from l4cli.data.geometry import PictureGeometry
from l4cli.data.media import PictureError, grid_of, open_picture
from l4cli.data.rows import Row, parse_row, read_frames, read_picture
from l4cli.data.stream import FRAME_MEDIA_BYTES, FRAME_TOKENS
from l4cli.data.video import Sampling, encode_film
from l4cli.errors import L4Error
from l4cli.text import Tokenizer, image_block, render_chat

FRAME_DOCUMENTS = 1 << 16
_NO_TOKENS = np.zeros(0, np.uint32)

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass
class Part:
    """An encoded document, or a piece of a long one."""

    tokens: np.ndarray  # uint32 [n]
    starts: bool = True
    ends: bool = True
    loss_mask: np.ndarray | None = None  # uint8 [n]; None: every token counts
    media: list[bytes] = field(default_factory=list)
    media_positions: list[int] = field(default_factory=list)
    media_tiles: list[tuple[int, int]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    videos: Counter[str] = field(default_factory=Counter)  # as in `Report`


class DocumentEncoder:
    """Encodes one item at a time; threads can share it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        geometry: PictureGeometry,
        text_key: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.tokenizer, self.geometry, self.text_key = tokenizer, geometry, text_key
        self.sampling = sampling or Sampling()
        self._can_picture = self._can_chat = False
        self._begin, self._end = (
            _NO_TOKENS if i is None else np.array([i], np.uint32)
            for i in (tokenizer.bos_id, tokenizer.eos_id)
        )

    def encode(self, item: Item) -> Part:
        """Encode one item. raises: BadInput with the file and line"""
        if isinstance(item, TextPart):
            ids = [self._begin] if item.starts else []
            ids += [self.tokenizer.encode(item.text)]
            ids += [self._end] if item.ends else []
            return Part(np.concatenate(ids), item.starts, item.ends)
        videos = Counter[str]()

        def frames_of(source: Path | bytes) -> list[bytes]:
            film, frames = encode_film(source, self.sampling, self.geometry)
            videos.update(videos=1, frames=len(frames), spread=int(film.is_spread))
            return frames

        if isinstance(item, PictureFile):
            place = f"`{item.path}`"
            row = Row(texts=["", ""], pictures=[read_picture(item.path, place)])
        elif isinstance(item, VideoFile):
            place = f"`{item.path}`"
            frames = read_frames(item.path, place, frames_of)
            row = Row(texts=[""] * (len(frames) + 1), pictures=frames)
        else:
            place, row = item.place, parse_row(item, self.text_key, frames_of)
        self._check_vocabulary(row)
        grids = [self._grid(picture, place) for picture in row.pictures]
        try:
            part = self._text(row, grids) if row.messages is None else self._chat(row, grids)
        except L4Error as error:
            # The row is at fault: the vocabulary was found good for it.
            reason = "bad messages" if row.messages is not None else "text not encodable"
            why = f"{error.what}: {error.why}"
            raise BadInput(place, reason, why, error.fix) from error
        part.labels, part.media, part.media_tiles = row.labels, row.pictures, grids
        part.videos = videos
        return part

    def _check_vocabulary(self, row: Row) -> None:
        """Refuse a tokenizer without picture or chat tokens; no row is to blame for that."""
        if row.pictures and not self._can_picture:
            image_block(self.tokenizer, 1, 2, 1)
            self._can_picture = True
        if row.messages is not None and not self._can_chat:
            hello = [{"role": "user", "content": "hello"}]
            render_chat(self.tokenizer, hello, add_generation_prompt=False)
            self._can_chat = True

    def _grid(self, picture: bytes, place: str) -> tuple[int, int]:
        """Decode a picture wholly, so that training never meets a damaged one."""
        try:
            with open_picture(picture) as image:
                return grid_of(*image.size, self.geometry)
        except PictureError as error:
            raise BadInput(place, error.reason, error.why, error.fix) from error

    def _text(self, row: Row, grids: list[tuple[int, int]]) -> Part:
        ids, mask, positions, length = [self._begin], [], [], len(self._begin)
        for i, text in enumerate(row.texts):
            if i > 0:
                block = image_block(self.tokenizer, *grids[i - 1], self.geometry.tokens_per_tile)
                mask.append((length, length + len(block)))
                positions.append(length + int(np.argmax(block == self.tokenizer.patch_id)))
                ids.append(block)
                length += len(block)
            if text:
                ids.append(self.tokenizer.encode(text))
                length += len(ids[-1])
        part = Part(np.concatenate([*ids, self._end]), media_positions=positions)
        if mask:
            part.loss_mask = np.ones(len(part.tokens), np.uint8)
            for start, end in mask:  # nobody predicts a picture's placeholders
                part.loss_mask[start:end] = 0
        return part

    def _chat(self, row: Row, grids: list[tuple[int, int]]) -> Part:
        assert row.messages is not None
        chat = render_chat(
            self.tokenizer,
            row.messages,
            add_generation_prompt=False,
            image_grids=grids,
            tokens_per_tile=self.geometry.tokens_per_tile,
        )
        # The answer ends with its end of turn; the end of the document is no target.
        return Part(
            np.concatenate([chat.ids, self._end]),
            loss_mask=np.concatenate([chat.loss_mask, np.zeros(len(self._end), np.uint8)]),
            media_positions=chat.media_positions.tolist(),
        )


class FrameBuilder:
    """Gathers parts into frames, cutting long documents where a frame is full."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._num_tokens = self._num_media_bytes = self._num_documents = 0

    def add(self, part: Part) -> Iterator[Frame]:
        """Take one part; frames come out as they fill."""
        media_bytes = sum(map(len, part.media))
        if self._parts and (
            self._num_tokens + len(part.tokens) > FRAME_TOKENS
            or self._num_media_bytes + media_bytes > FRAME_MEDIA_BYTES
            or self._num_documents >= FRAME_DOCUMENTS
        ):
            yield from self.flush()
        while len(part.tokens) > FRAME_TOKENS and not part.media:
            first, part = _split(part, FRAME_TOKENS)
            self._parts.append(first)
            yield from self.flush()
        self._parts.append(part)
        self._num_tokens += len(part.tokens)
        self._num_media_bytes += media_bytes
        self._num_documents += part.ends

    def flush(self) -> Iterator[Frame]:
        """Give what is there as a frame, if anything is."""
        parts, self._parts = self._parts, []
        self._num_tokens = self._num_media_bytes = self._num_documents = 0
        if parts:
            yield _frame_of(parts)


def _split(part: Part, size: int) -> tuple[Part, Part]:
    mask = part.loss_mask
    first = Part(part.tokens[:size], part.starts, False, None if mask is None else mask[:size])
    rest = Part(part.tokens[size:], False, part.ends, None if mask is None else mask[size:])
    first.labels = rest.labels = part.labels
    return first, rest


def _frame_of(parts: list[Part]) -> Frame:
    ends = np.cumsum([len(part.tokens) for part in parts])
    # The first part opens a document in any case, be it the rest of one.
    opens = [i == 0 or part.starts for i, part in enumerate(parts)]
    first_parts = [part for part, is_first in zip(parts, opens, strict=True) if is_first]
    starts = (ends - [len(part.tokens) for part in parts])[opens]
    mask = None
    if any(part.loss_mask is not None for part in parts):
        masks = [_mask_of(part) for part in parts]
        mask = np.concatenate(masks)
    positions = [
        int(end) - len(part.tokens) + position
        for part, end in zip(parts, ends, strict=True)
        for position in part.media_positions
    ]
    tiles = [grid for part in parts for grid in part.media_tiles]
    return Frame(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.append(starts, ends[-1]).astype(np.int64),
        loss_mask=mask,
        media=[item for part in parts for item in part.media],
        media_positions=np.array(positions, np.int64),
        media_tiles=np.array(tiles, np.int32).reshape(-1, 2),
        labels=_labels_of(first_parts),
        is_open=not parts[-1].ends,
    )


def _mask_of(part: Part) -> np.ndarray:
    return np.ones(len(part.tokens), np.uint8) if part.loss_mask is None else part.loss_mask


def _labels_of(parts: list[Part]) -> Labels:
    labels: Labels = {}
    for name in sorted({name for part in parts for name in part.labels}):
        codes: dict[str, int] = {}
        given = [
            codes.setdefault(part.labels[name], len(codes)) if name in part.labels else -1
            for part in parts
        ]
        labels[name] = (np.array(given, np.int32), list(codes))
    return labels


def encode_units(
    units: Iterable[Unit], encoder: DocumentEncoder, report: Report, jobs: int
) -> Iterator[tuple[list[Frame], int]]:
    """Encode all units on `jobs` threads; gives the frames that are full, and bytes of input done.

    raises: BadInput for the first bad document in input order, unless they are skipped
    """
    builder = FrameBuilder()

    def encode(unit: Unit) -> tuple[list[Part], list[BadInput], int]:
        parts, bad = [], []
        for item in unit.items:
            try:
                parts.append(encoder.encode(item))
            except BadInput as error:
                bad.append(error)
                if not report.skip_bad:
                    break
        return parts, bad, unit.num_bytes

    for parts, bad, num_bytes in _in_order(units, encode, jobs):
        for error in bad:
            report.leave_out(error)
        for part in parts:
            report.videos += part.videos
        yield [frame for part in parts for frame in builder.add(part)], num_bytes
    yield list(builder.flush()), 0


def _in_order(items: Iterable[In], work: Callable[[In], Out], jobs: int) -> Iterator[Out]:
    """Run `work` on threads, a bounded number of items ahead; results come in order."""
    if jobs == 1:
        yield from map(work, items)
        return
    pool, running = ThreadPoolExecutor(jobs), deque[Future[Out]]()
    source, is_exhausted = iter(items), False
    failure: L4Error | None = None
    try:
        while running or not is_exhausted:
            while not is_exhausted and len(running) < 2 * jobs:
                try:
                    running.append(pool.submit(work, next(source)))
                except StopIteration:
                    is_exhausted = True
                except L4Error as error:
                    # What was read before it comes first, with errors of its own.
                    failure, is_exhausted = error, True
            if running:
                yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure
