"""The token stream: round trips, `cat`, pipes, and every way in which a stream can be bad."""

from __future__ import annotations

import io
import json
import os
import struct
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from safetensors import safe_open

from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.stream import StreamWriter, read_stream
from l4cli.errors import L4Error

GEOMETRY = PictureGeometry(image_size=28, patch_size=7, pixel_shuffle_ratio=0.5, max_patches=4)


@dataclass
class SmallVocabulary:
    """Only what a stream asks of a tokenizer."""

    vocab_size: int = 300
    fingerprint: str = "f" * 64
    text: dict[str, str] = field(default_factory=lambda: {"tokenizer.json": '{"a": "ä\\n"}'})

    def files(self) -> dict[str, str]:
        return self.text


def text_frame(seed: int = 0, num_documents: int = 5, is_open: bool = False) -> Frame:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, num_documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(0, 300, offsets[-1]).astype(np.uint32)
    return Frame(tokens, offsets, is_open=is_open)


def picture_frame() -> Frame:
    """One document of text, one with pictures of 1 tile and of 1 x 2 (+ 1) tiles, with labels."""
    tokens = np.arange(40, dtype=np.uint32)
    return Frame(
        tokens,
        np.array([0, 8, 40]),
        loss_mask=(tokens % 2).astype(np.uint8),
        media=[b"first", b""],
        media_positions=np.array([9, 20]),
        media_tiles=np.array([[1, 1], [1, 2]], np.int32),
        labels={
            "lang": (np.array([-1, 0], np.int32), ["ελ"]),
            "source": (np.array([1, 0], np.int32), ["a", "b"]),
        },
    )


def stream_of(
    *frames: Frame, tokenizer: SmallVocabulary | None = None, close: bool = True
) -> bytes:
    file = io.BytesIO()
    writer = StreamWriter(file, tokenizer or SmallVocabulary(), GEOMETRY)
    for frame in frames:
        writer.write(frame)
    if close:
        writer.close()
    return file.getvalue()


def read(data: bytes) -> list[Frame]:
    return list(read_stream(io.BytesIO(data), "x.tokens"))


def error_of(data: bytes) -> L4Error:
    with pytest.raises(L4Error) as caught:
        read(data)
    return caught.value


