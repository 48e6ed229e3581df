"""What one row says: a text or a chat, the pictures it names, its labels.

in: a line of JSON, or of text; out: `Row`, its markers and pictures matched one to one
source: OpenAI's chat format (`messages`, `image_url`); DESIGN.md section 2 for markers
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from l4cli.data.documents import BadInput, RawRow
from l4cli.data.media import MAX_MEDIA_BYTES

MARKER = "<|image|>"
LABELS = ("lang", "source")
MAX_LABEL_CHARS = 256
_FIX_ROW = "repair the row, or pass `--skip-bad` to leave such rows out"


@dataclass
class Row:
    """One document: either the texts between its pictures, or the messages of a chat."""

    texts: list[str] = field(default_factory=list)  # one more than pictures
    messages: list[dict[str, Any]] | None = None
    pictures: list[bytes] = field(default_factory=list)  # encoded, in order of appearance
    labels: dict[str, str] = field(default_factory=dict)


def parse_row(raw: RawRow, text_key: str | None) -> Row:
    """Look into one line. raises: BadInput with the file and line"""
    try:
        text = raw.data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = raw.data[error.start : error.start + 1].hex().upper()
        why = f"byte 0x{bad} is not valid UTF-8 there"
        raise BadInput(raw.place, "invalid UTF-8", why, _FIX_ROW) from error
    if not raw.is_json:
        return Row(texts=[text.removesuffix("\n").removesuffix("\r")])
    return _JsonRow(raw, text).parse(text_key)


class _JsonRow:
    """One JSON row being read; keeps the place for errors."""

    def __init__(self, raw: RawRow, text: str) -> None:
        self.raw = raw
        try:
            # A byte order mark begins the file, not its first row.
            self.fields = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            self.refuse("invalid JSON", f"it is not valid JSON: {error}"[:200])
        if not isinstance(self.fields, dict):
            self.refuse("invalid JSON", "the row is not a JSON object")

    def refuse(self, reason: str, why: str, fix: str = _FIX_ROW) -> NoReturn:
        raise BadInput(self.raw.place, reason, why, fix)

    def parse(self, text_key: str | None) -> Row:
        key = text_key or self._key()
        value = self.fields.get(key)
        if value is None:
            self._refuse_keys(f"it has no `{key}`")
        paths = self._paths()
        if key == "messages" and not isinstance(value, str):
            row = self._chat(value, paths)
        elif isinstance(value, str):
            row = self._text(value, paths)
        else:
            self.refuse("wrong type", f"`{key}` is not a text but {type(value).__name__}")
        row.labels = {name: label for name in LABELS if (label := self._label(name)) is not None}
        return row

    def _key(self) -> str:
        found = [key for key in ("text", "messages") if self.fields.get(key) is not None]
        if len(found) == 2:
            fix = "say which one with `--text-key text` or `--text-key messages`"
            self.refuse("missing key", "it has both `text` and `messages`", fix)
        if not found:
            self._refuse_keys("it has neither `text` nor `messages`")
        return found[0]

    def _refuse_keys(self, why: str) -> NoReturn:
        names = [key for key, value in self.fields.items() if isinstance(value, str)]
        if not names:
            self.refuse("missing key", why)
        shown = ", ".join(f"`{name}`" for name in names[:8])
        fix = f"name the key that holds the text: `--text-key {names[0]}`"
        self.refuse("missing key", f"{why}; texts are in {shown}", fix)

    def _paths(self) -> list[str]:
        paths = self.fields.get("images")
        if paths is None:
            return []
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            self.refuse("wrong type", "`images` is not a list of paths")
        return paths

    def _label(self, name: str) -> str | None:
        """Labels are short texts; numbers and objects under these names mean something else."""
        value = self.fields.get(name)
        if not isinstance(value, str) or len(value) > MAX_LABEL_CHARS:
            return None
        return self._whole(value)

    def _whole(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            why = f"character {error.start} of a text is half of a surrogate pair (`\\ud83d`)"
            raise BadInput(self.raw.place, "invalid UTF-8", why, _FIX_ROW) from error
        return text

    def _text(self, text: str, paths: list[str]) -> Row:
        if not paths:
            return Row(texts=[self._whole(text)])
        texts = self._whole(text).split(MARKER)
        if len(texts) == 1:
            texts = [""] * len(paths) + texts  # no marker at all: the pictures come first
        self._check_count(len(texts) - 1, len(paths))
        return Row(texts=texts, pictures=[self._picture(path) for path in paths])

    def _check_count(self, num_markers: int, num_pictures: int) -> None:
        if num_markers != num_pictures:
            why = f"it has {num_markers} `{MARKER}` and names {num_pictures} pictures"
            self.refuse("marker count", why, "write one marker for each picture, where it belongs")

    def _chat(self, messages: Any, paths: list[str]) -> Row:
        if not isinstance(messages, list) or not messages:
            self.refuse("bad messages", "`messages` is not a list with a message in it")
        has_pictures = bool(paths)
        for message in messages:
            if not isinstance(message, dict):
                self.refuse("bad messages", "a message is not a JSON object")
            content = message.get("content")
            if isinstance(content, list):
                has_pictures |= any(_is_picture(item) for item in content)
        if has_pictures:
            return self._chat_with_pictures(messages, paths)
        self._check_texts(messages)
        return Row(messages=messages)

    def _check_texts(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            content = message.get("content")
            for item in content if isinstance(content, list) else [{"text": content}]:
                text = item.get("text") if isinstance(item, dict) else None
                if isinstance(text, str):
                    self._whole(text)

    def _chat_with_pictures(self, messages: list[dict[str, Any]], paths: list[str]) -> Row:
        """Give every picture an item of its own, in order; `images` fills those without a path."""
        row, waiting, num_markers = Row(messages=[]), list(paths), 0
        assert row.messages is not None
        for message in messages:
            items: list[dict[str, Any]] = []
            for item in self._items_of(message.get("content")):
                if not _is_picture(item):
                    items.append(item)
                    continue
                path = _path_of(item)
                if path is None:
                    num_markers += 1
                    if not waiting:
                        continue  # counted below
                    path = waiting.pop(0)
                row.pictures.append(self._picture(path))
                items.append({"type": "image"})
            row.messages.append({**message, "content": items})
        self._check_texts(row.messages)
        self._check_count(num_markers, len(paths))
        return row

    def _items_of(self, content: Any) -> Iterator[dict[str, Any]]:
        """Take a message's content apart at its markers."""
        for item in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if not isinstance(item, dict):
                self.refuse("bad messages", "a part of a message is not a JSON object")
            text = item.get("text")
            if item.get("type") != "text" or not isinstance(text, str):
                yield item
                continue
            for i, between in enumerate(text.split(MARKER)):
                if i > 0:
                    yield {"type": "image"}
                if between:
                    yield {"type": "text", "text": between}

    def _picture(self, path: str) -> bytes:
        if path.startswith("data:"):
            return self._picture_in_row(path)
        if path.startswith(("http://", "https://")):
            why = f"`{path}` is on the network, and pictures are read from files only"
            self.refuse("unreadable picture", why[:300], "download it, and name the file")
        file = self.raw.folder / path
        return read_picture(file, self.raw.place)

    def _picture_in_row(self, url: str) -> bytes:
        head, comma, body = url.partition(",")
        if not comma or not head.endswith(";base64"):
            self.refuse("unreadable picture", f"`{head[:60]}` is not a base64 data URL")
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            self.refuse("unreadable picture", f"the data URL is not base64: {error}".lower())


def _is_picture(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type") in ("image", "image_url")


def _path_of(item: Mapping[str, Any]) -> str | None:
    """Find where a picture item says its picture is; None: the next of `images`."""
    for key in ("image_url", "image", "path", "url"):
        value = item.get(key)
        if isinstance(value, Mapping):
            value = value.get("url")
        if isinstance(value, str):
            return value
    return None


def read_picture(path: Path, place: str) -> bytes:
    """Read an encoded picture of a sane size. raises: BadInput with the place"""
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "there is no such file")
        if path.stat().st_size > MAX_MEDIA_BYTES:
            why = f"`{path}` is larger than {MAX_MEDIA_BYTES >> 20} MiB"
            raise BadInput(place, "unreadable picture", why, "make the picture smaller")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        why = f"cannot open the picture `{path}`: {said.lower()}"
        fix = "check the path; it is relative to the file that names it"
        raise BadInput(place, "unreadable picture", why, fix) from error
