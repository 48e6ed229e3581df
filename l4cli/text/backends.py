"""What turns a piece of text into ids: numpy, tiktoken or `tokenizers`.

in: text without lone surrogates; out: uint32 ids; the same ids from each for one vocabulary
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any, Protocol

import numpy as np

from l4cli.errors import L4Error
from l4cli.text.ranks import RankedVocabulary

# Two noncharacters: tiktoken searches the text for its special tokens, so it gets one that is
# found nowhere (with none it stops at every character: half the speed). It is never allowed.
_ABSENT = "\U0010fffe\U0010ffff"

_MIN_TIKTOKEN = (0, 13)


class Backend(Protocol):
    """An encoder of ordinary text; safe to call from several threads."""

    name: str

    def encode(self, text: str) -> np.ndarray:
        """Give the ids of a text that is not too long for the engine, uint32."""


class BytesBackend:
    """One token a byte."""

    name = "bytes"

    def __init__(self, vocabulary: RankedVocabulary) -> None:
        self._byte_ids = vocabulary.byte_ids

    def encode(self, text: str) -> np.ndarray:
        return self._byte_ids[np.frombuffer(text.encode(), dtype=np.uint8)]


class TiktokenBackend:
    """The extra `[fast]`: ranks as they are, and no Python list of ids."""

    name = "tiktoken"

    def __init__(self, vocabulary: RankedVocabulary) -> None:
        import tiktoken

        encoding = tiktoken.Encoding(
            "l4",
            pat_str=vocabulary.pattern,
            mergeable_ranks=vocabulary.ids,
            special_tokens={_ABSENT: len(vocabulary.tokens)},
        )
        # `encode_to_numpy` of older versions lists the ids first; the core call never does, and
        # it releases the GIL.
        self._core: Any = encoding._core_bpe

    def encode(self, text: str) -> np.ndarray:
        buffer = self._core.encode_to_tiktoken_buffer(text, set())
        return np.frombuffer(buffer, dtype=np.uint32).copy()  # writable, as from the other engines


class TokenizersBackend:
    """Hugging Face's library, of the base install."""

    name = "tokenizers"

    def __init__(self, library_tokenizer: Any) -> None:
        self._tokenizer = library_tokenizer

    def encode(self, text: str) -> np.ndarray:
        # The batch call releases the GIL and keeps no character offsets; `encode` does neither.
        try:
            encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            text.encode()  # says UnicodeEncodeError where the library says only TypeError
            raise
        except BaseException as error:
            if not is_library_failure(error):
                raise
            raise L4Error(
                "cannot encode the text",
                why=f"`tokenizers` gave up on {len(text)} characters: {error}"[:200],
                fix="split the text into shorter documents, or use another tokenizer",
            ) from error
        return np.array(encodings[0].ids, dtype=np.uint32)


def is_library_failure(error: BaseException) -> bool:
    """Whether `tokenizers` failed; its panics are not `Exception`s."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def library_tokenizer(vocabulary: RankedVocabulary) -> Any:
    """Build the `tokenizers` object of a vocabulary defined by ranks."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    model = models.BPE(
        vocab={word: i for i, word in enumerate(vocabulary.words)},
        merges=list(vocabulary.merge_words()),
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(vocabulary.pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


def choose_backend(vocabulary: RankedVocabulary, forced: str | None) -> tuple[Backend, str]:
    """Pick the fastest engine that can take the vocabulary, and say why it was picked."""
    if vocabulary.has_only_bytes and forced in (None, "bytes"):
        return BytesBackend(vocabulary), "every token is one byte"
    problem = _tiktoken_problem()
    if forced == "tiktoken" and problem is not None:
        fix = "install it with `pip install -U tiktoken`, or use `tokenizers`"
        raise L4Error("cannot encode with `tiktoken`", why=problem, fix=fix)
    if forced in (None, "tiktoken") and problem is None:
        return TiktokenBackend(vocabulary), "the vocabulary is defined by ranks"
    assert forced in (None, "tokenizers"), forced
    why = f"{problem} (`pip install -U tiktoken`)" if forced is None else "asked for"
    return TokenizersBackend(library_tokenizer(vocabulary)), why


def _tiktoken_problem() -> str | None:
    """Say why tiktoken cannot be used, if it cannot."""
    if importlib.util.find_spec("tiktoken") is None:
        return "`tiktoken` is not installed"
    version = importlib.metadata.version("tiktoken")
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_TIKTOKEN:
        return f"`tiktoken` {version} takes the square of a long word's length; 0.13 does not"
    return None
