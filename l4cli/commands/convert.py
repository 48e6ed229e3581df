"""Write a checkpoint in another format: plain Hugging Face, or GGUF for llama.cpp.

`--to hf` writes what any checkpoint here holds (a run's latest, fp32 masters, a quantized one) as
a plain Hugging Face folder, without training state. `--to gguf` writes one file with the text
half and the tokenizer; it needs the `gguf` library (`pip install gguf`). llama.cpp computes one
set of constants of Llama 4, so a shape that it would silently get wrong is refused.

examples:
  l4 convert runs/nano/latest -o nano-bf16/ --to hf --dtype bf16
  l4 convert scout/ -o scout-q4_0.gguf --to gguf --dtype q4_0
  l4 convert runs/nano/latest -o nano.gguf --to gguf --force
"""

from __future__ import annotations

import math
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4cli import terminal
from l4cli.commands.options import Json, Quiet
from l4cli.errors import L4Error, UsageError

if TYPE_CHECKING:
    from l4cli.checkpoint.parameters import ParameterReader


class Target(StrEnum):
    """What to write."""

    hf = "hf"
    gguf = "gguf"


class Precision(StrEnum):
    """How numbers are stored."""

    fp32 = "fp32"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


_PRECISIONS = {
    Target.hf: (Precision.fp32, Precision.bf16),
    Target.gguf: (Precision.fp32, Precision.bf16, Precision.q8_0, Precision.q4_0),
}


DTYPE_HELP = "precision; q8_0 and q4_0 for gguf only  [default: as stored; of floats in gguf: bf16]"


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint or run folder")],
    out: Annotated[Path, typer.Option("-o", "--out", help="new folder, or GGUF file, to write")],
    to: Annotated[Target, typer.Option(help="format to write")] = Target.hf,
    dtype: Annotated[
        Precision | None,
        typer.Option(help=DTYPE_HELP),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="write a GGUF file that llama.cpp computes differently")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    if dtype is not None and dtype not in _PRECISIONS[to]:
        fix = "choose from " + ", ".join(f"`{name}`" for name in _PRECISIONS[to])
        why = "that precision is llama.cpp's, and goes with `--to gguf`"
        raise UsageError(f"`--dtype {dtype}` with `--to {to}`", why=why, fix=fix)
    if force and to is Target.hf:
        why = "it is for GGUF files; everything fits a Hugging Face folder"
        raise UsageError("`--force` with `--to hf`", why=why, fix="leave `--force` out")
    if to is Target.gguf:
        from l4cli.checkpoint.gguf_file import require_gguf

        require_gguf()  # before anything is read
    from l4cli.checkpoint.parameters import ParameterReader

    parameters = ParameterReader(checkpoint)
    if to is Target.hf:
        _write_hf(parameters, out, dtype)
    else:
        from l4cli.checkpoint.gguf_file import kind_of_codes

        kept = kind_of_codes(parameters) or Precision.bf16
        _write_gguf(parameters, out, dtype or Precision(kept), force)


def _write_hf(parameters: ParameterReader, out: Path, dtype: Precision | None) -> None:
    import torch

    from l4cli.checkpoint.rewrite import rewrite
    from l4cli.data.staging import StagedFolder

    kinds = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
    kind = kinds[dtype] if dtype is not None else None
    shapes = parameters.shapes.items()
    total = sum(math.prod(s) * (kind or parameters.dtype(name)).itemsize for name, s in shapes)
    terminal.say(f"`{parameters.folder}` -> `{out}`  dtype {dtype or 'as stored'}")
    start = time.monotonic()
    with StagedFolder(out) as staged:
        try:
            with terminal.progress("convert", total) as bar:
                rewrite(parameters, staged.path, kind, lambda done: bar.update(done))
            size_bytes = sum(p.stat().st_size for p in staged.path.rglob("*") if p.is_file())
            staged.commit()
        except OSError as error:
            raise staged.failed(error) from error
    _tell(out, Target.hf, str(dtype or "stored"), size_bytes, start)


def _write_gguf(parameters: ParameterReader, out: Path, dtype: Precision, force: bool) -> None:
    from l4cli.checkpoint.gguf_file import write_gguf
    from l4cli.text import load_tokenizer

    _check_out(out)
    _check_fit(parameters, force)
    tokenizer = load_tokenizer(parameters.folder)
    if parameters.config.vision is not None:
        terminal.say("the picture encoder stays out: the file holds the text half")
    kind = "f32" if dtype is Precision.fp32 else str(dtype)
    terminal.say(f"`{parameters.folder}` -> `{out}`  dtype {dtype}")
    start = time.monotonic()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with terminal.progress("convert") as bar:
            report = write_gguf(
                parameters,
                tokenizer,
                out,
                kind,
                lambda done: bar.update(done, written=terminal.bytes_text(done)),
            )
    except OSError as error:
        why = (error.strerror or str(error)).lower() + "; nothing was left behind"
        fix = "free some space or check the permissions, or write elsewhere with `-o`"
        raise L4Error(f"cannot write `{out}`", why=why, fix=fix) from error
    if kind in ("q8_0", "q4_0") and "bf16" in report.kinds:
        count = terminal.count_text(report.kinds["bf16"])
        why = "32 does not divide their rows"
        if parameters.formats():
            why = "the checkpoint has no codes for them, or " + why
        terminal.say(f"{count} values stay bf16: {why}")
    _tell(out, Target.gguf, str(dtype), report.size_bytes, start, report.bits_per_weight)


def _check_out(out: Path) -> None:
    what, fix = f"cannot write to `{out}`", "name another file with `-o`"
    if out.is_dir():
        raise L4Error(what, why="a folder stands there", fix=f"name a file: `-o {out}/model.gguf`")
    if out.exists():
        raise L4Error(what, why="a file stands there", fix=f"{fix}, or remove it first")


def _check_fit(parameters: ParameterReader, force: bool) -> None:
    """Refuse what llama.cpp would compute differently, or with `force` say so."""
    from l4cli.checkpoint.gguf_fit import misfits

    found = misfits(parameters.config.text)
    if not found:
        return
    first = found[0]
    more = f"; and {len(found) - 1} more like it" if len(found) > 1 else ""
    what = f"llama.cpp would compute `{parameters.folder}` differently"
    until = "every text" if first.right_tokens == 0 else f"texts above {first.right_tokens} tokens"
    if not first.loads:
        what = f"llama.cpp cannot run `{parameters.folder}`"
        fix = "ask it with `l4 chat`, or write Hugging Face's format with `--to hf`"
        raise L4Error(what, why=f"{first.what}: {first.why}{more}", fix=fix)
    if not force:
        why = f"{first.what}: {first.why}; {until} would come out wrong{more}"
        raise L4Error(what, why=why, fix="ask it with `l4 chat`, or write it anyway with `--force`")
    for misfit in found:
        right = misfit.right_tokens
        until = f"right up to {right} tokens" if right else "wrong from the first token"
        terminal.warn(f"{misfit.what}: {misfit.why}; {until}")


def _tell(
    out: Path, to: Target, dtype: str, size_bytes: int, start: float, bits: float | None = None
) -> None:
    took = time.monotonic() - start
    event = {"event": "done", "out": str(out), "to": str(to), "dtype": dtype, "bytes": size_bytes}
    if bits is not None:
        event["bits_per_weight"] = round(bits, 3)
    terminal.emit(event | {"time_s": round(took, 1)})
    shown = f", {bits:.2f} bits a weight" if bits is not None else ""
    size = terminal.bytes_text(size_bytes)
    terminal.result(f"{out}: {size}{shown}, in {terminal.time_text(took)}")
