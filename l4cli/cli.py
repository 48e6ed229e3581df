"""The front door: a lazy table of commands, the one error boundary, the exit codes.

in: the words on the command line; out: an exit code
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from l4cli import errors, terminal
from l4cli.errors import L4Error, Terminated, UsageError, suggest


@dataclass(frozen=True)
class Command:
    """One row of the table: what is typed, where it lives, what it does."""

    name: str
    help: str
    is_main: bool = False

    @property
    def module(self) -> str:
        return "l4cli.commands." + self.name.replace("-", "_")


COMMANDS = (
    Command("tokenize", "text, code, JSONL, pictures and videos -> a token stream", is_main=True),
    Command("pack", "a token stream -> packed shards", is_main=True),
    Command("pretrain", "train a model on packed shards, or go on training one", is_main=True),
    Command("extend-context", "train a model on longer and longer rows", is_main=True),
    Command("distill", "train small models on what a large one predicts", is_main=True),
    Command("quantize", "make a model small: int4, int8, fp8", is_main=True),
    Command("chat", "talk to a model, with pictures and videos", is_main=True),
    Command("needle-test", "how far a model can read, with controls and a heat map", is_main=True),
    Command("train-tokenizer", "learn a byte-level BPE vocabulary from text"),
    Command("convert", "write a checkpoint as plain Hugging Face, or as GGUF for llama.cpp"),
    Command("bench", "how fast a model reads, answers and trains here, beside other programs"),
    Command("info", "explain any preset, file or folder the suite reads or writes"),
)
_BY_NAME = {command.name: command for command in COMMANDS}


class LazyGroup(TyperGroup):
    """Imports a command's module when it is called, so that `--help` costs nothing."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [command.name for command in COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = _BY_NAME.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(entry.module)
        function = getattr(module, entry.name.replace("-", "_"))
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        text, _, examples = (module.__doc__ or "").partition("examples:")
        epilog = "\b\nexamples:" + examples.rstrip() if examples else None
        app.command(name=entry.name, help=text.strip(), epilog=epilog)(function)
        return typer.main.get_command(app)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in _BY_NAME and not name.startswith("-"):
            why = "`l4` has no such command"
            raise UsageError(f"unknown command `{name}`", why=why, fix=suggest(name, _BY_NAME))
        ctx.meta["l4.words"] = args[1:]  # options of one kind lose their order among others
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _pipe_may_close():  # `--help` is written while options are read
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _pipe_may_close():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help_text())


def _help_text() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = ["usage: l4 COMMAND [ARGS]...", ""]
    lines += ["Text and pictures in, a Llama-4-shaped model you can talk to out.", ""]
    for title, is_main in (("main", True), ("more", False)):
        rows = [f"  {c.name:<{width}}  {c.help}" for c in COMMANDS if c.is_main == is_main]
        rule = max(len(row) for row in rows) + 2
        lines += [f"-- {title} ".ljust(rule, "-"), *rows, ""]
    lines += ["`l4 COMMAND --help` explains one; `sh examples/quickstart.sh` runs them all."]
    lines += ["options: --version  --help"]
    return "\n".join(lines) + "\n"


