"""Text to token ids and back.

in: str or bytes; out: uint32 ids. Text is always ordinary: what spells a special token is not one
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from l4cli.errors import L4Error
from l4cli.text.backends import Backend
from l4cli.text.special_tokens import LLAMA3_NAMES
from l4cli.text.splitting import blocks, cut_long_runs

_UNIT_CHARS = 1 << 16  # threads take work in units of about this size
# Conversations repeat their short texts: roles, headers, questions, one-word answers.
_SHORT_CHARS = 64
_NUM_SHORT = 1 << 14
_INVALID_BYTES = re.compile("[\udc80-\udcff]+")
_SURROGATE = re.compile("[\ud800-\udfff]")

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Definition:
    """Everything that makes one tokenizer, whatever file it came from."""

    name: str
    tokens: tuple[bytes, ...]  # by id; b"" for special tokens and for holes
    special_tokens: dict[str, int]
    fingerprint: str
    backend: Backend
    backend_reason: str
    files: Callable[[], dict[str, str]]
    byte_ids: np.ndarray | None  # uint32 [256]; None: some bytes have no token of their own
    is_divisible: bool  # long text may be encoded in pieces
    roles: dict[str, str] = field(default_factory=dict)  # `bos`, `eos`, `pad` of foreign files
    decode: Callable[[list[int]], str] | None = None  # where decoding is not joining bytes


class Tokenizer:
    """One vocabulary; see `load_tokenizer` for where it comes from."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self.name = definition.name
        self.special_tokens = definition.special_tokens
        self.fingerprint = definition.fingerprint
        self.backend = definition.backend.name
        self.backend_reason = definition.backend_reason
        self.vocab_size = len(definition.tokens)
        self._special_names = {i: name for name, i in definition.special_tokens.items()}
        self._encode_short = lru_cache(_NUM_SHORT)(self._encode_divided)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, backend={self.backend!r})"

    # Encoding

    def encode(self, text: str) -> np.ndarray:
        """Give the ids of ordinary text, uint32."""
        if len(text) <= _SHORT_CHARS:
            return self._encode_short(text).copy()
        return self._encode_divided(text)

    def _encode_divided(self, text: str) -> np.ndarray:
        return _concatenate([self._encode_block(block) for block in self.divide([text])])

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Give the ids of any bytes; what is not UTF-8 becomes tokens of single bytes."""
        text = data.decode("utf-8", errors="surrogateescape")
        byte_ids = self._definition.byte_ids
        ids, start = [], 0
        for invalid in _INVALID_BYTES.finditer(text):
            if byte_ids is None:
                raise L4Error(
                    "cannot encode bytes that are not UTF-8",
                    why=f"the vocabulary of `{self.name}` lacks tokens for single bytes",
                    fix="convert the text to UTF-8, or use another tokenizer",
                )
            raw = invalid.group().encode("utf-8", errors="surrogateescape")
            ids.append(self.encode(text[start : invalid.start()]))
            ids.append(byte_ids[np.frombuffer(raw, dtype=np.uint8)])
            start = invalid.end()
        return _concatenate([*ids, self.encode(text[start:])])

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """Encode many texts on several threads; long texts are shared among them."""
        if num_threads <= 1:
            return [self.encode(text) for text in texts]
        work = [(i, block) for i, text in enumerate(texts) for block in self.divide([text])]
        units = [[block for _, block in unit] for unit in _units(work)]
        with ThreadPoolExecutor(num_threads) as pool:
            done = pool.map(lambda unit: [self._encode_block(block) for block in unit], units)
            encoded = [ids for unit in done for ids in unit]
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for (i, _), ids in zip(work, encoded, strict=True):
            parts[i].append(ids)
        return [_concatenate(part) for part in parts]

    def divide(self, parts: Iterable[str]) -> Iterator[str]:
        """Cut a text that arrives in parts into pieces that may be encoded apart.

        The ids of the pieces, one after the other, are those of the whole text, so a text need
        not be held at once. A foreign tokenizer gives the whole text as one piece.
        """
        if self._definition.is_divisible:
            return blocks(parts)
        whole = "".join(parts)
        return iter([whole] if whole else [])

    def _encode_block(self, block: str) -> np.ndarray:
        pieces = cut_long_runs(block) if self._definition.is_divisible else [block]
        try:
            return _concatenate([self._definition.backend.encode(piece) for piece in pieces])
        except UnicodeEncodeError as error:
            half = _SURROGATE.search(block)
            assert half is not None
            raise L4Error(
                "cannot encode the text",
                why=f"character {half.start()} is half of a surrogate pair",
                fix="write the text as valid UTF-8",
            ) from error

    # Decoding

    def decode(self, ids: Ids) -> str:
        """Give the text of ids; invalid UTF-8 is replaced, special tokens appear by name."""
        words: list[str] = []
        ordinary: list[int] = []
        for i in self._checked(ids):
            if i in self._special_names:
                words += [self._decode_ordinary(ordinary), self._special_names[i]]
                ordinary = []
            else:
                ordinary.append(i)
        return "".join([*words, self._decode_ordinary(ordinary)])

    def decode_bytes(self, ids: Ids) -> bytes:
        """Give the bytes of ids; special tokens have none."""
        checked = self._checked(ids)
        if self._definition.decode is None:
            return b"".join(map(self._definition.tokens.__getitem__, checked))
        return self._definition.decode(
            [i for i in checked if i not in self._special_names]
        ).encode()

    def token_bytes(self, i: int) -> bytes:
        """Give the bytes of one token; b"" for a special one."""
        return self._definition.tokens[self._checked([i])[0]]

    def num_bytes(self) -> np.ndarray:
        """Count the bytes of every token, int32 [vocab_size]; 0 for special ones."""
        return np.array([len(token) for token in self._definition.tokens], dtype=np.int32)

    def _decode_ordinary(self, ids: list[int]) -> str:
        if self._definition.decode is not None:
            return self._definition.decode(ids) if ids else ""
        return b"".join(map(self._definition.tokens.__getitem__, ids)).decode(errors="replace")

    def _checked(self, ids: Ids) -> list[int]:
        listed = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        if listed and not (min(listed) >= 0 and max(listed) < self.vocab_size):
            wrong = next(i for i in listed if not 0 <= i < self.vocab_size)
            raise L4Error(
                f"token id {wrong} is out of range",
                why=f"the vocabulary of `{self.name}` has {self.vocab_size} tokens",
                fix="use the tokenizer that made these ids",
            )
        return listed

    # Special tokens by role; None where the vocabulary has none

    @cached_property
    def bos_id(self) -> int | None:
        return self._role("<|begin_of_text|>", "bos")

    @cached_property
    def eos_id(self) -> int | None:
        return self._role("<|end_of_text|>", "eos")

    @cached_property
    def pad_id(self) -> int | None:
        return self._role("<|finetune_right_pad|>", "pad")

    @cached_property
    def eot_id(self) -> int | None:
        return self._role("<|eot|>")

    @cached_property
    def eom_id(self) -> int | None:
        return self._role("<|eom|>")

    @cached_property
    def header_start_id(self) -> int | None:
        return self._role("<|header_start|>")

    @cached_property
    def header_end_id(self) -> int | None:
        return self._role("<|header_end|>")

    @cached_property
    def image_start_id(self) -> int | None:
        return self._role("<|image_start|>")

    @cached_property
    def image_end_id(self) -> int | None:
        return self._role("<|image_end|>")

    @cached_property
    def tile_x_id(self) -> int | None:
        return self._role("<|tile_x_separator|>")

    @cached_property
    def tile_y_id(self) -> int | None:
        return self._role("<|tile_y_separator|>")

    @cached_property
    def image_id(self) -> int | None:
        return self._role("<|image|>")

    @cached_property
    def patch_id(self) -> int | None:
        return self._role("<|patch|>")

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer, of those the vocabulary has."""
        found = (self.eos_id, self.eom_id, self.eot_id)
        return list(dict.fromkeys(i for i in found if i is not None))

    def _role(self, name: str, role: str | None = None) -> int | None:
        names = [name, LLAMA3_NAMES.get(name, name)]
        if role in self._definition.roles:
            names.append(self._definition.roles[role])
        return next((self.special_tokens[n] for n in names if n in self.special_tokens), None)

    # Files

    def files(self) -> dict[str, str]:
        """Give the tokenizer as a folder: file name to text."""
        return dict(self._definition.files())

    def save(self, folder: str | Path) -> None:
        """Write the files into a folder; each replaces an older one at once or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            partial = folder / f"{name}.partial-{os.getpid()}"
            try:
                partial.write_text(text, encoding="utf-8", newline="\n")
                partial.replace(folder / name)
            finally:
                partial.unlink(missing_ok=True)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)


def _units(work: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Group short texts, so that handing them to a thread costs little."""
    unit: list[tuple[int, str]] = []
    num_chars = 0
    for item in work:
        unit.append(item)
        num_chars += len(item[1])
        if num_chars >= _UNIT_CHARS:
            yield unit
            unit, num_chars = [], 0
    if unit:
        yield unit
