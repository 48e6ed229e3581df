"""Packing against plain loops: every token once and in order, no cut picture, full rows."""

from __future__ import annotations

import numpy as np
import pytest

from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.packing import BestFitPacker, ConcatPacker, Rows, RowShuffler, best_fit
from l4cli.data.pieces import Splitter, longest_block, offsets_of
from l4cli.errors import L4Error
from l4cli.text import image_block, load_tokenizer

START, END = 1, 2  # ids that border a picture; every other token of a test has its own id


def documents(
    seed: int, num: int, mean: int, with_pictures: bool = False, block: int = 12
) -> list[Frame]:
    """Documents as frames of one; the ids of ordinary tokens count up from 10."""
    rng, frames, first = np.random.default_rng(seed), [], 10
    for _ in range(num):
        length = int(rng.geometric(1 / mean)) + 1
        tokens = np.arange(first, first + length, dtype=np.uint32)
        first += length
        positions, tiles = [], []
        at = int(rng.integers(0, 30))
        while with_pictures and at + block <= length:
            tokens[at], tokens[at + block - 1] = START, END
            positions.append(at + 2)
            tiles.append((1, len(positions)))
            at += block + int(rng.integers(0, 30))
        frames.append(
            Frame(
                tokens,
                np.array([0, length]),
                loss_mask=(tokens % 2).astype(np.uint8) if rng.random() < 0.7 else None,
                media=[b"%d" % tokens[p] for p in positions],
                media_positions=np.array(positions, np.int64),
                media_tiles=np.array(tiles, np.int32).reshape(-1, 2),
                labels={"lang": (np.array([rng.integers(-1, 2)], np.int32), ["el", "en"])},
            )
        )
    return frames


def merge(frames: list[Frame], rng: np.random.Generator) -> list[Frame]:
    """The same documents in frames of random size, some documents going over frame borders."""
    merged: list[Frame] = []
    group: list[Frame] = []
    for i, frame in enumerate(frames):
        cut = int(rng.integers(1, frame.num_tokens)) if frame.num_tokens > 1 else 0
        if rng.random() < 0.3 and cut and not frame.media and i + 1 < len(frames):
            head, tail = part(frame, 0, cut), part(frame, cut, frame.num_tokens)
            merged.append(joined([*group, head], is_open=True))
            group = [tail]
            continue
        group.append(frame)
        if rng.random() < 0.3:
            merged.append(joined(group))
            group = []
    return [*merged, joined(group)] if group else merged


def part(frame: Frame, a: int, b: int) -> Frame:
    mask = None if frame.loss_mask is None else frame.loss_mask[a:b]
    return Frame(frame.tokens[a:b], np.array([0, b - a]), loss_mask=mask, labels=frame.labels)


def joined(frames: list[Frame], is_open: bool = False) -> Frame:
    bases = offsets_of(np.array([frame.num_tokens for frame in frames]))
    masks = [
        np.ones(f.num_tokens, np.uint8) if f.loss_mask is None else f.loss_mask for f in frames
    ]
    shifted = [f.media_positions + base for f, base in zip(frames, bases, strict=False)]
    codes = np.concatenate([frame.labels["lang"][0] for frame in frames])
    return Frame(
        np.concatenate([frame.tokens for frame in frames]),
        bases,
        loss_mask=np.concatenate(masks),
        media=[item for frame in frames for item in frame.media],
        media_positions=np.concatenate(shifted),
        media_tiles=np.concatenate([frame.media_tiles for frame in frames]),
        labels={"lang": (codes, ["el", "en"])},
        is_open=is_open,
    )


def pack(
    frames: list[Frame], packer: type, seq_len: int, window: int, seed: int | None
) -> list[Rows]:
    def rng() -> np.random.Generator | None:
        return None if seed is None else np.random.default_rng(seed)

    splitter = Splitter(seq_len, seq_len if packer is BestFitPacker else window)
    splitter.begin_stream("x.tokens", lambda: (START, END))
    packing, shuffler = packer(seq_len, window, rng()), RowShuffler(window, rng())
    done: list[Rows] = []
    for frame in frames:
        for rows in packing.add(splitter.add(frame)):
            done += shuffler.add(rows)
    for rows in packing.finish():
        done += shuffler.add(rows)
    return done + list(shuffler.finish())


