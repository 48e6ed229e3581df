"""A file of prompts: what a teacher is asked, row by row.

in: JSONL rows with `messages` or `prompt`, perhaps `id` and `answer`; out: `Prompt`s, all checked
before anything is asked
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4cli.errors import L4Error
from l4cli.text.chat import ROLES

# Keys that the rows of answers have themselves, or that a tokenizer would take for something else.
_OURS = ("sample", "finish", "num_tokens", "checked", "teacher", "reasoning", "completion", "text")
_MEDIA = ("images", "videos")
_SHAPE = '`{"messages": [{"role": "user", "content": "..."}]}` or `{"prompt": "..."}`'


@dataclass(frozen=True)
class Prompt:
    """One row."""

    id: str | int  # the row's own, else the number of its line
    messages: list[dict[str, Any]]
    text: str | None  # of a row with `prompt`
    answer: Any  # what a checker compares with; None: the row has none
    carried: dict[str, Any] = field(default_factory=dict)  # all other keys, `answer` among them
    place: str = ""  # for errors: file and line


@dataclass(frozen=True)
class PromptFile:
    """All rows of a file, and what tells it from others."""

    path: Path
    prompts: list[Prompt]
    digest: str  # SHA-256 of its bytes


def read_prompts(path: Path) -> PromptFile:
    """Read and check every row. raises: L4Error naming the first bad line"""
    try:
        data = path.read_bytes()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        fix = f"name a file of JSON lines such as {_SHAPE}"
        raise L4Error(f"cannot read the prompts `{path}`", why=why, fix=fix) from error
    prompts: list[Prompt] = []
    lines_of: dict[str, int] = {}  # `1` and `"1"` would be one in a report
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        prompt = _prompt(line, number, f"`{path}` line {number}")
        name = str(prompt.id)
        if name in lines_of:
            why = f"its `id` {json.dumps(prompt.id)} is that of line {lines_of[name]}"
            raise _bad(prompt.place, why, "give every row an `id` of its own, or none")
        lines_of[name] = number
        prompts.append(prompt)
    if not prompts:
        fix = f"write one row a line, such as {_SHAPE}"
        raise L4Error(f"cannot use the prompts `{path}`", why="it holds no row", fix=fix)
    return PromptFile(path, prompts, hashlib.sha256(data).hexdigest())


def _prompt(line: bytes, number: int, place: str) -> Prompt:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        why = "a text in it holds half of a surrogate pair"
        raise _bad(place, why, "write the text as valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _bad(place, f"it is not JSON: {error}"[:200], f"write it like {_SHAPE}") from None
    if not isinstance(row, dict):
        raise _bad(place, "it is not a JSON object", f"write it like {_SHAPE}")
    given = [key for key in ("messages", "prompt") if row.get(key) is not None]
    if len(given) != 1:
        why = (
            "it has both `messages` and `prompt`" if given else "it has no `messages`, no `prompt`"
        )
        raise _bad(place, why, f"write it like {_SHAPE}")
    for key in (*_OURS, *_MEDIA):
        if key in row:
            why = f"its key `{key}` is one that rows of answers have themselves"
            if key in _MEDIA:
                why = f"it names `{key}`, and only texts can be asked about"
            raise _bad(place, why, "rename the key" if key in _OURS else "leave such rows out")
    found = row.get("id", number)
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise _bad(place, f"its `id` is {json.dumps(found)[:40]}", "use a text or a whole number")
    text = row.get("prompt")
    if text is not None and (not isinstance(text, str) or not text):
        raise _bad(place, "its `prompt` is not a text, or is empty", f"write it like {_SHAPE}")
    messages = _messages(row["messages"], place) if text is None else [_user(text)]
    carried = {k: v for k, v in row.items() if k not in ("id", "messages", "prompt")}
    return Prompt(found, messages, text, row.get("answer"), carried, place)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _messages(messages: Any, place: str) -> list[dict[str, Any]]:
    fix = f"write it like {_SHAPE}"
    if not isinstance(messages, list) or not messages:
        raise _bad(place, "`messages` is not a list with a message in it", fix)
    plain = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise _bad(place, f"message {number} is not a JSON object", fix)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(f"`{name}`" for name in ROLES)
            why = f"the role of message {number} is {json.dumps(role)[:40]}"
            raise _bad(place, why, f"choose from {known}")
        plain.append({**message, "content": _content(message.get("content"), number, place)})
    if ROLES[plain[-1]["role"]] == "assistant":
        why = "its last message is the assistant's, so there is nothing to answer"
        raise _bad(place, why, "end with a message of the user")
    return plain


def _content(content: Any, number: int, place: str) -> str:
    """A message's text; parts are joined, as the chat format does it."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        why = f"the `content` of message {number} is not text"
        raise _bad(place, why, "write the content as a text; pictures cannot be asked about")
    return "".join(str(text) for text in texts)


def _bad(place: str, why: str, fix: str) -> L4Error:
    return L4Error(f"cannot use the prompt in {place}", why=why, fix=fix)
