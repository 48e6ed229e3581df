"""The options that say what needles look like and what they are hidden in.

in: what was typed; out: a `Haystack` and a `NeedleFormat`
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from l4cli.data.longcontext.haystack import Haystack
    from l4cli.data.longcontext.needles import NeedleFormat

HaystackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--haystack",
        metavar="PATH",
        help="text files, folders or packed shards to hide needles in; may be given several "
        "times  [default: generated sentences]",
    ),
]
NeedleOption = Annotated[
    str | None,
    typer.Option("--needle", help="a needle with `{key}` and `{value}`, such as `#{key}={value};`"),
]
QuestionOption = Annotated[
    str | None,
    typer.Option("--question", help="its question, up to where the value begins: `#{key}=`"),
]
KeysOption = Annotated[
    str | None,
    typer.Option("--keys", help="`words`, `letters:N`, `digits:N` or `uuid`  [default: words]"),
]
ValuesOption = Annotated[
    str | None, typer.Option("--values", help="the same for values  [default: digits:7]")
]


def haystack_of(paths: list[str] | None, *, seed: int = 0, repeat: bool = False) -> Haystack:
    """Open the haystack that was named, or generate one. raises: L4Error if it holds no text"""
    from l4cli.data.longcontext.haystack import Haystack

    if paths:
        return Haystack.from_files(paths, repeat=repeat)
    return Haystack.generated(seed)


def needle_format(
    needle: str | None, question: str | None, keys: str | None, values: str | None
) -> NeedleFormat:
    """Put the format together; what is not given is as usual. raises: UsageError"""
    from l4cli.data.longcontext.needles import format_of

    return format_of(needle, question, keys, values)


def haystack_digest(paths: Sequence[str]) -> str:
    """A hash of names and contents: a haystack that has changed is another one."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (file for file in files if file.is_file()):
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(name.encode(errors="surrogateescape") + b"\0")
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