def check(rows: Rows, frames: list[Frame], seq_len: int) -> None:
    """The plain loop: read every row back token by token, and compare with the documents."""
    index = {int(t): (d, i) for d, f in enumerate(frames) for i, t in enumerate(f.tokens) if t > 2}
    seen: list[list[int]] = [[] for _ in frames]
    pictures, label = 0, 0
    assert rows.input_ids.shape == rows.document_ids.shape == (rows.num_rows, seq_len)
    for r in range(rows.num_rows):
        ids, numbers = rows.input_ids[r], rows.document_ids[r]
        length = int((numbers > 0).sum())
        assert (numbers[length:] == 0).all()
        assert (ids[length:] == 0).all()
        assert rows.num_documents[r] == numbers.max()
        t = 0
        for number in range(1, int(numbers.max()) + 1):
            run = ids[t : t + int((numbers == number).sum())]
            assert (numbers[t : t + len(run)] == number).all()
            # A run may begin with a picture's first token, which is not unique; its next one is.
            ahead = 0 if run[0] > 2 else 1
            document, at = index[int(run[ahead])]
            at -= ahead
            frame = frames[document]
            np.testing.assert_array_equal(run, frame.tokens[at : at + len(run)])
            if rows.loss_mask is not None:
                want = np.ones(frame.num_tokens) if frame.loss_mask is None else frame.loss_mask
                np.testing.assert_array_equal(
                    rows.loss_mask[r, t : t + len(run)], want[at : at + len(run)]
                )
            assert (run == START).sum() == (run == END).sum(), "a picture was cut"
            assert rows.labels["lang"][label] >= -1
            want_lang = frame.labels["lang"]
            code = int(want_lang[0][0])
            assert (rows.labels["lang"][label] == -1) == (code == -1)
            label += 1
            seen[document].extend(range(at, at + len(run)))
            t += len(run)
        for m in np.flatnonzero(rows.media_rows == r):
            position = int(rows.media_positions[m])
            assert rows.media[m] == b"%d" % ids[position]
            document, at = index[int(ids[position])]
            which = frames[document].media_positions.tolist().index(at)
            np.testing.assert_array_equal(rows.media_tiles[m], frames[document].media_tiles[which])
            pictures += 1
    for frame, positions in zip(frames, seen, strict=True):
        assert sorted(positions) == list(range(frame.num_tokens))
    assert pictures == sum(len(frame.media) for frame in frames)
    assert label == len(rows.labels["lang"])
    assert (np.diff(rows.media_rows) >= 0).all()


@pytest.mark.parametrize("packer", [BestFitPacker, ConcatPacker])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("with_pictures", [True, False])
def test_every_token_once_in_order_and_no_picture_cut(packer, shuffle, with_pictures) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        seq_len = int(rng.integers(12, 90))
        window = seq_len * int(rng.integers(1, 12))
        frames = documents(
            seed, int(rng.integers(1, 120)), int(rng.integers(3, 120)), with_pictures
        )
        rows = Rows.join(pack(frames, packer, seq_len, window, seed if shuffle else None))
        check(rows, frames, seq_len)


@pytest.mark.parametrize("packer", [BestFitPacker, ConcatPacker])
@pytest.mark.parametrize("shuffle", [True, False])
def test_frame_borders_change_nothing(packer, shuffle) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        frames = documents(seed, 80, 50, with_pictures=True)
        plain = pack([joined([f]) for f in frames], packer, 40, 600, 3 if shuffle else None)
        merged = pack(merge(frames, rng), packer, 40, 600, 3 if shuffle else None)
        a, b = Rows.join(plain), Rows.join(merged)
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.document_ids, b.document_ids)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
        np.testing.assert_array_equal(a.labels["lang"], b.labels["lang"])
        assert a.media == b.media


