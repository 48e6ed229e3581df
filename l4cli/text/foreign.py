"""Tokenizers of other families: whatever `tokenizers` can open.

in: the parsed `tokenizer.json` and `tokenizer_config.json`; out: tokens, special tokens, decoder
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from l4cli.text.ranks import MAX_VOCAB_SIZE, unspell

# These shape batches and offsets, not the ids of ordinary text.
_NOT_IDENTITY = ("version", "truncation", "padding", "post_processor")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "pad"}


@dataclass(frozen=True)
class ForeignVocabulary:
    """A vocabulary that only `tokenizers` knows how to apply."""

    library_tokenizer: Any
    tokens: tuple[bytes, ...]  # by id; b"" for special tokens and holes
    special_tokens: dict[str, int]
    byte_ids: np.ndarray | None
    decode: Callable[[list[int]], str] | None
    fingerprint: str


def foreign_vocabulary(data: Mapping[str, Any], text: str) -> ForeignVocabulary:
    """Open a `tokenizer.json` of any kind.

    raises: whatever the library raises for a damaged file; ValueError
    """
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(text)
    library.no_padding()
    library.no_truncation()
    # Special tokens in the text are ordinary text; added tokens that are not special still match.
    library.encode_special_tokens = True
    added = library.get_added_tokens_decoder()
    special = {token.content: i for i, token in sorted(added.items()) if token.special}
    vocab = library.get_vocab(with_added_tokens=True)
    is_byte_level = _has_byte_level(data.get("decoder"))
    literal = {token.content for token in added.values()}
    last = max(vocab.values(), default=-1)
    if last >= MAX_VOCAB_SIZE:
        raise ValueError(f"its ids go up to {last}")
    tokens = [b""] * (last + 1)
    for word, i in vocab.items():
        if word not in special:
            tokens[i] = _bytes_of(word, is_byte_level and word not in literal)
    return ForeignVocabulary(
        library_tokenizer=library,
        tokens=tuple(tokens),
        special_tokens=special,
        byte_ids=_byte_ids(tokens, vocab),
        decode=None if is_byte_level else _decoder(library),
        fingerprint=_fingerprint(data),
    )


def special_roles(config: Mapping[str, Any]) -> dict[str, str]:
    """Find the names of the special tokens that `tokenizer_config.json` gives a role."""
    roles = {}
    for key, role in _ROLES.items():
        value = config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            roles[role] = name
    return roles


def _has_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        return any(_has_byte_level(part) for part in decoder.get("decoders", []))
    return decoder.get("type") == "ByteLevel"


def _bytes_of(word: str, is_byte_level: bool) -> bytes:
    """Say what text a token stands for; SentencePiece writes a blank as U+2581, bytes as <0x0A>."""
    if is_byte_level:
        try:
            return unspell([word])[0]
        except ValueError:
            return word.encode(errors="replace")
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return bytes.fromhex(word[3:5])
    return word.replace("\u2581", " ").encode(errors="replace")


def _byte_ids(tokens: list[bytes], vocab: Mapping[str, int]) -> np.ndarray | None:
    found = {token: i for i, token in reversed(list(enumerate(tokens))) if len(token) == 1}
    # Byte fallback tokens are the byte itself, whatever other token spells the same.
    found |= {bytes([b]): vocab[f"<0x{b:02X}>"] for b in range(256) if f"<0x{b:02X}>" in vocab}
    if len(found) < 256:
        return None
    return np.array([found[bytes([b])] for b in range(256)], dtype=np.uint32)


def _decoder(library: Any) -> Callable[[list[int]], str]:
    def decode(ids: list[int]) -> str:
        return str(library.decode(ids, skip_special_tokens=False))

    return decode


def _fingerprint(data: Mapping[str, Any]) -> str:
    identity = {key: value for key, value in data.items() if key not in _NOT_IDENTITY}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(b"l4 foreign\0" + text.encode()).hexdigest()
