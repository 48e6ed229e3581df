"""`l4 tokenize --synthetic`: a token stream of training documents made on the spot.

in: the options of `tokenize` that speak of made documents; out: frames in the stream, a report
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, BinaryIO

from l4cli import terminal
from l4cli.commands.longcontext_options import haystack_of, needle_format
from l4cli.commands.options import LENGTHS, parse_number
from l4cli.commands.training_options import parse_count
from l4cli.errors import UsageError

if TYPE_CHECKING:
    from l4cli.data.geometry import PictureGeometry
    from l4cli.data.stream import Totals
    from l4cli.text import Tokenizer

_DEFAULT_LENGTH = "512"


@dataclass
class SyntheticOptions:
    """What was given on the command line; None where it was not."""

    synthetic: str | None
    count: str | None
    length: str | None
    haystack: list[str] | None
    needle: str | None
    question: str | None
    keys: str | None
    values: str | None
    hard: float | None
    max_needles: int | None
    context_share: float | None
    seed: int | None

    def are_wanted(self) -> bool:
        """Whether to make documents. raises: UsageError for options that mean nothing then"""
        if self.synthetic is not None:
            return True
        for field in fields(self):
            if getattr(self, field.name):
                option = "--" + field.name.replace("_", "-")
                why = "it speaks of documents that are made, and none are asked for"
                fix = "add `--synthetic retrieval`, or leave it out"
                raise UsageError(f"`{option}` needs `--synthetic`", why=why, fix=fix)
        return False

    def num_tokens(self) -> int:
        """How many tokens to write. raises: UsageError"""
        if self.count is None:
            why = "made documents have no end of their own"
            raise UsageError("`--synthetic` needs `--count`", why=why, fix="add `--count 5M`")
        return parse_count(self.count, "--count")


class SyntheticJob:
    """Makes documents, writes them, and says what it did; checks everything before it begins."""

    def __init__(
        self, options: SyntheticOptions, tokenizer: Tokenizer, geometry: PictureGeometry
    ) -> None:
        from l4cli.data.longcontext.teaching import parse_kinds, teaching_documents

        assert options.synthetic is not None
        self.tokenizer, self.geometry = tokenizer, geometry
        self.num_tokens, self.kinds = options.num_tokens(), parse_kinds(options.synthetic)
        self.length = parse_number(options.length or _DEFAULT_LENGTH, "--length", "512", LENGTHS)
        self.fmt = needle_format(options.needle, options.question, options.keys, options.values)
        limits = {} if options.max_needles is None else {"max_needles": options.max_needles}
        self.documents: Iterator[Any] = teaching_documents(
            self.kinds,
            length=self.length,
            tokenizer=tokenizer,
            haystack=haystack_of(options.haystack, seed=options.seed or 0),
            fmt=self.fmt,
            seed=options.seed or 0,
            hard_share=options.hard or 0.0,
            context_share=options.context_share or 0.0,
            **limits,
        )
        self._first = next(self.documents)  # a length that is too short shows before any work
        self._num_targets, self._start_s = 0, 0.0
        self.totals: Totals | None = None

    def run(self, file: BinaryIO) -> None:
        """Write the whole stream."""
        from l4cli.data.longcontext.teaching import teaching_frames
        from l4cli.data.stream import StreamWriter

        writer = StreamWriter(file, self.tokenizer, self.geometry)
        self.totals, self._start_s = writer.totals, time.monotonic()
        with terminal.progress("make documents", self.num_tokens) as bar:
            for frame in teaching_frames(self._all_documents(), self.num_tokens):
                writer.write(frame)
                assert frame.loss_mask is not None
                self._num_targets += int(frame.loss_mask.sum())
                done = min(self.totals.tokens, self.num_tokens)
                bar.update(done, num_tokens=terminal.count_text(self.totals.tokens))
        writer.close()

    def _all_documents(self) -> Iterator[Any]:
        yield self._first
        yield from self.documents

    def tell(self, out: object) -> None:
        """Say what was written."""
        assert self.totals is not None
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        speed = self.totals.tokens / seconds
        share = self._num_targets / self.totals.tokens
        terminal.say(
            f"documents {self.totals.documents}  tokens {self.totals.tokens}  "
            f"targets {self._num_targets} ({share:.1%})  {terminal.count_text(speed)} tok/s"
            + (f"  -> {out}" if out else "")
        )
        terminal.emit(
            {
                "event": "done",
                "out": str(out),
                "kinds": self.kinds,
                "length": self.length,
                "num_documents": self.totals.documents,
                "num_tokens": self.totals.tokens,
                "num_targets": self._num_targets,
                "tok_per_sec": round(speed, 1),
            }
        )