def test_best_fit_is_the_plain_loop() -> None:
    """As many rows, filled alike, as when each piece looks for its row one at a time."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        capacity = int(rng.integers(1, 200))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 400)))
        if seed % 2:
            lengths = np.minimum(lengths, rng.geometric(0.05, len(lengths)))
        rooms: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [room for room in rooms if room >= length]
            if fitting:
                rooms[rooms.index(min(fitting))] -= length
            else:
                rooms.append(capacity - length)
        rows_of = best_fit(lengths, capacity, rng.permutation(len(lengths)))
        filled = np.bincount(rows_of, lengths)
        assert sorted((capacity - filled).astype(int).tolist()) == sorted(rooms)


@pytest.mark.parametrize(("seq_len", "mean"), [(256, 40), (1024, 300), (1024, 3000), (4096, 900)])
def test_rows_are_full(seq_len, mean) -> None:
    """Ordinary text: lengths over two orders of magnitude, several windows."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(np.log(mean), 0.8, 1_500_000 // mean).astype(np.int64))
    frame = Frame(np.zeros(int(lengths.sum()), np.uint32), offsets_of(lengths))
    rows = Rows.join(pack([frame], BestFitPacker, seq_len, 1 << 18, 0))
    assert (rows.document_ids > 0).mean() >= 0.99


def test_concat_is_the_plain_loop() -> None:
    frames = documents(5, 60, 33)
    rows = Rows.join(pack(frames, ConcatPacker, 50, 200, None))
    tokens = np.concatenate([frame.tokens for frame in frames])
    np.testing.assert_array_equal(rows.input_ids[rows.document_ids > 0], tokens)
    assert (rows.document_ids[:-1] > 0).all()
    owners = np.repeat(np.arange(len(frames)), [frame.num_tokens for frame in frames])
    for r, start in enumerate(range(0, len(tokens), 50)):
        _, first = np.unique(owners[start : start + 50], return_index=True)
        numbers = np.searchsorted(first, np.arange(min(50, len(tokens) - start)), side="right")
        np.testing.assert_array_equal(rows.document_ids[r, : len(numbers)], numbers)


def test_concat_keeps_one_document_over_windows_whole() -> None:
    """A document longer than the window is cut at row ends only."""
    frames = documents(0, 1, 2) + documents(1, 1, 3000)
    frames[1].tokens += 1000
    rows = Rows.join(pack(frames, ConcatPacker, 64, 128, None))
    assert rows.num_documents.tolist() == [2] + [1] * (rows.num_rows - 1)


def test_concat_pads_before_a_picture() -> None:
    (frame,) = documents(0, 1, 2)
    tokens = np.arange(10, 50, dtype=np.uint32)
    tokens[[12, 23]] = START, END
    frame = Frame(
        tokens,
        np.array([0, 40]),
        media=[b"24"],
        media_positions=np.array([14]),
        media_tiles=np.array([[1, 1]], np.int32),
    )
    rows = Rows.join(pack([frame], ConcatPacker, 16, 64, None))
    assert (rows.document_ids > 0).sum(axis=1).tolist() == [12, 16, 12]
    assert rows.media_rows.tolist() == [1]
    assert rows.media_positions.tolist() == [2]


def test_shuffling_moves_documents_and_rows_but_loses_none() -> None:
    frames = documents(7, 3000, 20)
    stream = [joined(frames[i : i + 100]) for i in range(0, 3000, 100)]
    order = {}
    for seed in (None, 0, 1):
        rows = Rows.join(pack(stream, BestFitPacker, 64, 1 << 14, seed))
        order[seed] = rows.input_ids[:, 0].astype(np.int64)
    assert abs(np.corrcoef(order[None], np.arange(len(order[None])))[0, 1]) > 0.95
    assert abs(np.corrcoef(order[0], np.arange(len(order[0])))[0, 1]) < 0.9
    assert order[0].tolist() != order[1].tolist()
    rows = Rows.join(pack(stream, BestFitPacker, 64, 1 << 14, 0))
    again = rows.input_ids[:, 0]
    assert again.tolist() == order[0].tolist()
    # Neighbours in the input do not stay neighbours.
    owner = np.zeros(100_000, np.int64)
    for i, frame in enumerate(frames):
        owner[frame.tokens] = i
    rank = np.empty(len(frames), np.int64)
    rank[owner[rows.input_ids[:, 0]]] = np.arange(rows.num_rows)
    assert np.median(np.abs(np.diff(rank))) > rows.num_rows / 20


