"""Pack a token stream into shards: rows of fixed length, ready to train on.

Documents are placed best-fit within a window, so that nearly every position holds a token; one
longer than a row is split, never within a picture. Documents and rows are shuffled. The folder
appears when all of it is written, or not at all.

examples:
  l4 tokenize docs/ | l4 pack
  l4 pack books.tokens web.tokens --seq-len 4k -o shards/
  l4 pack book.tokens --concat --no-shuffle -o book/
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from l4cli import terminal
from l4cli.commands.options import (
    COUNTS,
    LENGTHS,
    WINDOW_ROWS,
    Json,
    Quiet,
    Seed,
    default_window,
    parse_number,
)
from l4cli.errors import UsageError

STDIN = "-"
MAX_SEQ_LEN = 1 << 24


def pack(
    streams: Annotated[
        list[str] | None,
        typer.Argument(metavar="STREAM", help="what `l4 tokenize` wrote; `-` is stdin"),
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="new folder, must not exist or be empty")
    ] = Path("shards"),
    seq_len: Annotated[
        str, typer.Option("--seq-len", metavar="N", help="tokens in a row, as in `4k`")
    ] = "1024",
    concat: Annotated[
        bool, typer.Option("--concat", help="concatenate documents, cut at every row's end")
    ] = False,
    no_shuffle: Annotated[
        bool, typer.Option("--no-shuffle", help="keep the order of the input")
    ] = False,
    seed: Seed = 0,
    window: Annotated[
        str | None,
        typer.Option(
            "--window",
            metavar="N",
            help="tokens packed and shuffled at a time; bounds memory  [default: 2M or 16 rows]",
        ),
    ] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option("--shard-rows", min=1, help="rows in a file  [default: 128 MiB of them]"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    row_tokens = parse_number(seq_len, "--seq-len", "4k", LENGTHS)
    window_tokens = default_window(row_tokens)
    if window is not None:
        window_tokens = parse_number(window, "--window", "4M", COUNTS)
    _check(row_tokens, window_tokens)
    names = _stream_names(streams)
    method = "concat" if concat else "best-fit"
    terminal.say(
        f"seq_len {row_tokens}  packing {method}  window {window_tokens} tokens  "
        + ("no shuffle" if no_shuffle else f"seed {seed}")
        + f"  -> {out}"
    )
    from l4cli.data.stream_packer import PackingOptions, check_names, pack_streams

    check_names(names)
    options = PackingOptions(method, window_tokens, not no_shuffle, seed)
    began = time.monotonic()
    index = pack_streams(names, out, row_tokens, options, shard_rows)
    _report(index, out, time.monotonic() - began)


def _check(row_tokens: int, window_tokens: int) -> None:
    if row_tokens < 2:
        raise UsageError(
            f"cannot use `--seq-len {row_tokens}`",
            why="a row of one token has nothing to predict",
            fix="write `--seq-len 1k`",
        )
    if row_tokens > MAX_SEQ_LEN:
        raise UsageError(
            f"cannot use `--seq-len {row_tokens}`",
            why=f"rows have at most {MAX_SEQ_LEN} tokens, beyond what any Llama 4 reads",
            fix="write `--seq-len 1m` or less",
        )
    if window_tokens < row_tokens:
        raise UsageError(
            f"cannot pack in a window of {window_tokens} tokens",
            why=f"it is smaller than one row of {row_tokens}",
            fix=f"write `--window {row_tokens * WINDOW_ROWS}` or leave it out",
        )


def _stream_names(streams: Sequence[str] | None) -> list[str]:
    """The streams to read: stdin if none is named."""
    names = list(streams or [STDIN])
    if names.count(STDIN) > 1:
        why = "stdin can be read once"
        raise UsageError("`-` is named twice", why=why, fix="name it once")
    if STDIN in names and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(
            "no token stream to pack",
            why="no file is named and nothing is piped in",
            fix="name a file, or `l4 tokenize docs/ | l4 pack`",
        )
    return names


def _report(index: dict[str, Any], out: Path, time_s: float) -> None:
    keys = ("num_documents", "num_tokens", "num_media", "num_rows", "seq_len", "fill")
    facts = {key: index[key] for key in keys}
    num_shards = len(index["shards"])
    terminal.emit({"event": "done", "shards": str(out), "num_shards": num_shards, **facts})
    pictures = f" and {index['num_media']} pictures" if index["num_media"] else ""
    rate = terminal.count_text(index["num_tokens"] / max(time_s, 1e-9))
    terminal.say(
        f"packed {index['num_tokens']} tokens{pictures} into {index['num_rows']} rows of "
        f"{index['seq_len']} in {num_shards} files: {index['fill']:.2%} full, {rate} tok/s"
    )
    # The last rows of a small input are never full; that is nothing to act on.
    if index["fill"] < 0.97 and index["num_rows"] * (1 - index["fill"]) > 8:
        terminal.warn(
            f"{1 - index['fill']:.0%} of all positions are padding: the documents do not pair up "
            f"in rows of {index['seq_len']}; a larger `--seq-len` or `--concat` fills them"
        )
