"""Find a tokenizer: built in, a folder, a `tokenizer.json`, or Meta's `tokenizer.model`.

in: a name or path, or the texts of the files; out: a `Tokenizer`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from l4cli.errors import L4Error
from l4cli.text import files as hf_files
from l4cli.text.backends import TokenizersBackend, choose_backend, is_library_failure
from l4cli.text.foreign import foreign_vocabulary, special_roles
from l4cli.text.ranks import RankedVocabulary, parse_tiktoken_text
from l4cli.text.special_tokens import NUM_PUBLISHED_RANKS, special_ids
from l4cli.text.splitting import LLAMA4_PATTERN
from l4cli.text.tokenizer import Definition, Tokenizer

META_FILE = "tokenizer.model"
_WANTED = (
    "name a folder with `tokenizer.json`, a `tokenizer.json`, Meta's `tokenizer.model`, or `bytes`"
)


def load_tokenizer(spec: str | Path, *, backend: str | None = None) -> Tokenizer:
    """Load a tokenizer; `backend` forces `tiktoken` or `tokenizers` where either could serve."""
    if spec == "bytes":
        return bytes_tokenizer(backend=backend)
    path = Path(spec)
    if path.is_dir():
        path = _file_in(path)
    if path.suffix == ".json":
        texts = {hf_files.TOKENIZER_FILE: _read_text(path)}
        for name in (hf_files.CONFIG_FILE, *hf_files.EXTRA_FILES):
            if path.name == hf_files.TOKENIZER_FILE and (path.parent / name).is_file():
                texts[name] = _read_text(path.parent / name)
        name = path.parent.resolve().name if path.name == hf_files.TOKENIZER_FILE else path.stem
        return tokenizer_from_files(texts, name=name, source=str(path), backend=backend)
    return _load_meta_file(path, backend)


def bytes_tokenizer(*, backend: str | None = None) -> Tokenizer:
    """The built-in tokenizer: 256 bytes and the named special tokens."""
    tokens = tuple(bytes([byte]) for byte in range(256))
    return ranked_tokenizer(
        RankedVocabulary(tokens, special_ids(256), LLAMA4_PATTERN), name="bytes", backend=backend
    )


def ranked_tokenizer(
    vocabulary: RankedVocabulary,
    *,
    name: str,
    backend: str | None = None,
    texts: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Make the tokenizer of a vocabulary defined by ranks; `texts` are its files, if it has any."""
    engine, reason = choose_backend(vocabulary, backend)
    ids = [*range(len(vocabulary.tokens)), *vocabulary.special_tokens.values()]
    special = (b"",) * (max(ids) + 1 - len(vocabulary.tokens))
    if texts is None:
        texts_of = partial(hf_files.tokenizer_files, vocabulary)
    else:
        texts_of = partial(_completed_texts, vocabulary, texts)
    return Tokenizer(
        Definition(
            name=name,
            tokens=vocabulary.tokens + special,
            special_tokens=vocabulary.special_tokens,
            fingerprint=vocabulary.fingerprint,
            backend=engine,
            backend_reason=reason,
            files=cache(texts_of),
            byte_ids=vocabulary.byte_ids,
            is_divisible=True,
            roles=special_roles(config or {}),
        )
    )


def tokenizer_from_files(
    files: Mapping[str, str],
    *,
    name: str = "tokenizer",
    source: str = "tokenizer.json",
    backend: str | None = None,
) -> Tokenizer:
    """Load a tokenizer from the texts of its files, as a stream or a checkpoint carries them."""
    if hf_files.TOKENIZER_FILE not in files:
        found = ", ".join(f"`{file}`" for file in sorted(files)) or "nothing"
        raise _unreadable(source, f"`tokenizer.json` is missing among {found}")
    text = files[hf_files.TOKENIZER_FILE]
    data = _parse(text, source)
    config = {}
    if hf_files.CONFIG_FILE in files:
        config = _parse(files[hf_files.CONFIG_FILE], hf_files.CONFIG_FILE)
    try:
        vocabulary = hf_files.ranked_vocabulary(data)
    except hf_files.NotRanked as why:
        return _foreign_tokenizer(data, files, config, name, source, str(why), backend)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _unreadable(source, "it is not laid out as a `tokenizer.json`") from None
    return ranked_tokenizer(vocabulary, name=name, backend=backend, texts=files, config=config)