def test_memory_is_bounded_by_the_window() -> None:
    """However long the input, what is held stays a small multiple of the window."""
    window, seq_len = 4096, 128
    splitter, packer = Splitter(seq_len), BestFitPacker(seq_len, window, np.random.default_rng(0))
    # Pieces that never pair up: each fills 60% of a row.
    for i in range(50):
        frame = Frame(np.full(77 * 100, i, np.uint32), np.arange(0, 7701, 77))
        for _ in packer.add(splitter.add(frame)):
            held = sum(len(part.tokens) for part in packer._window.parts)
            assert held <= window // 2
    big = Frame(np.zeros(1_000_000, np.uint32), np.array([0, 1_000_000]), is_open=True)
    splitter.add(big)
    assert splitter._held is not None
    assert len(splitter._held.tokens) <= seq_len
    assert splitter._held.tokens.base is None, "the held part keeps its frame alive"


def test_heavy_pictures_fill_a_window_before_their_tokens_fill_a_row() -> None:
    frames = documents(0, 40, 60, with_pictures=True)
    for frame in frames:
        frame.media = [item + bytes(20_000) for item in frame.media]
    for packer in (BestFitPacker, ConcatPacker):
        for seed in (None, 0):
            rows = Rows.join(pack(frames, packer, 32, 64, seed))
            assert len(rows.media) == sum(len(frame.media) for frame in frames)
            assert (rows.document_ids > 0).sum() == sum(frame.num_tokens for frame in frames)


def test_empty_documents_and_streams_have_no_rows() -> None:
    for packer in (BestFitPacker, ConcatPacker):
        assert pack([], packer, 8, 32, 0) == []
        empty = Frame(np.zeros(0, np.uint32), np.array([0, 0, 0]))
        assert pack([empty], packer, 8, 32, 0) == []
    mixed = Frame(np.arange(4, dtype=np.uint32), np.array([0, 0, 3, 3, 4, 4]), is_open=True)
    rest = Frame(np.arange(4, 6, dtype=np.uint32), np.array([0, 2]))
    rows = Rows.join(pack([mixed, rest], BestFitPacker, 8, 32, None))
    # The open document had no token yet, so that it begins with the second frame.
    assert rows.input_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert rows.document_ids[0].tolist() == [1, 1, 1, 2, 3, 3, 0, 0]


def test_picture_longer_than_a_row_names_the_document_and_the_fix() -> None:
    frames = [*documents(0, 6, 5), *documents(3, 1, 400, with_pictures=True, block=40)]
    assert frames[-1].media
    with pytest.raises(L4Error) as caught:
        pack(frames, BestFitPacker, 39, 400, 0)
    assert "document 7 of `x.tokens`" in caught.value.what
    assert "40 tokens" in caught.value.why
    assert "--seq-len 40" in caught.value.fix
    assert "2467" in caught.value.fix


def test_longest_block_is_what_a_tokenizer_writes() -> None:
    tokenizer = load_tokenizer("bytes")
    for geometry in (
        PictureGeometry(),
        PictureGeometry(image_size=32, patch_size=8, max_patches=1),
        PictureGeometry(image_size=32, patch_size=8, max_patches=6),
    ):
        grids = [
            (r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= geometry.max_patches
        ]
        blocks = [image_block(tokenizer, r, c, geometry.tokens_per_tile) for r, c in grids]
        assert longest_block(geometry) == max(len(block) for block in blocks)


def test_pictures_without_borders_are_refused() -> None:
    (frame,) = documents(3, 1, 400, with_pictures=True)
    assert frame.media
    for at in (START, END):
        damaged = Frame(**{**vars(frame), "tokens": np.where(frame.tokens == at, 9, frame.tokens)})
        with pytest.raises(L4Error, match="image_start"):
            pack([damaged], BestFitPacker, 64, 64, 0)
    splitter = Splitter(64)
    splitter.begin_stream("x", lambda: (None, None))
    with pytest.raises(L4Error, match="image_start"):
        splitter.add(frame)
