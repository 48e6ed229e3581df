"""From inputs to documents: walking, cutting, rows; bad input by file and line."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l4cli.data import documents
from l4cli.data.documents import (
    BadInput,
    DocumentReader,
    PictureFile,
    RawRow,
    Report,
    TextPart,
)
from l4cli.data.inputs import InputFormat, Inputs
from l4cli.data.rows import Row, parse_row
from l4cli.errors import L4Error
from l4cli.text import load_tokenizer

BYTES = load_tokenizer("bytes")


def png(width: int = 3, height: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


def read(*names: Path | str, skip_bad: bool = False, **options):
    """All items of some inputs, and the two reports."""
    inputs, report = Inputs([str(name) for name in names], **options), Report(skip_bad)
    reader = DocumentReader(inputs, BYTES.divide, report)
    return [item for unit in reader.units() for item in unit.items], inputs, report


def texts(items) -> list[str]:
    """The plain-text documents among some items, their parts joined."""
    whole: list[str] = []
    for part in items:
        if part.starts:
            whole.append("")
        whole[-1] += part.text
    return whole


def bad(*names: Path | str, **options) -> BadInput:
    with pytest.raises(BadInput) as caught:
        read(*names, **options)
    return caught.value


def row_of(fields: object, folder: Path = Path(), text_key: str | None = None) -> Row:
    data = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return parse_row(RawRow(data, "`x.jsonl` line 7", folder, is_json=True), text_key)


def bad_row(fields: object, folder: Path = Path(), text_key: str | None = None) -> BadInput:
    with pytest.raises(BadInput) as caught:
        row_of(fields, folder, text_key)
    assert "`x.jsonl` line 7" in caught.value.what
    assert caught.value.fix
    return caught.value


# Inputs


def test_folder_is_walked_in_order(tmp_path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", "sub/deeper/d", ".hidden", ".git/config", "z.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "program").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "data").write_bytes(b"text, then\0")
    (tmp_path / "loop").symlink_to(tmp_path)
    items, inputs, _ = read(tmp_path)
    assert texts(items) == ["a.py", "b.txt", "sub/c.md", "sub/deeper/d"]
    skipped = {reason.split()[0]: count for reason, count in inputs.skipped.items()}
    assert skipped == {"hidden": 1, "linked": 1, "pictures": 1, "binary": 2}
    assert inputs.skipped["hidden folders"] == 1


def test_patterns_and_names(tmp_path) -> None:
    for name in ("b.py", "a.py", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "p.PNG").write_bytes(png())
    assert texts(read(f"{tmp_path}/*.py")[0]) == ["a.py", "b.py"]
    assert texts(read(tmp_path / "c.txt", tmp_path / "a.py")[0]) == ["c.txt", "a.py"]
    assert read(f"{tmp_path}/*.PNG")[0] == [PictureFile(tmp_path / "p.PNG")]
    (tmp_path / "[1].txt").write_text("brackets are a name when the file is there")
    assert len(read(tmp_path / "[1].txt")[0]) == 1


@pytest.mark.parametrize("name", ["nowhere.txt", "*.nothing", ""])
def test_missing_input(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(L4Error) as caught:
        Inputs([name]).total_bytes()
    assert f"`{name}`" in caught.value.what


def test_own_output_is_not_read(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    out = tmp_path / "out.tokens"
    out.write_text("not binary yet")
    status = out.stat()
    items, inputs, _ = read(tmp_path, exclude=[(status.st_dev, status.st_ino)])
    assert texts(items) == ["a"]
    assert not +inputs.skipped


def test_total_bytes(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("de")
    assert Inputs([str(tmp_path)]).total_bytes() == 5
    assert Inputs([str(tmp_path), "-"]).total_bytes() is None


# Plain text


def test_text_is_kept_as_it_is(tmp_path) -> None:
    data = "\ufeffone\r\ntwo\r\n\r\n\0 ünï\n".encode()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    assert read(tmp_path / "a", tmp_path / "empty")[0] == [
        TextPart(data.decode()),
        TextPart(""),
    ]


@pytest.mark.parametrize("alphabet", ["ab \n", "αβ, \n/", "字。\n", "x"])
def test_long_text_comes_in_parts(tmp_path, monkeypatch, alphabet) -> None:
    """Parts are bounded, joined they are the file, whatever multi-byte characters blocks cut."""
    monkeypatch.setattr(documents, "READ_BYTES", 100_003)
    rng = np.random.default_rng(0)
    text = "".join(alphabet[i] for i in rng.integers(0, len(alphabet), 1_000_000))
    (tmp_path / "a").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b").write_text("short")
    items = read(tmp_path / "a", tmp_path / "b")[0]
    assert texts(items) == [text, "short"]
    assert [item.starts for item in items].count(True) == 2
    assert [item.ends for item in items].count(True) == 2
    if alphabet != "x":
        assert len(items) > 3


def test_invalid_utf8_names_file_and_line(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\nfour")
    error = bad(path)
    assert f"`{path}` line 3" in error.what
    assert "0xE9" in error.why
    path.write_bytes(b"line\n" * 300_000 + b"\xff")
    assert "line 300001" in bad(path).what
    path.write_bytes(b"line\ncut off \xe2\x82")
    assert "line 2" in bad(path).what


def test_known_binary_files_get_a_hint(tmp_path) -> None:
    path = tmp_path / "a.txt"
    for beginning, hint in (
        (b"\x1f\x8b\x08", "zcat"),
        (b"\xff\xfea\0", "iconv"),
        (b"%PDF\xe2", "pdf"),
    ):
        path.write_bytes(beginning + b"\xff")
        assert hint in bad(path).fix
    path.write_bytes(png())
    assert ".png" in bad(path).fix


def test_bad_files_are_left_out_whole(tmp_path) -> None:
    """A bad byte far into a long file leaves no half of it behind."""
    (tmp_path / "a.txt").write_bytes(b"words of a text\n" * 200_000 + b"\xff")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("good " * 600_000)
    items, _, report = read(tmp_path, skip_bad=True)
    assert texts(items) == ["good " * 600_000]
    assert report.bad == {"invalid UTF-8": 2}
    assert "a.txt" in report.first["invalid UTF-8"].what


def test_unreadable_file(tmp_path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.txt").write_text("b")
    assert "no such file" in bad(tmp_path).why
    items, _, report = read(tmp_path, skip_bad=True)
    assert texts(items) == ["b"]
    assert report.bad == {"unreadable file": 1}


def test_whole_document_tokenizer_refuses_endless_text(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "MAX_WHOLE_CHARS", 2_500_000)
    text = "word " * 600_000
    (tmp_path / "a").write_text(text)

    def whole(parts):
        return iter(["".join(parts)])

    with pytest.raises(BadInput, match="whole"):
        list(DocumentReader(Inputs([str(tmp_path / "a")]), whole, Report()).units())
    assert texts(read(tmp_path / "a")[0]) == [text]


# Rows


def test_formats(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\ntwo\n\xf0\x9f\x98\x80")
    rows = [parse_row(item, None) for item in read(path, format=InputFormat.lines)[0]]
    assert [row.texts for row in rows] == [["one"], [""], ["two"], ["😀"]]
    path = tmp_path / "a.ndjson"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}')
    items = read(path)[0]
    assert [parse_row(item, None).texts for item in items] == [["a"], ["b"]]
    assert items[1].place == f"`{path}` line 4"
    assert texts(read(path, format=InputFormat.text)[0])[0].startswith("\ufeff{")


def test_row_too_long(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(documents, "READ_BYTES", 30)
    path = tmp_path / "a.jsonl"
    good = b'{"text": "x"}\n'
    path.write_bytes(good + b"y" * 1234 + b"\n" + good + b"z" * 101)
    assert "line 2" in bad(path).what
    items, _, report = read(path, skip_bad=True)
    assert [item.place for item in items] == [f"`{path}` line 1", f"`{path}` line 3"]
    assert report.bad == {"row too long": 2}


def test_keys() -> None:
    assert row_of({"text": "a"}).texts == ["a"]
    assert row_of({"body": "a", "text": "b"}, text_key="body").texts == ["a"]
    messages = [{"role": "user", "content": "hi"}]
    assert row_of({"messages": messages}).messages == messages
    assert row_of({"messages": messages, "text": "t"}, text_key="text").texts == ["t"]
    assert row_of({"messages": messages, "text": "t"}, text_key="messages").messages == messages
    row = row_of({"text": "a", "lang": "el", "source": "web", "other": 1})
    assert row.labels == {"lang": "el", "source": "web"}
    assert row_of({"text": "a", "lang": 3, "source": {"url": "x"}}).labels == {}


@pytest.mark.parametrize(
    ("fields", "reason", "why"),
    [
        (b'{"text": "a"', "invalid JSON", "not valid JSON"),
        (b"[" * 100_000, "invalid JSON", "not valid JSON"),
        (b'["text"]', "invalid JSON", "not a JSON object"),
        (b'{"text": "\xff"}', "invalid UTF-8", "0xFF"),
        (b'{"text": "\\ud83d"}', "invalid UTF-8", "surrogate"),
        (b'{"text": "a", "lang": "\\ud83d"}', "invalid UTF-8", "surrogate"),
        ({"body": "a"}, "missing key", "neither"),
        ({"text": None}, "missing key", "neither"),
        ({"text": 3}, "wrong type", "int"),
        ({"text": "a", "messages": [{}]}, "missing key", "both"),
        ({"messages": []}, "bad messages", "a message in it"),
        ({"messages": {"role": "user"}}, "bad messages", "list"),
        ({"messages": ["hi"]}, "bad messages", "not a JSON object"),
        ({"text": "a", "images": "p.png"}, "wrong type", "list of paths"),
        ({"text": "a", "images": [3]}, "wrong type", "list of paths"),
        ({"text": "<|image|><|image|>", "images": ["p.png"]}, "marker count", "2 `<|image|>`"),
        ({"text": "<|image|>", "images": ["p.png"] * 2}, "marker count", "names 2"),
        ({"text": "a", "images": ["q.png"]}, "unreadable picture", "no such file"),
        ({"text": "a", "images": ["."]}, "unreadable picture", "no such file"),
        ({"text": "a", "images": ["a\0b"]}, "unreadable picture", "no such file"),
        ({"text": "a", "images": ["https://x/y.png"]}, "unreadable picture", "network"),
        ({"text": "a", "images": ["data:image/png,abc"]}, "unreadable picture", "base64"),
        ({"text": "a", "images": ["data:image/png;base64,a=b"]}, "unreadable picture", "base64"),
        (
            {"messages": [{"role": "user", "content": "no marker"}], "images": ["p.png"]},
            "marker count",
            "0 `<|image|>`",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "marker count",
            "1 `<|image|>`",
        ),
    ],
)
def test_bad_rows(tmp_path, fields, reason, why) -> None:
    (tmp_path / "p.png").write_bytes(png())
    error = bad_row(fields, tmp_path)
    assert error.reason == reason
    assert why in error.why


def test_missing_key_names_the_keys_there_are() -> None:
    assert "--text-key body" in bad_row({"n": 1, "body": "a"}).fix


def test_markers_take_pictures_in_order(tmp_path) -> None:
    (tmp_path / "p.png").write_bytes(png(1))
    (tmp_path / "q.png").write_bytes(png(2))
    row = row_of({"text": "a<|image|>b<|image|>", "images": ["p.png", "q.png"]}, tmp_path)
    assert row.texts == ["a", "b", ""]
    assert row.pictures == [png(1), png(2)]
    row = row_of({"text": "after", "images": [str(tmp_path / "q.png"), "p.png"]}, tmp_path)
    assert row.texts == ["", "", "after"]
    assert row.pictures == [png(2), png(1)]


def test_markers_are_text_in_rows_without_pictures() -> None:
    assert row_of({"text": "<|image|>"}).texts == ["<|image|>"]
    assert row_of({"text": "<|image|>", "images": []}).texts == ["<|image|>"]
    messages = [{"role": "user", "content": "<|image|> is a marker"}]
    assert row_of({"messages": messages}).messages == messages


def test_pictures_of_chats(tmp_path) -> None:
    for name, width in (("p.png", 1), ("q.png", 2)):
        (tmp_path / name).write_bytes(png(width))
    url = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    fields = {
        "messages": [
            {"role": "user", "content": "see <|image|> and"},
            {"role": "assistant", "content": "yes"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "<|image|>?"},
                    {"type": "image", "path": "p.png"},
                ],
            },
        ],
        "images": ["p.png", "q.png"],
    }
    row = row_of(fields, tmp_path)
    assert row.pictures == [png(1), png(3), png(2), png(1)]
    assert row.messages is not None
    picture = {"type": "image"}
    assert row.messages[0]["content"] == [
        {"type": "text", "text": "see "},
        picture,
        {"type": "text", "text": " and"},
    ]
    assert row.messages[2]["content"] == [picture, picture, {"type": "text", "text": "?"}, picture]


def test_units_are_small_enough_to_share(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 5000)
    inputs = Inputs([str(tmp_path / "a.jsonl")])
    units = list(DocumentReader(inputs, BYTES.divide, Report()).units())
    assert max(len(unit.items) for unit in units) <= documents.UNIT_ROWS
    assert sum(unit.num_bytes for unit in units) == inputs.total_bytes()
