"""From documents to frames: ids, masks and pictures, frame borders, the order of threads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l4cli.data import encoding
from l4cli.data.documents import BadInput, DocumentReader, Report, TextPart
from l4cli.data.encoding import DocumentEncoder, FrameBuilder, Part, encode_units
from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.inputs import InputFormat, Inputs
from l4cli.errors import L4Error
from l4cli.text import Tokenizer, image_block, load_tokenizer, num_tiles, tokenizer_from_files

BYTES = load_tokenizer("bytes")
SMALL = PictureGeometry(image_size=16, patch_size=4, pixel_shuffle_ratio=0.5, max_patches=4)
BOS, EOS = BYTES.bos_id, BYTES.eos_id


def png(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(file, kind)
    return file.getvalue()


def rows(path: Path, *fields: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in fields))
    return path


def frames_of(
    *names: Path | str,
    tokenizer: Tokenizer = BYTES,
    geometry: PictureGeometry = SMALL,
    jobs: int = 1,
    report: Report | None = None,
    **options,
) -> list[Frame]:
    report = report or Report()
    reader = DocumentReader(Inputs([str(n) for n in names], **options), tokenizer.divide, report)
    encoder = DocumentEncoder(tokenizer, geometry)
    frames: list[Frame] = []
    for full, _ in encode_units(reader.units(), encoder, report, jobs):
        frames += full
    for frame in frames:
        assert frame.problem(tokenizer.vocab_size, geometry) is None
    return frames


def documents_of(frames: list[Frame]) -> list[np.ndarray]:
    """The documents, those joined again that run over frames."""
    documents: list[np.ndarray] = []
    goes_on = False
    for frame in frames:
        for i, (start, end) in enumerate(zip(frame.offsets[:-1], frame.offsets[1:], strict=True)):
            tokens = frame.tokens[start:end]
            if i == 0 and goes_on:
                documents[-1] = np.concatenate([documents[-1], tokens])
            else:
                documents.append(tokens)
        goes_on = frame.is_open
    assert not goes_on
    return documents


def plain(text: str, tokenizer: Tokenizer = BYTES) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]


# Text


def test_document_is_bos_tokens_eos(tmp_path) -> None:
    (tmp_path / "a").write_text("hello <|image|> <|eot|>")
    (tmp_path / "b").write_text("")
    (frame,) = frames_of(tmp_path / "a", tmp_path / "b")
    assert frame.offsets.tolist() == [0, 25, 27]
    assert frame.tokens.tolist() == [*plain("hello <|image|> <|eot|>"), BOS, EOS]
    assert frame.loss_mask is None
    assert frame.media == []


def mixed_text(num_chars: int) -> str:
    """Words, code, runs of blanks, digits and marks, scripts without blanks, CRLF."""
    rng = np.random.default_rng(7)
    pieces = ["the ", "quick", "don't ", "I'LL", "\n", "\n\n", "  ", "\t", "\r\n", " \n", "/", "//"]
    pieces += [
        "12345",
        "3.14",
        "(x)",
        "::",
        "->",
        "é",
        "ñandú ",
        "字字。",
        "，",
        "한국어 ",
        "🙂",
        "e\u0301",
    ]
    pieces += [" " * 40, "=" * 30, "\u3000", "\u00a0", "_", "a_b", "ΑΒγ", "\u200d", "#", "\n/"]
    words = [pieces[i] for i in rng.integers(0, len(pieces), num_chars // 2)]
    return "".join(words)


def test_long_documents_have_the_ids_of_the_whole_text(tmp_path, llama4_vocabulary) -> None:
    """Read in blocks, cut into parts, encoded apart: the ids of tiktoken for the whole text."""
    tiktoken = pytest.importorskip("tiktoken")
    from l4cli.text.splitting import LLAMA4_PATTERN

    tokenizer = load_tokenizer(llama4_vocabulary)
    ranks = {tokenizer.token_bytes(i): i for i in range(200_000)}
    whole = tiktoken.Encoding(
        "llama4", pat_str=LLAMA4_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    text = mixed_text(1_500_000)
    path = tmp_path / "a"
    path.write_text(text, encoding="utf-8", newline="")
    (document,) = documents_of(frames_of(path, tokenizer=tokenizer, jobs=2))
    assert document[0] == 200_000
    assert document[-1] == 200_001
    assert np.array_equal(document[1:-1], whole.encode_ordinary(text))


def test_long_documents_run_over_frames(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "FRAME_TOKENS", 10_000)
    text = mixed_text(100_000)
    (tmp_path / "a").write_text("before")
    (tmp_path / "b").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "c").write_text("after")
    frames = frames_of(tmp_path)
    assert len(frames) > 10
    assert max(frame.num_tokens for frame in frames) <= 10_000
    assert [frame.is_open for frame in frames[-2:]] == [True, False]
    joined = [document.tolist() for document in documents_of(frames)]
    assert joined == [plain("before"), plain(text), plain("after")]


def test_frames_hold_few_documents_and_little_media(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "FRAME_DOCUMENTS", 100)
    path = tmp_path / "a"
    path.write_text("x\n" * 250)
    frames = frames_of(path, format=InputFormat.lines)
    assert [frame.num_documents for frame in frames] == [100, 100, 50]
    monkeypatch.setattr(encoding, "FRAME_MEDIA_BYTES", 3 * len(png(9, 9)))
    (tmp_path / "p.png").write_bytes(png(9, 9))
    path = rows(tmp_path / "a.jsonl", *[{"text": "t", "images": ["p.png"]}] * 7)
    assert [len(frame.media) for frame in frames_of(path)] == [3, 3, 1]


@pytest.mark.parametrize("jobs", [2, 5])
def test_order_does_not_depend_on_jobs(tmp_path, monkeypatch, jobs) -> None:
    monkeypatch.setattr(encoding, "FRAME_TOKENS", 50_000)
    rng = np.random.default_rng(0)
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(mixed_text(int(rng.integers(0, 40_000))))
    (tmp_path / "p.png").write_bytes(png(20, 30))
    rows(tmp_path / "r.jsonl", *[{"text": f"{i}", "images": ["p.png"]} for i in range(50)])
    one, many = frames_of(tmp_path), frames_of(tmp_path, jobs=jobs)
    assert len(one) == len(many) > 3
    for a, b in zip(one, many, strict=True):
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.offsets, b.offsets)
        assert a.media == b.media


@pytest.mark.parametrize("jobs", [1, 4])
def test_first_bad_document_in_input_order_is_named(tmp_path, jobs) -> None:
    good = {"text": "x" * 100}
    rows(tmp_path / "a.jsonl", *[good] * 5000, {"texd": 1}, *[good] * 3000, {"texd": 2})
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(BadInput) as caught:
        frames_of(tmp_path / "a.jsonl", tmp_path / "b.txt", jobs=jobs)
    assert "line 5001" in caught.value.what
    report = Report(skip_bad=True)
    frames = frames_of(tmp_path / "a.jsonl", tmp_path / "b.txt", jobs=jobs, report=report)
    assert sum(frame.num_documents for frame in frames) == 8000
    assert report.bad == {"missing key": 2, "invalid UTF-8": 1}
    assert "line 5001" in report.first["missing key"].what


def test_labels_become_codes(tmp_path) -> None:
    path = rows(
        tmp_path / "a.jsonl",
        {"text": "a", "lang": "el", "source": "web"},
        {"text": "b"},
        {"text": "c", "lang": "fr"},
        {"text": "d", "lang": "el"},
    )
    (frame,) = frames_of(path)
    codes, values = frame.labels["lang"]
    assert (codes.tolist(), values) == ([0, -1, 1, 0], ["el", "fr"])
    codes, values = frame.labels["source"]
    assert (codes.tolist(), values) == ([0, -1, -1, -1], ["web"])


def test_labels_go_on_with_their_document() -> None:
    builder = FrameBuilder()
    tokens = np.zeros(encoding.FRAME_TOKENS + 5, np.uint32)
    frames = [*builder.add(Part(tokens, labels={"lang": "el"})), *builder.flush()]
    assert [frame.num_tokens for frame in frames] == [encoding.FRAME_TOKENS, 5]
    assert [frame.is_open for frame in frames] == [True, False]
    assert all(frame.labels["lang"][1] == ["el"] for frame in frames)


def test_tokenizer_without_bos_and_eos(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"hello": 0, "world": 1, "?": 2}
    plain_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    plain_words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = tokenizer_from_files({"tokenizer.json": plain_words.to_str()})
    encoder = DocumentEncoder(tokenizer, SMALL)
    assert encoder.encode(TextPart("hello world")).tokens.tolist() == [0, 1]
    (tmp_path / "p.png").write_bytes(png(5, 5))
    path = rows(tmp_path / "a.jsonl", {"text": "hello", "images": ["p.png"]})
    chat = rows(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "hello"}]})
    for name in (path, chat):
        with pytest.raises(L4Error, match=r"has no `<\|") as caught:
            # Not a bad row, which `--skip-bad` would leave out: no row can be used.
            frames_of(name, tokenizer=tokenizer, report=Report(skip_bad=True))
        assert not isinstance(caught.value, BadInput)


# Pictures and chats


def test_pictures_in_text(tmp_path) -> None:
    """One of 1 tile, one of 2 x 1 (+ 1): block, mask, positions, and the bytes as they were."""
    (tmp_path / "p.png").write_bytes(png(10, 10))
    (tmp_path / "q.jpg").write_bytes(png(10, 30, "JPEG"))
    path = rows(
        tmp_path / "a.jsonl",
        {"text": "a<|image|>bc<|image|>", "images": ["p.png", "q.jpg"]},
        {"text": "plain"},
    )
    (frame,) = frames_of(path)
    k = SMALL.tokens_per_tile
    one, two = image_block(BYTES, 1, 1, k), image_block(BYTES, 2, 1, k)
    first = [BOS, ord("a"), *one, ord("b"), ord("c"), *two, EOS]
    assert frame.tokens.tolist() == [*first, *plain("plain")]
    assert frame.loss_mask is not None
    want = [1, 1, *[0] * len(one), 1, 1, *[0] * len(two), 1, *[1] * 7]
    assert frame.loss_mask.tolist() == want
    assert frame.media == [png(10, 10), png(10, 30, "JPEG")]
    assert frame.media_tiles.tolist() == [[1, 1], [2, 1]]
    assert (frame.tokens[frame.media_positions] == BYTES.patch_id).all()
    assert (frame.tokens[frame.media_positions - 1] != BYTES.patch_id).all()
    tiles = sum(num_tiles(r, c) for r, c in frame.media_tiles.tolist())
    assert (frame.tokens == BYTES.patch_id).sum() == tiles * k


def test_named_picture_is_a_document(tmp_path) -> None:
    (tmp_path / "p.png").write_bytes(png(10, 10))
    (frame,) = frames_of(tmp_path / "p.png")
    assert frame.tokens.tolist() == [BOS, *image_block(BYTES, 1, 1, SMALL.tokens_per_tile), EOS]
    assert frame.media_tiles.tolist() == [[1, 1]]


def test_exif_orientation_decides_the_grid(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (60, 15)).save(file, "JPEG", exif=exif)
    (tmp_path / "p.jpg").write_bytes(file.getvalue())
    (frame,) = frames_of(tmp_path / "p.jpg")
    assert frame.media_tiles.tolist() == [[4, 1]]


def test_chat_rows_have_the_mask_of_the_chat(tmp_path) -> None:
    (tmp_path / "p.png").write_bytes(png(10, 10))
    chat = [
        {"role": "user", "content": "see <|image|>"},
        {"role": "assistant", "content": "ok"},
    ]
    (frame,) = frames_of(rows(tmp_path / "a.jsonl", {"messages": chat, "images": ["p.png"]}))
    assert frame.loss_mask is not None
    targets = frame.tokens[frame.loss_mask == 1]
    assert targets.tolist() == [ord("o"), ord("k"), BYTES.eot_id]
    assert frame.tokens[0] == BOS
    assert frame.tokens[-2:].tolist() == [BYTES.eot_id, EOS]
    assert frame.tokens[frame.media_positions[0]] == BYTES.patch_id


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "bot", "content": "x"}, "`bot`"),
        ({"content": "x"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": [{"type": "audio"}]}, "neither"),
        ({"role": "user", "content": 3}, "neither"),
    ],
)
def test_bad_messages_name_file_and_line(tmp_path, message, why) -> None:
    path = rows(tmp_path / "a.jsonl", {"text": "fine"}, {"messages": [message]})
    with pytest.raises(BadInput) as caught:
        frames_of(path)
    assert f"`{path}` line 2" in caught.value.what
    assert caught.value.reason == "bad messages"
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GIF89a", "unreadable picture"),
        (png(50, 50, "JPEG")[:-30], "unreadable picture"),
        (png(50, 50)[:-40], "unreadable picture"),
        (png(258, 258, "JPEG").replace(b"\1\2\1\2", b"\xff\xff\xff\xff"), "decompression bomb"),
    ],
)
def test_bad_pictures_name_file_and_line(tmp_path, data, reason) -> None:
    (tmp_path / "good.png").write_bytes(png(5, 5))
    (tmp_path / "bad.png").write_bytes(data)
    path = rows(
        tmp_path / "a.jsonl", *({"text": "", "images": [f"{n}.png"]} for n in ("good", "bad"))
    )
    with pytest.raises(BadInput) as caught:
        frames_of(path)
    assert f"`{path}` line 2" in caught.value.what
    assert caught.value.reason == reason
    with pytest.raises(BadInput) as caught:
        frames_of(tmp_path / "bad.png")
    assert f"`{tmp_path / 'bad.png'}`" in caught.value.what


def test_tokens_equal_transformers_processor(tmp_path) -> None:
    """Text and pictures of many sizes through Llama4Processor give the same ids."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    BYTES.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    geometry = PictureGeometry(image_size=56, patch_size=14, max_patches=9)
    processor = Llama4Processor(
        Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=9), theirs, patch_size=14
    )
    rng = np.random.default_rng(5)
    for i in range(25):
        sizes = np.exp(rng.uniform(0, 6, (int(rng.integers(1, 3)), 2))).astype(int).tolist()
        text = "Look: " + " and ".join("<|image|>" for _ in sizes) + " — é\n"
        names = [f"{i}-{j}.png" for j in range(len(sizes))]
        for name, (width, height) in zip(names, sizes, strict=True):
            (tmp_path / name).write_bytes(png(width, height))
        (frame,) = frames_of(
            rows(tmp_path / "a.jsonl", {"text": text, "images": names}), geometry=geometry
        )
        pictures = [Image.open(tmp_path / name) for name in names]
        out = processor(
            text=["<|begin_of_text|>" + text], images=pictures, add_special_tokens=False
        )
        assert frame.tokens.tolist() == [*out["input_ids"][0], EOS], sizes
        num = sum(num_tiles(rows, cols) for rows, cols in frame.media_tiles.tolist())
        assert num == sum(len(tiles) for tiles in out["pixel_values"])