def assert_equal(a: Frame, b: Frame) -> None:
    for name in ("tokens", "offsets", "media_positions", "media_tiles"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert (a.loss_mask is None) == (b.loss_mask is None)
    if a.loss_mask is not None:
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
    assert a.media == b.media
    assert a.is_open == b.is_open
    assert a.labels.keys() == b.labels.keys()
    for name, (codes, values) in a.labels.items():
        np.testing.assert_array_equal(codes, b.labels[name][0])
        assert values == b.labels[name][1]


def test_round_trip() -> None:
    frames = [text_frame(0), picture_frame(), text_frame(1, is_open=True), text_frame(2)]
    reader = read_stream(io.BytesIO(stream_of(*frames)), "x.tokens")
    assert reader.header.vocab_size == 300
    assert reader.header.geometry == GEOMETRY
    assert reader.header.tokenizer_files == {"tokenizer.json": '{"a": "ä\\n"}'}
    for want, got in zip(frames, reader, strict=True):
        assert_equal(want, got)
    # The open document is one document in two frames.
    assert reader.totals.documents == 5 + 2 + 4 + 5
    assert reader.totals.tokens == sum(frame.num_tokens for frame in frames)
    assert (reader.totals.media, reader.totals.frames) == (2, 4)


def test_stream_without_documents() -> None:
    reader = read_stream(io.BytesIO(stream_of()), "x.tokens")
    assert list(reader) == []
    assert reader.header.fingerprint == "f" * 64


def test_same_frames_same_bytes() -> None:
    assert len({stream_of(text_frame(), picture_frame()) for _ in range(20)}) == 1


def test_each_frame_is_a_safetensors_file(tmp_path) -> None:
    """Cut the stream by the lengths it states; the library itself opens every piece."""
    data, pieces = stream_of(text_frame(), picture_frame()), []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        fields = json.loads(data[8 : 8 + size])
        fields.pop("__metadata__")
        end = 8 + size + max(f["data_offsets"][1] for f in fields.values())
        pieces.append(data[:end])
        data = data[end:]
    assert len(pieces) == 3
    for i, piece in enumerate(pieces):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(piece)
        with safe_open(path, "np") as file:
            assert file.metadata()["format"] == "l4-tokens"
            assert ("tokenizer" in file.keys()) == (i == 0)  # noqa: SIM118
            assert ("end" in file.metadata()) == (i == 2)


def test_joined_streams_read_as_one() -> None:
    data = stream_of(text_frame(0)) + stream_of() + stream_of(text_frame(1), text_frame(2))
    for want, got in zip((text_frame(i) for i in range(3)), read(data), strict=True):
        assert_equal(want, got)


def test_join_of_other_tokenizer_is_refused() -> None:
    other = SmallVocabulary(fingerprint="0" * 64)
    error = error_of(stream_of(text_frame()) + stream_of(text_frame(), tokenizer=other))
    assert "cannot join" in error.what
    assert "000000000000" in error.why


def test_join_of_other_geometry_is_refused() -> None:
    file = io.BytesIO()
    StreamWriter(file, SmallVocabulary(), PictureGeometry()).close()
    error = error_of(stream_of(text_frame()) + file.getvalue())
    assert "336" in error.why
    assert "--preset" in error.fix


def test_pipe_is_read_without_seeking() -> None:
    frames = [text_frame(i, 2000) for i in range(5)]
    data = stream_of(*frames)
    read_end, write_end = os.pipe()

    def produce() -> None:
        with os.fdopen(write_end, "wb", buffering=0) as pipe:
            for i in range(0, len(data), 777):
                pipe.write(data[i : i + 777])

    thread = threading.Thread(target=produce)
    thread.start()
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        for want, got in zip(frames, read_stream(pipe, "stdin"), strict=True):
            assert_equal(want, got)
    thread.join()


def test_cut_at_any_byte_is_an_error_that_names_it() -> None:
    data = stream_of(picture_frame(), text_frame())
    for size in range(8, len(data)):
        error = error_of(data[:size])
        assert f"cut off at byte {size}" in error.why, size
    for size in range(8):
        assert "empty" in error_of(data[:size]).why or "too short" in error_of(data[:size]).why


def test_killed_producer_followed_by_another_stream() -> None:
    killed = stream_of(text_frame(), close=False)
    error = error_of(killed + stream_of(text_frame()))
    assert f"cut off at byte {len(killed)}" in error.why


def test_open_document_without_its_end() -> None:
    file = io.BytesIO()
    writer = StreamWriter(file, SmallVocabulary(), GEOMETRY)
    writer.write(text_frame(is_open=True))
    with pytest.raises(AssertionError):
        writer.close()


def test_any_damaged_byte_never_crashes() -> None:
    """Flip bytes anywhere: frames come out, or an L4Error; never another exception."""
    good = stream_of(picture_frame(), text_frame())
    rng = np.random.default_rng(0)
    for _ in range(1500):
        data = bytearray(good)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            read(bytes(data))
        except L4Error as error:
            assert error.fix  # noqa: PT017


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: f.tokens.__setitem__(3, 300), "token id 300"),
        (lambda f: f.offsets.__setitem__(1, 50), "`offsets`"),
        (lambda f: f.offsets.__setitem__(0, 1), "`offsets`"),
        (lambda f: f.media_positions.__setitem__(0, 38), "media_positions"),
        (lambda f: f.media_positions.__setitem__(0, 17), "placeholders"),
        (lambda f: f.media_positions.__setitem__(0, 4), ""),
        (lambda f: f.media_positions.__setitem__(0, 5), "placeholders"),
        (lambda f: f.media_positions.__setitem__(1, 29), "placeholders"),
        (lambda f: f.media_tiles.__setitem__((0, 0), 0), "`media_tiles`"),
        (lambda f: f.media_tiles.__setitem__((0, 0), 5), "`media_tiles`"),
        (lambda f: f.labels["lang"][0].__setitem__(0, 1), "label `lang`"),
    ],
)
def test_bad_values_are_refused(change, why) -> None:
    frame = picture_frame()
    change(frame)
    file = io.BytesIO()
    writer = StreamWriter(file, SmallVocabulary(), GEOMETRY)
    labels = json.dumps({name: values for name, (_, values) in frame.labels.items()})
    writer._put(frame.to_tensors(), {"labels": labels})  # as a writer that checks nothing
    writer.totals.add(frame)
    writer.close()
    data = file.getvalue()
    if not why:
        assert_equal(frame, read(data)[0])
        return
    error = error_of(data)
    assert why in error.why
    assert "byte 0" in error.why


def test_foreign_files() -> None:
    assert "does not begin a frame" in error_of(b"Just a text, nothing more than that.").why
    assert "empty" in error_of(b"").why
    from safetensors.numpy import save

    error = error_of(save({"weight": np.zeros(3, np.float32)}))
    assert "not a token stream" in error.why
    whole = stream_of(text_frame())
    assert f"byte {len(whole)}" in error_of(whole + b"garbage that follows").why


def test_huge_sizes_in_a_header_allocate_nothing() -> None:
    text = b'{"tokens":{"dtype":"U32","shape":[9],"data_offsets":[0,%d]}}'
    for size in (1 << 30, 1 << 60):
        header = text % size
        error = error_of(struct.pack("<Q", len(header)) + header + b"abc")
        assert "cut off" in error.why or "larger" in error.why
    assert "does not begin" in error_of(struct.pack("<Q", 1 << 40) + b"{}").why


def test_other_version_is_refused() -> None:
    data = stream_of(text_frame()).replace(b'"version":"1"', b'"version":"2"')
    assert "version" in error_of(data).why
