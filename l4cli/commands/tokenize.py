"""Turn text, code, JSONL, pictures and videos into a token stream.

Input is files, folders, patterns or stdin (`-`). Files named `.jsonl` or `.ndjson` hold one
document a row: `text`, or OpenAI-style `messages`, with pictures in `images` and videos in
`videos`; any other file is one document of plain text. PNG, JPEG and video files that are named
become documents of their own. Of a video, `--fps` frames a second are taken, each as one tile; of a
long one `--max-frames`, spread evenly over it.
With `--synthetic` nothing is read: long texts with questions are made, for teaching long context.

examples:
  l4 tokenize docs/ --tokenizer tok/ | l4 pack
  l4 tokenize 'src/**/*.py' README.md -o code.tokens
  cat book.txt | l4 tokenize | l4 pack -o shards/
  l4 tokenize captions.jsonl --preset nano --skip-bad -o captions.tokens
  l4 tokenize films/*.mp4 --preset nano --fps 2 --max-frames 32 -o films.tokens
  l4 tokenize --synthetic retrieval --count 5M --length 512 --hard 0.5 -o needles.tokens
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from l4cli import terminal
from l4cli.commands.longcontext_options import (
    HaystackOption,
    KeysOption,
    NeedleOption,
    QuestionOption,
    ValuesOption,
)
from l4cli.commands.options import (
    DEFAULT_FPS,
    DEFAULT_MAX_FRAMES,
    Fps,
    Json,
    MaxFrames,
    Quiet,
)
from l4cli.commands.synthetic_stream import SyntheticJob, SyntheticOptions
from l4cli.data.inputs import STDIN, InputFormat, Inputs
from l4cli.errors import L4Error, UsageError

if TYPE_CHECKING:
    from l4cli.data.geometry import PictureGeometry
    from l4cli.data.video import Sampling
    from l4cli.text import Tokenizer

EVENT_INTERVAL_S = 10.0


def tokenize(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="files, folders, patterns, or `-` for stdin")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="file to write; stdout if not given")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="`bytes`, a tokenizer folder, a tokenizer.json or tokenizer.model")
    ] = "bytes",
    preset: Annotated[str | None, typer.Option(help="preset whose picture geometry to use")] = None,
    format: Annotated[
        InputFormat | None, typer.Option(help="how to read all files; by file name if not given")
    ] = None,
    text_key: Annotated[
        str | None, typer.Option(help="key of the text in JSONL rows; stdin is then JSONL")
    ] = None,
    fps: Fps = DEFAULT_FPS,
    max_frames: MaxFrames = DEFAULT_MAX_FRAMES,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave bad documents out and report them")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace FILE if it exists")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="threads; all cores if not given")] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(metavar="KINDS", help="make documents: `retrieval`, `copies`, ... or `all`"),
    ] = None,
    count: Annotated[
        str | None, typer.Option(metavar="N", help="tokens of made documents, as in `5M`")
    ] = None,
    length: Annotated[
        str | None, typer.Option(metavar="N", help="tokens of one of them  [default: 512]")
    ] = None,
    haystack: HaystackOption = None,
    needle: NeedleOption = None,
    question: QuestionOption = None,
    keys: KeysOption = None,
    values: ValuesOption = None,
    hard: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="share of `retrieval` documents full of needles"),
    ] = None,
    max_needles: Annotated[
        int | None, typer.Option(min=1, help="needles asked for in one document  [default: 40]")
    ] = None,
    context_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="share of documents that teach all their text"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="seed of what is made  [default: 0]")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    if text_key is not None and format not in (None, InputFormat.jsonl):
        why = f"`--format {format}` has no keys"
        raise UsageError("`--text-key` needs rows", why=why, fix="leave one of the two out")
    made = SyntheticOptions(
        synthetic,
        count,
        length,
        haystack,
        needle,
        question,
        keys,
        values,
        hard,
        max_needles,
        context_share,
        seed,
    )
    if made.are_wanted():
        if inputs:
            why = "made documents come from no input"
            raise UsageError(f"`{inputs[0]}` is not read", why=why, fix="use `--haystack PATH`")
        _check_output(out, json, force)
        _make(made, tokenizer, preset, out)
        return
    names = _input_names(inputs)
    _check_output(out, json, force)
    exclude = _own_output(out)
    asked = Inputs(names, format, stdin_is_rows=text_key is not None, exclude=exclude)
    total_bytes = asked.total_bytes()  # finds missing inputs before any work
    geometry = _geometry(preset, tokenizer)

    from l4cli.data.video import Sampling
    from l4cli.text import load_tokenizer

    sampling = Sampling(fps, max_frames)
    job = _Job(asked, load_tokenizer(tokenizer), geometry, text_key, sampling, skip_bad)
    with _output(out) as file:
        job.run(file, jobs or _num_cores(), total_bytes)
    job.tell(out)


def _make(made: SyntheticOptions, tokenizer: str, preset: str | None, out: Path | None) -> None:

    from l4cli.text import load_tokenizer

    making = SyntheticJob(made, load_tokenizer(tokenizer), _geometry(preset, tokenizer))
    with _output(out) as file:
        making.run(file)
    making.tell(out)


def _input_names(inputs: list[str] | None) -> list[str]:
    if inputs:
        if inputs.count(STDIN) > 1:
            why = "stdin can be read only once"
            raise UsageError("`-` is given twice", why=why, fix="give `-` once")
        return inputs
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "nothing to tokenize",
            why="no file is named, and nothing is piped in",
            fix="name files or folders, or pipe text in: `cat book.txt | l4 tokenize`",
        )
    return [STDIN]


def _num_cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_output(out: Path | None, json: bool, force: bool) -> None:
    if out is None:
        if json:
            why = "the token stream itself goes to stdout"
            raise UsageError("`--json` needs `-o`", why=why, fix="write the stream with `-o FILE`")
        if sys.stdout.isatty():
            raise UsageError(
                "refusing to write a token stream to a terminal",
                why="it is binary",
                fix="write it with `-o FILE`, or pipe it on: `l4 tokenize ... | l4 pack`",
            )
        return
    if out.is_dir():
        fix = f"name a file in it, such as `-o {out / 'docs.tokens'}`"
        raise L4Error(f"cannot write `{out}`", why="it is a folder", fix=fix)
    if out.is_file() and not force:
        fix = "name another file, or replace it with `--force`"
        raise L4Error(f"cannot write `{out}`", why="it exists already", fix=fix)
    if not out.absolute().parent.is_dir():
        why = f"there is no folder `{out.parent}`"
        raise L4Error(f"cannot write `{out}`", why=why, fix=f"make it: `mkdir -p {out.parent}`")


def _own_output(out: Path | None) -> list[tuple[int, int]]:
    """Name the file we write, so that a walk through its folder does not read it."""
    try:
        status = os.stat(out) if out is not None else os.fstat(sys.stdout.fileno())
    except (OSError, ValueError):  # not there yet, or a stdout that is no file
        return []
    return [(status.st_dev, status.st_ino)]


def _geometry(preset: str | None, tokenizer: str) -> PictureGeometry:
    """Take the preset's geometry, else the tokenizer folder's, else Llama 4's."""
    from l4cli.data.geometry import PictureGeometry, read_processor_files

    if preset is None:
        folder = Path(tokenizer) if tokenizer != "bytes" else None
        fix = "repair the file, or take a preset's geometry with `--preset NAME`"
        files = {} if folder is None else read_processor_files(folder, fix)
        return PictureGeometry.from_processor_files(files) or PictureGeometry()

    from l4cli.model import load_preset

    vision = load_preset(preset).vision
    if vision is None:
        why = "it has no vision tower"
        raise UsageError(f"preset `{preset}` reads no pictures", why=why, fix="name another preset")
    return PictureGeometry(vision.image_size, vision.patch_size, vision.pixel_shuffle_ratio)


