"""A vocabulary defined by ranks: a token's id is its rank, and the lowest rank merges first.

in: tiktoken's text format, or a list of tokens; out: tokens by id, merges, a fingerprint
source: tiktoken/src/lib.rs; llama-models/models/llama4/tokenizer.py
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


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

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Every pair of tokens that forms a token, in the order in which pairs merge."""
        ids = self.ids
        merges = []
        for token in self.tokens:
            pairs = [
                (token[:i], token[i:])
                for i in range(1, len(token))
                if token[:i] in ids and token[i:] in ids
            ]
            pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            merges += pairs
        return merges


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


def spell(token: bytes) -> str:
    """Write a token's bytes in the printable alphabet."""
    return token.decode("latin-1").translate(_TO_ALPHABET)


def unspell(word: str) -> bytes:
    """Read a token written in the printable alphabet.

    raises: ValueError for characters outside it
    """
    if not _ALPHABET.issuperset(word):
        raise ValueError(f"`{word}` is not written in the byte alphabet")
    return word.translate(_FROM_ALPHABET).encode("latin-1")