app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", help="print the version and exit"),
) -> None:
    if version:
        from l4cli import __version__

        print(__version__)
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        print(_help_text(), end="")
        raise typer.Exit(errors.USAGE if len(sys.argv) > 1 else errors.OK)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and turn whatever happens into an exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if (code := _check_output()) != errors.OK:
        return code
    # `finally` blocks remove half-written files, so SIGTERM has to unwind the stack.
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(args)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_output() -> int:
    """See to it that words and data have somewhere to go, and not into a file that we open."""
    if sys.stderr is None:  # closed by the caller: `2>&-`
        _discard(2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if sys.stdout is not None:
        return errors.OK
    why, fix = "it is closed", "leave it open, or discard it with `> /dev/null`"
    terminal.show_error(L4Error("cannot write to standard output", why=why, fix=fix))
    return errors.FAILED


def _run(args: list[str]) -> int:
    try:
        code = typer.main.get_command(app).main(args, prog_name="l4", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else errors.OK
    except L4Error as error:
        terminal.show_error(error)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:
        terminal.show_error(_usage_error(error, args))
        return errors.USAGE
    except (KeyboardInterrupt, typer.Abort):
        return errors.INTERRUPTED
    except Terminated:
        return errors.TERMINATED
    except BrokenPipeError:
        _silence_stdout()
        return errors.CLOSED_PIPE
    except OSError as error:
        if error.errno not in _WORLD_ERRORS:
            return _report_bug(error)
        terminal.show_error(_system_error(error))
        return errors.FAILED
    except Exception as error:
        return _report_bug(error)


_WORLD_ERRORS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "raise the limit of file sizes: `ulimit -f unlimited`",
    errno.EEXIST: "name a path that does not exist yet",
    errno.EACCES: "check the permissions, or name another path",
    errno.EPERM: "check the permissions, or name another path",
    errno.EROFS: "name a path on a writable disk",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.ENAMETOOLONG: "shorten the path",
    errno.EMFILE: "raise the limit of open files: `ulimit -n 4096`",
    errno.EIO: "check the disk",
}


def _system_error(error: OSError) -> L4Error:
    path = error.filename if isinstance(error.filename, str) else None
    why = (error.strerror or str(error)).lower()
    fix = _WORLD_ERRORS[error.errno or 0]
    if path is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        # Writing to an open file names none: it is stdout, or on the disk of what was asked for.
        return L4Error("cannot write all of the output", why=why, fix=fix)
    return L4Error(f"cannot use `{path or 'a file'}`", why=why, fix=fix)


def _usage_error(error: typer.TyperException, args: list[str]) -> UsageError:
    command = args[0] if args and args[0] in _BY_NAME else ""
    call = f"l4 {command} --help" if command else "l4 --help"
    message = error.format_message().strip().rstrip(".").replace("'", "`")
    first, _, rest = message.partition("\n")
    # typer says "No such option: --x Did you mean --y?"; the second half is our `fix:`.
    head, mean, near = first.partition(" Did you mean ")
    if not mean:
        head, mean, near = first.partition(" (Possible options: ")
        near = near.rstrip(")")
    fix = f"did you mean `{near.rstrip('?')}`?  see `{call}`" if mean else f"see `{call}`"
    what = head[:1].lower() + head[1:]
    why = rest.strip() or "the command line does not fit the command"
    return UsageError(what, why=why, fix=fix)


@contextmanager
def _pipe_may_close() -> Iterator[None]:
    """Here, because typer's `main` turns a closed pipe into exit code 1."""
    try:
        yield
    except BrokenPipeError:
        _silence_stdout()
        raise typer.Exit(errors.CLOSED_PIPE) from None


def _silence_stdout() -> None:
    """Keep the interpreter from complaining when it flushes a pipe nobody reads."""
    _discard(sys.stdout.fileno())


def _discard(descriptor: int) -> None:
    """Send what is written to a descriptor nowhere."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    if devnull != descriptor:
        os.dup2(devnull, descriptor)
        os.close(devnull)


def _report_bug(error: BaseException) -> int:
    if os.environ.get("L4_DEBUG"):
        traceback.print_exception(error)
    with tempfile.NamedTemporaryFile(
        "w",
        prefix="l4-bug-",
        suffix=".txt",
        delete=False,
        encoding="utf-8",
        errors="backslashreplace",  # a file name need not be UTF-8
    ) as file:
        file.write("l4 " + " ".join(sys.argv[1:]) + "\n\n")
        traceback.print_exception(error, file=file)
    summary = " ".join(str(error).split())[:200]
    bug = L4Error(
        "a bug in `l4`",
        why=f"{type(error).__name__}: {summary}",
        fix=f"report the traceback in `{file.name}`; `L4_DEBUG=1` shows it",
    )
    terminal.show_error(bug)
    return errors.BUG
