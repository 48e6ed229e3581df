"""Where filler text comes from: files, packed shards, a grammar, or one paragraph over and over.

in: paths or a seed; out: text in pieces of bounded size, from a random place once around
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import numpy as np

from l4cli.data.inputs import HEAD_BYTES, Inputs, Kind, binary_kind
from l4cli.data.longcontext.words import ADJECTIVES, LINKS, NOUNS, VERBS
from l4cli.data.shards import ShardSet
from l4cli.errors import L4Error

_FIRST_BYTES = 1 << 14  # short texts must not pay for long reads
_READ_BYTES = 1 << 20
_NUM_SENTENCES = 1 << 9  # of the grammar, written at a time
_NUM_PLACES = 1 << 40
# A unit ends after a sentence, or after a line. What follows a sentence begins with its blank.
BORDER = re.compile(r"""[.!?]["')\]]*(?=[ \t])|\n+""")
NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class TextSource(Protocol):
    """A text to read from any place."""

    name: str  # in the user's words
    is_endless: bool

    def pieces(self, rng: np.random.Generator) -> Iterator[str]:
        """Read from a random place to the end, and then from the beginning up to there."""
        ...


class FileText:
    """Plain text files, read as far as they are needed."""

    is_endless = False

    def __init__(self, paths: Sequence[str | Path]) -> None:
        inputs = Inputs([str(path) for path in paths])
        self.name = f"`{paths[0]}`" if len(paths) == 1 else f"{len(paths)} files and folders"
        self._files: list[tuple[Path, int]] = []
        for source in inputs.sources():
            if source.kind is Kind.picture and not source.was_named:
                continue
            if source.path is None or source.size is None:
                why = "a haystack is read from many places, and a pipe has only one"
                _refuse(source.name, why, "write the text to a file")
            if source.kind is not Kind.text:
                fix = "pack it and name the shards: `l4 tokenize FILE | l4 pack -o shards/`"
                _refuse(source.name, f"`{source.path.suffix}` files are not plain text", fix)
            if source.size and self._is_text(source.path, source.was_named):
                self._files.append((source.path, source.size))
        if not self._files:
            _refuse(str(paths[0]), "there is no text in it", "name text files or a folder of them")

    def pieces(self, rng: np.random.Generator) -> Iterator[str]:
        place = int(rng.integers(sum(size for _, size in self._files)))
        number = 0
        while place >= self._files[number][1]:
            place -= self._files[number][1]
            number += 1
        place = self._align(number, place)
        yield from self._read(number, place, self._files[number][1])
        for other in [*range(number + 1, len(self._files)), *range(number)]:
            yield from self._read(other, 0, self._files[other][1])
        yield from self._read(number, 0, place)

    def _is_text(self, path: Path, was_named: bool) -> bool:
        """A folder may hold anything; of it only text is taken."""
        with _opened(path) as file:
            known = binary_kind(file.read(HEAD_BYTES))
        if known is not None and was_named:
            _refuse(str(path), f"it is {known[0]}, not UTF-8 text", "name files of plain text")
        return known is None

    def _align(self, number: int, place: int) -> int:
        """Go on to where a sentence or line begins, if one does nearby; else to a character."""
        if place == 0:
            return 0
        path, size = self._files[number]
        with _opened(path) as file:
            file.seek(place)
            head = file.read(_FIRST_BYTES)
        skipped = 0
        while skipped < min(3, len(head)) and head[skipped] & 0xC0 == 0x80:
            skipped += 1
        text = head[skipped:].decode("utf-8", errors="ignore")
        border = BORDER.search(text)
        if border is not None:
            skipped += len(text[: border.end()].encode())
        return place + skipped if place + skipped < size else 0

    def _read(self, number: int, start: int, end: int) -> Iterator[str]:
        """Decode a part of a file; the end of a file ends a line."""
        path, size = self._files[number]
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), True)
        want, last = _FIRST_BYTES, "\n"
        with _opened(path) as file:
            file.seek(start)
            while start < end:
                data = file.read(min(want, end - start))
                if not data:
                    _refuse(str(path), "it has become shorter", "leave it alone while `l4` runs")
                start, want = start + len(data), min(2 * want, _READ_BYTES)
                try:
                    text = decoder.decode(data, final=start >= end)
                except UnicodeDecodeError as error:
                    bad = error.object[error.start : error.start + 1].hex().upper()
                    why = f"byte 0x{bad}, before byte {start}, is not valid UTF-8"
                    fix = "convert the text to UTF-8 (`iconv -f LATIN1 -t UTF-8`)"
                    raise _unreadable(str(path), why, fix) from error
                if text:
                    last = text[-1]
                    yield text
        if end == size and last != "\n":
            yield "\n"


