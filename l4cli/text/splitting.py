"""Where text may be cut: the split patterns, and pieces that can be encoded apart.

in: text of any length, also as it arrives; out: pieces whose ids, one after the other, are those
of the whole text; runs no engine survives are cut at fixed places
source: llama-models/models/llama4/tokenizer.py (pattern; it cuts runs of 25,000)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA4_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _CONTRACTION
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _CONTRACTION
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LLAMA3_TAIL
QWEN2_PATTERN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LLAMA3_TAIL

# Patterns known to split alike in fancy-regex (tiktoken) and Oniguruma (tokenizers), and to
# allow the cuts below. GPT-2's does not: it takes "\n\nx" apart as "\n", "\n", "x".
KNOWN_PATTERNS = frozenset({LLAMA4_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN})

BLOCK_CHARS = 1 << 18  # a piece ends at the first harmless place after this many characters
MAX_BLOCK_CHARS = 1 << 22  # ... and here at the latest
MAX_RUN_CHARS = 500_000  # of one kind of character; fancy-regex gives up at 1,000,000 spaces

# After the matched character a new piece of the known patterns begins, whatever follows, and
# what comes before splits the same when the text ends there.
_ASCII_MARKS = r"!-/:-@\[-`{-~"
_CJK_MARKS = "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_LETTERS = "A-Za-z\u4e00-\u9fff\uac00-\ud7a3"
_HARMLESS_CUT = re.compile(
    r"[!-/:-~](?=[ \t0-9])"  # any ASCII sign but a digit, then a blank or a digit
    r"|\n(?=[^\s/])"  # a line's end; marks may be followed by newlines and slashes
    # A letter, then a mark; an apostrophe may be a contraction's.
    rf"|[{_LETTERS}](?=[!-&(-/:-@\[-`{{-~ \t0-9{_CJK_MARKS}])"
)
# Runs that may stay one piece of the pattern: blanks, letters, marks (each a little too wide).
_RUNS = (
    re.compile(r"\s+"),
    re.compile(rf"[^\s\d{_ASCII_MARKS}\u2010-\u205e\u3008-\u3020{_CJK_MARKS}]+"),
    re.compile(r"(?:[^\w\s]|_)+"),
)


def blocks(
    parts: Iterable[str],
    *,
    block_chars: int = BLOCK_CHARS,
    max_block_chars: int = MAX_BLOCK_CHARS,
) -> Iterator[str]:
    """Cut a text, given in parts of any size, where its ids do not change."""
    waiting: list[str] = []
    num_waiting = 0
    for part in parts:
        waiting.append(part)
        num_waiting += len(part)
        if num_waiting <= block_chars:
            continue
        text, start = "".join(waiting), 0
        while (end := _block_end(text, start, block_chars, max_block_chars)) is not None:
            yield text[start:end]
            start = end
        waiting, num_waiting = [text[start:]], len(text) - start
    if num_waiting:
        yield "".join(waiting)


def _block_end(text: str, start: int, block_chars: int, max_block_chars: int) -> int | None:
    """Find where the block that begins at `start` ends; None: more text is needed."""
    latest = start + max_block_chars
    found = _HARMLESS_CUT.search(text, start + block_chars, latest)
    if found is not None:
        return found.end()
    return latest if len(text) > latest else None


def cut_long_runs(block: str, max_run_chars: int = MAX_RUN_CHARS) -> list[str]:
    """Cut runs of one kind of character that are too long for the engines."""
    if len(block) <= max_run_chars:
        return [block]
    cuts = {0, len(block)}
    for pattern in _RUNS:
        for run in pattern.finditer(block):
            cuts.update(range(run.start() + max_run_chars, run.end(), max_run_chars))
    places = sorted(cuts)
    return [block[a:b] for a, b in itertools.pairwise(places)]