@contextmanager
def _output(out: Path | None) -> Iterator[BinaryIO]:
    """Write to stdout, or to a temporary file that takes its name only when it is whole."""
    if out is None:
        yield sys.stdout.buffer
        return
    if out.exists() and not out.is_file():  # a named pipe, /dev/null: nothing to replace
        with open(out, "wb") as file:
            yield file
        return
    target = out.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


class _Job:
    """One run: reads, encodes, writes, and says what it did."""

    def __init__(
        self,
        inputs: Inputs,
        tokenizer: Tokenizer,
        geometry: PictureGeometry,
        text_key: str | None,
        sampling: Sampling,
        skip_bad: bool,
    ) -> None:
        from l4cli.data.documents import DocumentReader, Report
        from l4cli.data.encoding import DocumentEncoder
        from l4cli.data.stream import Totals

        # Pillow warns about files that it reads all the same; what it cannot read it raises.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self.inputs, self.tokenizer, self.geometry = inputs, tokenizer, geometry
        self.report, self.totals = Report(skip_bad), Totals()
        self.reader = DocumentReader(inputs, tokenizer.divide, self.report)
        self.encoder = DocumentEncoder(tokenizer, geometry, text_key, sampling)
        self.num_bytes, self.start_s, self._last_s = 0, time.monotonic(), 0.0

    def run(self, file: BinaryIO, jobs: int, total_bytes: int | None) -> None:
        """Write the whole stream."""
        from l4cli.data.encoding import encode_units
        from l4cli.data.stream import StreamWriter

        writer = StreamWriter(file, self.tokenizer, self.geometry)
        self.totals = writer.totals
        units = self.reader.units()
        self.start_s = time.monotonic()
        with terminal.progress("tokenize", total_bytes) as bar:
            for frames, num_bytes in encode_units(units, self.encoder, self.report, jobs):
                for frame in frames:
                    writer.write(frame)
                self.num_bytes += num_bytes
                bar.update(self.num_bytes + self.inputs.skipped_bytes, **self._figures())
                self._emit_progress()
        if self.totals.documents == 0:
            self._refuse_empty()
        writer.close()

    def _refuse_empty(self) -> None:
        passed = [f"{reason}: {count}" for reason, count in self._left_out() if count]
        why = "no document was found" + (f"; left out: {', '.join(passed)}" if passed else "")
        raise L4Error("there is nothing to write", why=why, fix="name files that hold text")

    def _left_out(self) -> list[tuple[str, int]]:
        return [*self.inputs.skipped.items(), *self.report.bad.items()]

    def _speeds(self) -> tuple[float, float]:
        seconds = max(time.monotonic() - self.start_s, 1e-9)
        return self.num_bytes / 1e6 / seconds, self.totals.tokens / seconds

    def _figures(self) -> dict[str, str]:
        mb_per_sec, tok_per_sec = self._speeds()
        return {
            "mb_per_sec": f"{mb_per_sec:.1f}",
            "tok_per_sec": terminal.count_text(tok_per_sec),
            "num_tokens": terminal.count_text(self.totals.tokens),
        }

    def _counts(self) -> dict[str, Any]:
        mb_per_sec, tok_per_sec = self._speeds()
        return {
            "num_documents": self.totals.documents,
            "num_tokens": self.totals.tokens,
            "num_media": self.totals.media,
            "num_videos": self.report.videos["videos"],
            "num_bytes": self.num_bytes,
            "mb_per_sec": round(mb_per_sec, 3),
            "tok_per_sec": round(tok_per_sec, 1),
        }

    def _emit_progress(self) -> None:
        now = time.monotonic()
        if terminal.wants_json() and now - max(self._last_s, self.start_s) >= EVENT_INTERVAL_S:
            self._last_s = now
            terminal.emit({"event": "progress", **self._counts()})

    def tell(self, out: Path | None) -> None:
        """Say what was written and what was left out."""
        for reason, error in self.report.first.items():
            count = self.report.bad[reason]
            terminal.warn(
                f"left out bad documents: {count}, {reason}; first {error.what}: {error.why}"
            )
        for reason, count in self.inputs.skipped.items():
            if count:
                terminal.say(f"left out {reason}: {count}")
        counts, videos = self._counts(), self.report.videos
        if videos["spread"]:
            sampling = self.encoder.sampling
            terminal.say(
                f"longer than `--max-frames {sampling.max_frames}` at `--fps {sampling.fps:g}`: "
                f"{videos['spread']} videos; their frames are spread evenly over them"
            )
        films = f"videos {videos['videos']} of {videos['frames']} frames  "
        terminal.say(
            f"documents {counts['num_documents']}  tokens {counts['num_tokens']}  "
            f"pictures {counts['num_media'] - videos['frames']}  "
            + (films if videos["videos"] else "")
            + f"input {terminal.bytes_text(self.num_bytes)}  "
            f"{counts['mb_per_sec']:.1f} MB/s  {terminal.count_text(counts['tok_per_sec'])} tok/s"
            + (f"  -> {out}" if out else "")
        )
        left_out = {"skipped": dict(+self.inputs.skipped), "bad": dict(self.report.bad)}
        terminal.emit({"event": "done", "out": str(out), **counts, **left_out})