def _foreign_tokenizer(
    data: Mapping[str, Any],
    files: Mapping[str, str],
    config: Mapping[str, Any],
    name: str,
    source: str,
    reason: str,
    backend: str | None,
) -> Tokenizer:
    if backend not in (None, "tokenizers"):
        fix = "use `tokenizers`, which opens it"
        raise L4Error(f"cannot encode `{source}` with `{backend}`", why=reason, fix=fix)
    try:
        foreign = foreign_vocabulary(data, files[hf_files.TOKENIZER_FILE])
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise _unreadable(source, f"`tokenizers` cannot take it: {error}"[:300]) from error
    return Tokenizer(
        Definition(
            name=name,
            tokens=foreign.tokens,
            special_tokens=foreign.special_tokens,
            fingerprint=foreign.fingerprint,
            backend=TokenizersBackend(foreign.library_tokenizer),
            backend_reason=reason,
            files=lambda: dict(files),
            byte_ids=foreign.byte_ids,
            is_divisible=False,
            roles=special_roles(config),
            decode=foreign.decode,
        )
    )


def _load_meta_file(path: Path, backend: str | None) -> Tokenizer:
    data = _read(path)
    if not data:
        raise _unreadable(str(path), "the file is empty")
    try:
        tokens = parse_tiktoken_text(data)
        if len(tokens) != NUM_PUBLISHED_RANKS:
            raise ValueError(f"it holds {len(tokens)} tokens; Llama 4's file has 200000")
    except ValueError as error:
        raise _unreadable(str(path), str(error)) from None
    special = special_ids(len(tokens), all_special=True)
    vocabulary = RankedVocabulary(tokens, special, LLAMA4_PATTERN)
    return ranked_tokenizer(vocabulary, name=path.parent.resolve().name, backend=backend)


def _completed_texts(vocabulary: RankedVocabulary, texts: Mapping[str, str]) -> dict[str, str]:
    """Keep the files as they came; a bare `tokenizer.json` gets its settings and chat template."""
    if hf_files.CONFIG_FILE in texts:
        return dict(texts)
    return {**texts, hf_files.CONFIG_FILE: hf_files.config_file(vocabulary)}


def _file_in(folder: Path) -> Path:
    try:
        for place in (folder, folder / "tokenizer"):
            for name in (hf_files.TOKENIZER_FILE, META_FILE):
                if (place / name).is_file():
                    return place / name
        found = sorted(entry.name for entry in folder.iterdir())[:8]
    except OSError as error:
        raise _unreadable(str(folder), (error.strerror or str(error)).lower()) from error
    why = "it holds " + (", ".join(f"`{name}`" for name in found) or "nothing")
    raise L4Error(f"no tokenizer in `{folder}`", why=why, fix=_WANTED)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise L4Error(
            f"cannot find the tokenizer `{path}`", why="there is no such file", fix=_WANTED
        ) from None
    except OSError as error:
        raise _unreadable(str(path), (error.strerror or str(error)).lower()) from error


def _read_text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(str(path), f"byte {error.start} is not UTF-8") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    if not text.strip():
        raise _unreadable(source, "the file is empty")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(source, f"it is not valid JSON ({error}); cut off?") from None
    if not isinstance(data, dict):
        raise _unreadable(source, "it is not a JSON object")
    return data


def _unreadable(source: str, why: str) -> L4Error:
    return L4Error(f"cannot read the tokenizer `{source}`", why=why, fix=_WANTED)
