"""Measure reading, answering and training here, with ceilings and other programs beside them.

TARGET is a checkpoint, a run folder, or `preset:NAME` with random weights. Every round measures
every case by every program in turn, and how fast memory is read and matrices are multiplied; the
table holds medians. llama.cpp's `llama-bench` (on the PATH or named) and transformers join when
they are there. `--roofline` measures nothing: it works out how fast Llama 4 can answer at best on
named GPUs, beside what others quote.

examples:
  l4 bench runs/nano/latest
  l4 bench preset:mini --what decode --depth 0,2k --batch 1,8 --threads 2
  l4 bench scout/ --prompt 512,2048 --llama-bench llama.cpp/build/bin --gguf scout-q4_0.gguf
  l4 bench --roofline --gpus h100,b200,mi300x --depth 0,128k
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from l4cli import terminal
from l4cli.commands.options import (
    LENGTHS,
    Device,
    DeviceOption,
    Json,
    Quiet,
    WeightsDtype,
    parse_number,
)
from l4cli.errors import UsageError, suggest

KINDS = ("decode", "prefill", "train")
PEERS = ("llama.cpp", "transformers")
ROOFLINE_PRESETS = ("scout", "maverick")
_OF_ROOFLINE = {"target", "roofline", "gpus", "depth", "batch", "json", "quiet"}


class RandomFormat(StrEnum):
    """How a preset's random weights are stored."""

    plain = "plain"
    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"


def bench(
    ctx: typer.Context,
    target: Annotated[
        str | None, typer.Argument(help="checkpoint, run folder or `preset:NAME`")
    ] = None,
    what: Annotated[str, typer.Option(help="what to measure")] = "decode,prefill,train",
    prompt: Annotated[str, typer.Option(help="tokens to read, for prefill")] = "512",
    depth: Annotated[str, typer.Option(help="tokens read before, for prefill and decode")] = "0",
    batch: Annotated[str, typer.Option(help="sequences side by side, for decode")] = "1",
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write, for decode")] = 32,
    seq_len: Annotated[str, typer.Option(help="tokens of a row, for train")] = "512",
    batch_size: Annotated[int, typer.Option(min=1, help="rows of a step, for train")] = 4,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of every program  [default: all cores]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds, after one that warms up")] = 3,
    format: Annotated[
        RandomFormat, typer.Option(help="of a preset's random weights")
    ] = RandomFormat.plain,
    dtype: Annotated[
        WeightsDtype, typer.Option(help="precision; auto: as stored")
    ] = WeightsDtype.auto,
    peers: Annotated[
        str, typer.Option(help="`auto`, `none`, or of `llama.cpp,transformers`")
    ] = "auto",
    llama_bench: Annotated[
        Path | None, typer.Option(help="llama.cpp's program or its folder  [default: on the PATH]")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="its file  [default: made by `l4 convert` for the while]")
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="only work out decode ceilings of named GPUs")
    ] = False,
    gpus: Annotated[str, typer.Option(help="GPUs of the roofline")] = "h100,h200,b200,mi300x",
    device: DeviceOption = Device.auto,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    depths = _numbers(depth, "--depth", allows_zero=True)
    batches = _numbers(batch, "--batch")
    given = {name for name in ctx.params if _is_given(ctx, name)}
    _check_together(given, roofline, peers)
    if roofline:
        _roofline(target, gpus, depths, batches)
        return
    from l4cli.commands.bench_plan import Plan

    plan = Plan(
        kinds=_words(what, "--what", KINDS),
        prompts=_numbers(prompt, "--prompt"),
        depths=depths,
        batches=batches,
        new_tokens=new_tokens,
        seq_len=parse_number(seq_len, "--seq-len", "512", LENGTHS),
        batch_size=batch_size,
        repeats=repeats,
    )
    asked = () if peers == "none" else _words(peers, "--peers", ("auto", *PEERS))
    if gguf is not None and not gguf.is_file():
        raise UsageError(
            f"cannot use `--gguf {gguf}`", why="there is no such file", fix="check the path"
        )
    is_preset = target is not None and target.startswith("preset:")
    if format is not RandomFormat.plain and not is_preset:
        why = "a checkpoint has a format of its own"
        fix = "quantize it with `l4 quantize`, or name a `preset:NAME`"
        raise UsageError(f"`--format {format}` without a preset", why=why, fix=fix)
    from l4cli.commands.bench_run import Bench

    job = Bench(plan, asked, llama_bench, gguf, threads, str(device), str(dtype))
    job.run(target, None if format is RandomFormat.plain else str(format))


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_together(given: set[str], roofline: bool, peers: str) -> None:
    """Refuse what would have no effect. raises: UsageError"""
    if roofline:
        why, unused = "`--roofline` measures nothing", given - _OF_ROOFLINE
    elif "gpus" in given:
        why, unused = "they are the GPUs of `--roofline`", {"gpus"}
    elif not {"auto", "llama.cpp"} & {word.strip() for word in peers.split(",")}:
        why, unused = f"`--peers {peers}` leaves llama.cpp out", given & {"llama_bench", "gguf"}
    else:
        return
    if unused:
        option = "--" + min(unused).replace("_", "-")
        raise UsageError(f"cannot use `{option}`", why=why, fix="leave it out")


def _roofline(
    target: str | None, gpus: str, depths: tuple[int, ...], batches: tuple[int, ...]
) -> None:
    from l4cli.checkpoint import load_config
    from l4cli.commands.bench_roofline import parse_gpus, show_roofline
    from l4cli.model import load_preset

    names = parse_gpus(gpus)
    if target is None:
        models = [(name, load_preset(name)) for name in ROOFLINE_PRESETS]
    elif target.startswith("preset:"):
        name = target.removeprefix("preset:")
        models = [(name, load_preset(name))]
    else:
        models = [(target, load_config(Path(target), allow_quantized=True))]
    show_roofline(models, names, depths, batches)


def _numbers(text: str, option: str, *, allows_zero: bool = False) -> tuple[int, ...]:
    """`0,2k`."""
    words = [word.strip() for word in text.split(",")]
    found = [
        0 if allows_zero and word == "0" else parse_number(word, option, "512,2k", LENGTHS)
        for word in words
    ]
    return tuple(dict.fromkeys(found))


def _words(text: str, option: str, known: Sequence[str]) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            why = "known are " + ", ".join(f"`{name}`" for name in known)
            raise UsageError(f"unknown `{option} {word}`", why=why, fix=suggest(word, known))
    return tuple(dict.fromkeys(words))
