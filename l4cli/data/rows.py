"""What one row says: a text or a chat, the pictures and videos it names, its labels.

in: a line of JSON, or of text; out: `Row`, its markers and media matched one to one, a video as the
pictures of its frames
source: OpenAI's chat format (`messages`, `image_url`); DESIGN.md section 2 for markers
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from l4cli.data.documents import BadInput, RawRow
from l4cli.data.media import MAX_MEDIA_BYTES
from l4cli.data.video import VideoError

# What a row may name: the key of the paths, and what stands for one of them in a text.
KEYS = {"image": "images", "video": "videos"}
MARKERS = {"image": "<|image|>", "video": "<|video|>"}
_KINDS = {marker: kind for kind, marker in MARKERS.items()}
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


FramesOf = Callable[[Path | bytes], list[bytes]]
Paths = dict[str, list[str]]  # kind -> what the row names under its key


def no_frames(source: Path | bytes) -> list[bytes]:
    """For who reads the texts alone: a video is one picture that nobody looks at."""
    return [b""]


def parse_row(raw: RawRow, text_key: str | None, frames_of: FramesOf = no_frames) -> Row:
    """Look into one line. raises: BadInput with the file and line"""
    try:
        text = raw.data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = raw.data[error.start : error.start + 1].hex().upper()
        why = f"byte 0x{bad} is not valid UTF-8 there"
        raise BadInput(raw.place, "invalid UTF-8", why, _FIX_ROW) from error
    if not raw.is_json:
        return Row(texts=[text.removesuffix("\n").removesuffix("\r")])
    return _JsonRow(raw, text, frames_of).parse(text_key)


class _JsonRow:
    """One JSON row being read; keeps the place for errors."""

    def __init__(self, raw: RawRow, text: str, frames_of: FramesOf) -> None:
        self.raw, self.frames_of = raw, frames_of
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
        paths = {kind: self._paths(name) for kind, name in KEYS.items()}
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

    def _paths(self, name: str) -> list[str]:
        paths = self.fields.get(name)
        if paths is None:
            return []
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            self.refuse("wrong type", f"`{name}` is not a list of paths")
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

    def _text(self, text: str, paths: Paths) -> Row:
        kinds = {kind for kind in paths if paths[kind]}
        pieces = _at_markers(self._whole(text), kinds)
        texts, found = pieces[::2], [_KINDS[marker] for marker in pieces[1::2]]
        if not found:  # no marker at all: pictures and videos come first
            found = [kind for kind in paths for _ in paths[kind]]
            texts = [""] * len(found) + texts
        self._check_counts(Counter(found), paths)
        row, waiting = Row(texts=texts[:1]), {kind: iter(paths[kind]) for kind in paths}
        for kind, text_after in zip(found, texts[1:], strict=True):
            num_pictures = self._take(row, kind, next(waiting[kind]))
            row.texts += [""] * (num_pictures - 1) + [text_after]
        return row

    def _take(self, row: Row, kind: str, path: str) -> int:
        """Give a row the next picture, or the frames of the next video, and say how many."""
        if kind == "image":
            row.pictures.append(self._picture(path))
            return 1
        frames = self._frames(path)
        row.pictures += frames
        if sum(map(len, row.pictures)) > MAX_MEDIA_BYTES:
            why = f"its frames take more than {MAX_MEDIA_BYTES >> 20} MiB"
            self.refuse("too many frames", why, "take fewer with `--fps` or `--max-frames`")
        return len(frames)

    def _check_counts(self, num_markers: Mapping[str, int], paths: Paths) -> None:
        for kind, named in paths.items():
            if num_markers[kind] != len(named):
                media = {"image": "pictures", "video": "videos"}[kind]
                why = f"it has {num_markers[kind]} `{MARKERS[kind]}` and names {len(named)} {media}"
                fix = f"write one marker for each of the {media}, where it belongs"
                self.refuse("marker count", why, fix)

    def _chat(self, messages: Any, paths: Paths) -> Row:
        if not isinstance(messages, list) or not messages:
            self.refuse("bad messages", "`messages` is not a list with a message in it")
        kinds = {kind for kind in paths if paths[kind]}
        for message in messages:
            if not isinstance(message, dict):
                self.refuse("bad messages", "a message is not a JSON object")
            content = message.get("content")
            if isinstance(content, list):
                kinds |= {kind for item in content if (kind := _kind_of(item)) is not None}
        if kinds:
            return self._chat_with_media(messages, paths, kinds)
        self._check_texts(messages)
        return Row(messages=messages)

    def _check_texts(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            content = message.get("content")
            for item in content if isinstance(content, list) else [{"text": content}]:
                text = item.get("text") if isinstance(item, dict) else None
                if isinstance(text, str):
                    self._whole(text)

    def _chat_with_media(
        self, messages: list[dict[str, Any]], paths: Paths, kinds: set[str]
    ) -> Row:
        """Give every picture and frame an item of its own, in order.

        `images` and `videos` fill the items without a path.
        """
        row, num_markers = Row(messages=[]), Counter[str]()
        waiting = {kind: list(named) for kind, named in paths.items()}
        assert row.messages is not None
        for message in messages:
            items: list[dict[str, Any]] = []
            for item in self._items_of(message.get("content"), kinds):
                kind = _kind_of(item)
                if kind is None:
                    items.append(item)
                    continue
                path = _path_of(item)
                if path is None:
                    num_markers[kind] += 1
                    if not waiting[kind]:
                        continue  # counted below
                    path = waiting[kind].pop(0)
                items += [{"type": "image"}] * self._take(row, kind, path)
            row.messages.append({**message, "content": items})
        self._check_texts(row.messages)
        self._check_counts(num_markers, paths)
        return row

    def _items_of(self, content: Any, kinds: set[str]) -> Iterator[dict[str, Any]]:
        """Take a message's content apart at its markers."""
        for item in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if not isinstance(item, dict):
                self.refuse("bad messages", "a part of a message is not a JSON object")
            text = item.get("text")
            if item.get("type") != "text" or not isinstance(text, str):
                yield item
                continue
            for between in _at_markers(text, kinds):
                if between in _KINDS and _KINDS[between] in kinds:
                    yield {"type": _KINDS[between]}
                elif between:
                    yield {"type": "text", "text": between}

    def _picture(self, path: str) -> bytes:
        found = self._found(path, "picture")
        return found if isinstance(found, bytes) else read_picture(found, self.raw.place)

    def _frames(self, path: str) -> list[bytes]:
        found = self._found(path, "video")
        return read_frames(found, self.raw.place, self.frames_of)

    def _found(self, path: str, medium: str) -> Path | bytes:
        """The file that is meant, or what the row itself holds."""
        reason = f"unreadable {medium}"
        if path.startswith(("http://", "https://")):
            why = f"`{path}` is on the network, and {medium}s are read from files only"
            self.refuse(reason, why[:300], "download it, and name the file")
        if not path.startswith("data:"):
            return self.raw.folder / path
        head, comma, body = path.partition(",")
        if not comma or not head.endswith(";base64"):
            self.refuse(reason, f"`{head[:60]}` is not a base64 data URL")
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            self.refuse(reason, f"the data URL is not base64: {error}".lower())


