"""The chat format of Llama 4: messages and pictures as token ids.

in: OpenAI-style messages and the grid of each picture; out: ids, which of them are targets, and
where each picture's first placeholder stands
source: llama-models/models/llama4/chat_format.py; HF Llama4Processor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from l4cli.errors import L4Error
from l4cli.text.tokenizer import Tokenizer

# The name of a role in the text; the results of tools come from `ipython`.
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}
_HEADER_TAIL = "\n\n"


@dataclass(frozen=True)
class ChatTokens:
    """A rendered conversation; it begins with BOS."""

    ids: np.ndarray  # uint32 [n]
    loss_mask: np.ndarray  # uint8 [n], 1: what the assistant says, its end-of-turn included
    media_positions: np.ndarray  # int64 [m], each picture's first `<|patch|>`


def num_tiles(rows: int, cols: int) -> int:
    """Count a picture's tiles; a picture of several has one more that shows all of it."""
    return rows * cols + (1 if rows * cols > 1 else 0)


def image_block(tokenizer: Tokenizer, rows: int, cols: int, tokens_per_tile: int) -> np.ndarray:
    """Give the ids that stand for a picture cut into rows x cols tiles, uint32."""
    assert min(rows, cols, tokens_per_tile) > 0, (rows, cols, tokens_per_tile)
    tile = [_required(tokenizer, "<|patch|>", tokenizer.patch_id)] * tokens_per_tile
    ids = [_required(tokenizer, "<|image_start|>", tokenizer.image_start_id)]
    if rows * cols > 1:
        between = _required(tokenizer, "<|tile_x_separator|>", tokenizer.tile_x_id)
        row_end = _required(tokenizer, "<|tile_y_separator|>", tokenizer.tile_y_id)
        row = tile + ([between, *tile] * (cols - 1)) + [row_end]
        ids += row * rows
    ids += [_required(tokenizer, "<|image|>", tokenizer.image_id), *tile]
    ids += [_required(tokenizer, "<|image_end|>", tokenizer.image_end_id)]
    return np.array(ids, dtype=np.uint32)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    image_grids: Sequence[tuple[int, int]] = (),
    tokens_per_tile: int = 0,
) -> ChatTokens:
    """Write a conversation as ids; the pictures of its messages take the grids in order.

    raises: L4Error for messages that are not of the format, naming the message
    """
    chat = _Chat(tokenizer)
    chat.special("<|begin_of_text|>", tokenizer.bos_id)
    grids = list(image_grids)
    num_images = 0
    for number, message in enumerate(messages, start=1):
        role, items = _parse(message, number)
        is_answer = role == "assistant"
        chat.header(role)
        for item in items:
            if item is not None:
                chat.text(item)
                continue
            if num_images < len(grids):
                rows, cols = grids[num_images]
                chat.image(image_block(tokenizer, rows, cols, tokens_per_tile), is_answer)
            num_images += 1
        chat.end_of_turn(is_answer)
    if num_images != len(grids):
        raise L4Error(
            "the pictures do not fit the messages",
            why=f"the messages name {num_images}, {len(grids)} were given",
            fix='give one picture for each `{"type": "image"}` item',
        )
    if add_generation_prompt:
        chat.header("assistant")
        chat.flush(is_answer=False)
    return chat.tokens()


@dataclass
class _Chat:
    """Ids so far, and the text since the last special token: it is encoded as one."""

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    media_positions: list[int] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    follows_header: bool = False  # the waiting text begins with the header's two newlines

    def append(self, ids: np.ndarray, mask: int) -> None:
        self.ids += ids.tolist()
        self.mask += [mask] * len(ids)

    def special(self, name: str, token_id: int | None, mask: int = 0) -> None:
        self.ids.append(_required(self.tokenizer, name, token_id))
        self.mask.append(mask)

    def text(self, text: str) -> None:
        self.waiting.append(text)

    def flush(self, is_answer: bool) -> None:
        """Encode the waiting text; an answer's own tokens are targets."""
        ids = self.tokenizer.encode("".join(self.waiting))
        num_masked = len(ids)
        if is_answer:
            num_masked = self._num_header_tokens(ids) if self.follows_header else 0
        self.append(ids[:num_masked], 0)
        self.append(ids[num_masked:], 1)
        self.waiting, self.follows_header = [], False

    def _num_header_tokens(self, ids: np.ndarray) -> int:
        # A content that begins with newlines may share a token with the header; a model that was
        # given the header never writes that token, so it is no target.
        num_bytes = 0
        for i, token_id in enumerate(ids.tolist()):
            if num_bytes >= len(_HEADER_TAIL):
                return i
            num_bytes += len(self.tokenizer.token_bytes(token_id))
        return len(ids)

    def header(self, role: str) -> None:
        self.special("<|header_start|>", self.tokenizer.header_start_id)
        self.append(self.tokenizer.encode(role), 0)
        self.special("<|header_end|>", self.tokenizer.header_end_id)
        self.waiting, self.follows_header = [_HEADER_TAIL], True

    def image(self, block: np.ndarray, is_answer: bool) -> None:
        self.flush(is_answer)
        first_patch = int(np.argmax(block == self.tokenizer.patch_id))
        self.media_positions.append(len(self.ids) + first_patch)
        self.append(block, 0)

    def end_of_turn(self, is_answer: bool) -> None:
        self.flush(is_answer)
        self.special("<|eot|>", self.tokenizer.eot_id, mask=int(is_answer))

    def tokens(self) -> ChatTokens:
        return ChatTokens(
            ids=np.array(self.ids, dtype=np.uint32),
            loss_mask=np.array(self.mask, dtype=np.uint8),
            media_positions=np.array(self.media_positions, dtype=np.int64),
        )


def _parse(message: Mapping[str, Any], number: int) -> tuple[str, list[str | None]]:
    """Give a message's role name and its texts, with None for each picture."""
    if not isinstance(message, Mapping):
        raise _malformed(number, "it is not an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(f"`{name}`" for name in ROLES)
        raise _malformed(number, f"its role is `{role}`; known roles are {known}")
    content = message.get("content")
    if isinstance(content, str):
        items: list[str | None] = [content]
    elif isinstance(content, Sequence):
        items = [_item(item, role, number) for item in content]
    else:
        raise _malformed(number, "its `content` is neither a text nor a list of items")
    if role == "system":
        items = ["".join(item for item in items if item is not None).strip()]
    return ROLES[role], items


def _item(item: Any, role: str, number: int) -> str | None:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return str(item["text"])
    if kind == "image" and role != "system":
        return None
    if kind == "image":
        raise _malformed(number, "a system message cannot hold a picture")
    raise _malformed(number, "an item of its `content` is neither a text nor an image")


def _malformed(number: int, why: str) -> L4Error:
    return L4Error(
        f"message {number} cannot be written as chat",
        why=why,
        fix='write messages as `{"role": "user", "content": "..."}`, or `content` as a list of'
        ' `{"type": "text", "text": "..."}` and `{"type": "image"}`',
    )


def _required(tokenizer: Tokenizer, name: str, token_id: int | None) -> int:
    if token_id is None:
        raise L4Error(
            f"the tokenizer `{tokenizer.name}` has no `{name}`",
            why="its vocabulary was made for another chat format",
            fix="train one with `l4 train-tokenizer`, or use Llama 4's",
        )
    return token_id
