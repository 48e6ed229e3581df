"""A vocabulary defined by ranks: a token's id is its rank, and the lowest rank merges first.

in: tiktoken's text format, or a list of tokens; out: tokens by id, merges, a fingerprint
source: tiktoken/src/lib.rs; llama-models/models/llama4/tokenizer.py
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from l4cli.text.merges import derive_merges

MAX_VOCAB_SIZE = 1 << 24  # a damaged id must not make a table of gigabytes


@dataclass(frozen=True)
class RankedVocabulary:
    """Ordinary tokens in order of id, special tokens after them, and how text is split first."""

    tokens: tuple[bytes, ...]
    special_tokens: dict[str, int]
    pattern: str

    @cached_property
    def ids(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def byte_ids(self) -> np.ndarray:
        """The id of each single byte, uint32 [256]."""
        return np.array([self.ids[bytes([b])] for b in range(256)], dtype=np.uint32)

    @property
    def has_only_bytes(self) -> bool:
        return len(self.tokens) == 256

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that is equal for equal vocabularies, wherever they came from."""
        digest = hashlib.sha256(b"l4 ranks\0" + self.pattern.encode() + b"\0")
        lengths = np.array([len(token) for token in self.tokens], dtype="<u4")
        digest.update(lengths.tobytes() + b"".join(self.tokens))
        for name, token_id in sorted(self.special_tokens.items(), key=lambda item: item[1]):
            digest.update(f"\0{token_id} {name}".encode())
        return digest.hexdigest()

    @cached_property
    def words(self) -> list[str]:
        """The tokens as `tokenizer.json` spells them."""
        return spell(self.tokens)

    @cached_property
    def merges(self) -> np.ndarray:
        """Left, right and formed id of every pair that forms a token, in merge order, [n, 3]."""
        return derive_merges(self.tokens)

    def merge_words(self) -> Iterator[tuple[str, str]]:
        """Spell the merges as `tokenizer.json` does."""
        words, (left, right, _) = self.words, self.merges.T.tolist()
        return zip(map(words.__getitem__, left), map(words.__getitem__, right), strict=True)


def parse_tiktoken_text(data: bytes) -> tuple[bytes, ...]:
    """Read lines of base64(token) SPACE rank; the ranks must be 0, 1, 2, ...

    raises: ValueError, in the user's words
    """
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        word, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(word, validate=True)
            value = int(rank)
        except (binascii.Error, ValueError):
            raise ValueError(f"line {number} is not a base64 token and its rank") from None
        if value != len(tokens):
            raise ValueError(f"line {number} has rank {value}, expected {len(tokens)}")
        if not token:
            raise ValueError(f"line {number} has an empty token")
        tokens.append(token)
    check_tokens(tokens)
    return tuple(tokens)


def check_tokens(tokens: list[bytes]) -> None:
    """Refuse a vocabulary that cannot encode every byte, or has a token twice.

    raises: ValueError, in the user's words
    """
    if not tokens:
        raise ValueError("it holds no token")
    known = set(tokens)
    if len(known) != len(tokens):
        raise ValueError("a token stands in it twice")
    missing = [byte for byte in range(256) if bytes([byte]) not in known]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 single bytes are not in it")


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in of each byte, used in every byte-level `tokenizer.json`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + i) for i, byte in enumerate(others)}


_TO_ALPHABET = _byte_alphabet()
_FROM_ALPHABET = {ord(char): byte for byte, char in _TO_ALPHABET.items()}
_ALPHABET = frozenset(_TO_ALPHABET.values())


def spell(tokens: Sequence[bytes]) -> list[str]:
    """Write the bytes of tokens in the printable alphabet."""
    text = b"".join(tokens).decode("latin-1").translate(_TO_ALPHABET)
    ends = list(accumulate(map(len, tokens), initial=0))
    return [text[start:end] for start, end in pairwise(ends)]


def unspell(words: Sequence[str]) -> list[bytes]:
    """Read tokens written in the printable alphabet.

    raises: ValueError for characters outside it
    """
    text = "".join(words)
    foreign = set(text) - _ALPHABET
    if foreign:
        raise ValueError(f"`{min(foreign)}` does not stand for a byte")
    data = text.translate(_FROM_ALPHABET).encode("latin-1")
    ends = list(accumulate(map(len, words), initial=0))
    return [data[start:end] for start, end in pairwise(ends)]