class ShardText:
    """Documents of packed shards, decoded with their own tokenizer."""

    is_endless = False

    def __init__(self, folder: str | Path) -> None:
        self.name = f"`{folder}`"
        self._shards = ShardSet.open(folder)
        self._tokenizer = self._shards.tokenizer()
        self._special = np.array(sorted(self._tokenizer.special_tokens.values()), np.uint32)

    def pieces(self, rng: np.random.Generator) -> Iterator[str]:
        first = int(rng.integers(self._shards.num_rows))
        for i in range(self._shards.num_rows):
            yield from self._row((first + i) % self._shards.num_rows)

    def _row(self, i: int) -> Iterator[str]:
        row = self._shards.row(i)
        ends = np.flatnonzero(np.diff(row.document_ids)) + 1
        documents = np.split(row.document_ids, ends)
        for ids, numbers in zip(np.split(row.input_ids, ends), documents, strict=True):
            if numbers[0] == 0:  # padding
                continue
            text = self._tokenizer.decode(ids[~np.isin(ids, self._special)])
            if text:
                yield text if text.endswith("\n") else text + "\n"


class GeneratedText:
    """Plain English sentences from a grammar; no paragraph comes twice."""

    is_endless = True
    name = "generated filler"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def pieces(self, rng: np.random.Generator) -> Iterator[str]:
        place = int(rng.integers(_NUM_PLACES))
        while True:
            yield self._sentences(np.random.default_rng([self._seed, place]))
            place += 1

    def _sentences(self, rng: np.random.Generator) -> str:
        patterns = rng.integers(len(_PATTERNS), size=_NUM_SENTENCES).tolist()
        columns = [
            rng.integers(len(words), size=_NUM_SENTENCES).tolist()
            for words in (ADJECTIVES, NOUNS, VERBS, LINKS, ADJECTIVES, NOUNS, NOUNS)
        ]
        breaks = (rng.random(_NUM_SENTENCES) < 0.15).tolist()
        sentences = []
        for pattern, is_break, a, n, v, p, b, m, o in zip(patterns, breaks, *columns, strict=True):
            text = _PATTERNS[pattern].format(
                a=ADJECTIVES[a],
                n=NOUNS[n],
                v=VERBS[v],
                p=LINKS[p],
                b=ADJECTIVES[b],
                m=NOUNS[m],
                o=NOUNS[o],
            )
            sentences.append(text + "\n" if is_break else text)
        return _joined(sentences)


_PATTERNS = (
    " The {a} {n} {v} the {m} {p} the {b} {o}.",
    " One {a} {n} {v} every {b} {m}.",
    " Nobody {v} the {n} {p} the {m} that morning.",
    " When the {n} was {a}, the {m} {v} it {p} the {o}.",
    " Each {n} {p} the {b} {m} {v} the {a} {o}.",
    " They {v} the {a} {n} and left the {b} {m} {p} the {o}.",
    " The day was {a}, and the {n} {v} another {m}.",
    " Some say the {n} {v} the {m}; others say the {b} {o} did.",
    " Later the {a} {n} {v} the {m} once more.",
    " Was the {n} {p} the {m} as {a} as the {b} {o}?",
)


def _joined(sentences: list[str]) -> str:
    """Join sentences that begin with a blank, or lines: a line begins with none."""
    text = "".join(sentences)
    return text.replace("\n ", "\n")


class NoiseText:
    """One paragraph over and over: the plainest haystack there is."""

    is_endless = True
    name = "the noise paragraph"

    def pieces(self, rng: np.random.Generator) -> Iterator[str]:
        del rng  # every place is like every other
        size = 100
        while True:
            yield NOISE * size
            size = min(2 * size, 10_000)


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise _unreadable(str(path), why, "check its permissions, or leave it out") from error


def _unreadable(name: str, why: str, fix: str) -> L4Error:
    return L4Error(f"cannot use `{name}` as a haystack", why=why, fix=fix)


def _refuse(name: str, why: str, fix: str) -> NoReturn:
    raise _unreadable(name, why, fix)
