"""Learn a tokenizer from text: byte-level BPE with Llama 4's split pattern and special tokens.

Input is files, folders, patterns or stdin (`-`), read as `l4 tokenize` reads them. The folder it
writes opens in `l4` and in transformers.

examples:
  l4 train-tokenizer docs/ --vocab-size 8192 -o tok/
  cat book.txt | l4 train-tokenizer --vocab-size 4096 -o tok/
  l4 train-tokenizer chats.jsonl 'src/**/*.py' -o tok/
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4cli import terminal
from l4cli.commands.options import Json, Quiet
from l4cli.data.inputs import STDIN, InputFormat, Inputs
from l4cli.errors import L4Error, UsageError

if TYPE_CHECKING:
    from l4cli.data.documents import Report
    from l4cli.data.rows import Row
    from l4cli.text import Tokenizer

SAMPLE_CHARS = 1 << 20  # of the text, to say how far a token reaches


def train_tokenizer(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="files, folders, patterns, or `-` for stdin")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="new folder, must not exist or be empty")
    ] = Path("runs/train-tokenizer"),
    vocab_size: Annotated[
        int, typer.Option(help="tokens in all, bytes and special ones included", max=1 << 20)
    ] = 8192,
    all_special: Annotated[
        bool, typer.Option("--all-special", help="hold all 2,048 special tokens of Llama 4")
    ] = False,
    format: Annotated[
        InputFormat | None, typer.Option(help="how to read all files; by file name if not given")
    ] = None,
    text_key: Annotated[
        str | None, typer.Option(help="key of the text in JSONL rows; stdin is then JSONL")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave bad documents out and report them")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    if text_key is not None and format not in (None, InputFormat.jsonl):
        why = f"`--format {format}` has no keys"
        raise UsageError("`--text-key` needs rows", why=why, fix="leave one of the two out")
    names = _input_names(inputs)
    _check_vocab_size(vocab_size, all_special)
    asked = Inputs(names, format, stdin_is_rows=text_key is not None)
    total_bytes = asked.total_bytes()  # finds missing inputs before any work

    from l4cli.data.staging import StagedFolder

    terminal.say(f"vocab_size {vocab_size}  all_special {all_special}  -> {out}")
    job = _Job(asked, text_key, skip_bad)
    with StagedFolder(out) as staged:
        tokenizer = job.train(vocab_size, all_special, total_bytes)
        try:
            tokenizer.save(staged.path)
            staged.commit()
        except OSError as error:
            raise staged.failed(error) from error
    job.tell(tokenizer, vocab_size, out)


def _input_names(inputs: list[str] | None) -> list[str]:
    names = inputs or [STDIN]
    if not inputs and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(
            "nothing to learn from",
            why="no file is named, and nothing is piped in",
            fix="name files or folders: `l4 train-tokenizer docs/ -o tok/`",
        )
    if names.count(STDIN) > 1:
        raise UsageError(
            "`-` is given twice", why="stdin can be read only once", fix="give it once"
        )
    return names


def _check_vocab_size(vocab_size: int, all_special: bool) -> None:
    from l4cli.text.training import min_vocab_size

    smallest = min_vocab_size(all_special)
    if vocab_size < smallest:
        special = smallest - 256
        raise UsageError(
            f"`--vocab-size {vocab_size}` is too small",
            why=f"256 bytes and {special} special tokens are {smallest}",
            fix=f"pass `--vocab-size {smallest}` or more"
            + (", or leave `--all-special` out" if all_special else ""),
        )


class _Job:
    """One run: reads, learns, and says what it did."""

    def __init__(self, inputs: Inputs, text_key: str | None, skip_bad: bool) -> None:
        from l4cli.data.documents import Report

        self.inputs, self.text_key = inputs, text_key
        self.report: Report = Report(skip_bad)
        self.num_documents = self.num_bytes = 0
        self.sample: list[str] = []
        self._num_sampled = 0
        self._has_text = False
        self._start_s = time.monotonic()

    def train(self, vocab_size: int, all_special: bool, total_bytes: int | None) -> Tokenizer:
        """Learn from all inputs."""
        from l4cli.text.loading import ranked_tokenizer
        from l4cli.text.training import train_vocabulary

        with terminal.progress("train-tokenizer", total_bytes) as bar:
            texts = self._texts(bar)
            vocabulary = train_vocabulary(texts, vocab_size, all_special=all_special)
        if not self._has_text:
            left_out = [f"{n} {reason}" for reason, n in self._left_out().items()]
            why = "no text was found" + (f"; left out: {', '.join(left_out)}" if left_out else "")
            raise L4Error(
                "there is nothing to learn from", why=why, fix="name files that hold text"
            )
        return ranked_tokenizer(vocabulary, name="trained")

    def _texts(self, bar: terminal.Progress) -> Iterator[str]:
        """Stream the texts of all inputs, in pieces of bounded size."""
        from l4cli.data.documents import (
            BadInput,
            DocumentReader,
            PictureFile,
            TextPart,
            VideoFile,
        )
        from l4cli.data.rows import parse_row
        from l4cli.text.splitting import blocks

        for unit in DocumentReader(self.inputs, blocks, self.report).units():
            for item in unit.items:
                if isinstance(item, PictureFile):
                    self.inputs.skipped["pictures"] += 1
                    continue
                if isinstance(item, VideoFile):
                    self.inputs.skipped["videos"] += 1
                    continue
                if isinstance(item, TextPart):
                    self.num_documents += item.ends
                    yield self._sampled(item.text)
                    continue
                try:
                    texts = _texts_of(parse_row(item, self.text_key))
                except BadInput as error:
                    self.report.leave_out(error)
                    continue
                self.num_documents += 1
                yield from map(self._sampled, texts)
            self.num_bytes += unit.num_bytes
            bar.update(self.num_bytes + self.inputs.skipped_bytes, **self._figures())
        # The bar stands still from here on: merging takes about as long as reading.
        terminal.say(f"read {terminal.bytes_text(self.num_bytes)}, now merging")

    def _sampled(self, text: str) -> str:
        self._has_text |= bool(text) and not text.isspace()
        if self._num_sampled < SAMPLE_CHARS:
            self.sample.append(text[: SAMPLE_CHARS - self._num_sampled])
            self._num_sampled += len(self.sample[-1])
        return text

    def _figures(self) -> dict[str, str]:
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        return {
            "mb_per_sec": f"{self.num_bytes / 1e6 / seconds:.1f}",
            "num_documents": terminal.count_text(self.num_documents),
        }

    def _left_out(self) -> dict[str, int]:
        return {**+self.inputs.skipped, **self.report.bad}

    def tell(self, tokenizer: Tokenizer, asked_size: int, out: Path) -> None:
        """Say what was learned and what was left out."""
        for reason, error in self.report.first.items():
            count = self.report.bad[reason]
            terminal.warn(f"left out {count} bad: {reason}; first {error.what}: {error.why}")
        for reason, count in (+self.inputs.skipped).items():
            terminal.say(f"left out {count} {reason}")
        if tokenizer.vocab_size < asked_size:
            terminal.warn(
                f"the text gave {tokenizer.vocab_size} tokens of the {asked_size} asked for: "
                "no other pair occurs twice; give more text for a larger vocabulary"
            )
        text = "".join(self.sample)
        bytes_per_token = len(text.encode()) / len(tokenizer.encode(text))
        seconds = time.monotonic() - self._start_s
        terminal.say(
            f"{tokenizer.vocab_size} tokens from {self.num_documents} documents, "
            f"{terminal.bytes_text(self.num_bytes)} in {terminal.time_text(seconds)}; "
            f"{bytes_per_token:.2f} bytes a token -> {out}"
        )
        event: dict[str, Any] = {
            "event": "done",
            "out": str(out),
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "bytes_per_token": round(bytes_per_token, 4),
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "skipped": dict(+self.inputs.skipped),
            "bad": dict(self.report.bad),
        }
        terminal.emit(event)


def _texts_of(row: Row) -> Iterator[str]:
    """Give what people wrote in a row: its texts, or what its messages say."""
    yield from row.texts
    for message in row.messages or []:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (item["text"] for item in content if isinstance(item.get("text"), str))