def _at_markers(text: str, kinds: set[str]) -> list[str]:
    """Cut a text at the markers of some kinds; every second piece is a marker."""
    markers = [re.escape(marker) for kind, marker in MARKERS.items() if kind in kinds]
    return re.split(f"({'|'.join(markers)})", text) if markers else [text]


def _kind_of(item: Any) -> str | None:
    """Whether a part of a message is a picture or a video; None: it is neither."""
    kind = item.get("type") if isinstance(item, Mapping) else None
    names = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
    return names.get(kind) if isinstance(kind, str) else None


def _path_of(item: Mapping[str, Any]) -> str | None:
    """Find where an item says its picture or video is; None: the next that the row names."""
    for key in ("image_url", "image", "video_url", "video", "path", "url"):
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


def read_frames(source: Path | bytes, place: str, frames_of: FramesOf) -> list[bytes]:
    """Sample a video and encode its frames. raises: BadInput with the place"""
    try:
        if isinstance(source, Path) and not source.is_file():
            raise FileNotFoundError(2, "there is no such file")
        return frames_of(source)
    except VideoError as error:
        named = f"`{source}`: " if isinstance(source, Path) else ""
        raise BadInput(place, error.reason, f"{named}{error.why}", error.fix) from error
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        why = f"cannot open the video `{str(source)[:300]}`: {said.lower()}"
        fix = "check the path; it is relative to the file that names it"
        raise BadInput(place, "unreadable video", why, fix) from error
