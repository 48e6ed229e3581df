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

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4cli import terminal
from l4cli.commands.options import LENGTHS, Device, DeviceOption, Json, Quiet, parse_number
from l4cli.errors import L4Error, UsageError, suggest

if TYPE_CHECKING:
    from l4cli.commands.bench_cases import Case, Figures, Side
    from l4cli.model import Llama4Config

KINDS = ("decode", "prefill", "train")
PEERS = ("llama.cpp", "transformers")
ROOFLINE_PRESETS = ("scout", "maverick")


class BenchDtype(StrEnum):
    """Precision of the weights; `auto` is as stored."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def bench(
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
    dtype: Annotated[BenchDtype, typer.Option(help="precision; auto: as stored")] = BenchDtype.auto,
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
    if roofline:
        _roofline(target, gpus, depths, batches)
        return
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
    _Bench(plan, asked, llama_bench, gguf, threads, str(device), str(dtype)).run(target)


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    kinds: tuple[str, ...]
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    seq_len: int
    batch_size: int
    repeats: int

    def answering(self) -> list[Case]:
        """Decode by depth and batch, prefill by depth and length."""
        from l4cli.commands.bench_cases import DECODE, PREFILL, Case

        cases = []
        if DECODE in self.kinds:
            cases += [
                Case(DECODE, self.new_tokens, d, b) for d in self.depths for b in self.batches
            ]
        if PREFILL in self.kinds:
            cases += [Case(PREFILL, p, d) for d in self.depths for p in self.prompts]
        return cases

    def training(self) -> list[Case]:
        from l4cli.commands.bench_cases import TRAIN, Case

        is_asked = TRAIN in self.kinds
        return [Case(TRAIN, self.seq_len, batch=self.batch_size)] if is_asked else []


class _Bench:
    """One run: finds the model and the programs, measures, shows."""

    def __init__(
        self,
        plan: Plan,
        peers: Sequence[str],
        llama_bench: Path | None,
        gguf: Path | None,
        threads: int | None,
        device: str,
        dtype: str,
    ) -> None:
        import torch

        from l4cli.commands.bench_cases import Figures
        from l4cli.commands.bench_peers import find_llama_bench
        from l4cli.training.device import num_threads, torch_device

        self.plan, self.peers, self.gguf = plan, peers, gguf
        self.device, self.dtype = torch_device(device), dtype
        self.num_threads = threads or num_threads()
        torch.set_num_threads(self.num_threads)
        self.llama_bench = find_llama_bench(llama_bench) if self._wants("llama.cpp") else None
        self.figures: Figures = Figures()
        self.notes: list[str] = []

    def run(self, target: str | None) -> None:
        """Measure answering, then training, each with what it needs in memory."""
        from l4cli.checkpoint import load_config

        load_before = os.getloadavg()
        with ExitStack() as stack:
            folder, name = self._folder(target, stack)
            self.config: Llama4Config = load_config(folder, allow_quantized=True)
            self._check_lengths()
            stored = _stored_dtype(folder)
            self.compute = stored if self.dtype == "auto" else self.dtype
            names = ["l4"]
            for cases, make in (
                (self.plan.answering(), self._answering_sides),
                (self.plan.training(), self._training_sides),
            ):
                if cases:
                    sides = make(folder, stack)
                    names += [side.name for side in sides if side.name not in names]
                    self._measure(cases, sides)
                    del sides  # weights of one half make room for those of the other
        self._show(name, names, load_before)

    def _wants(self, peer: str) -> bool:
        return peer in self.peers or "auto" in self.peers

    def _folder(self, target: str | None, stack: ExitStack) -> tuple[Path, str]:
        """The checkpoint, or a temporary one with random weights of a preset."""
        from l4cli.commands import chat_model

        if target is None or not target.startswith("preset:"):
            folder = chat_model.find(None if target is None else Path(target))
            return folder, str(folder)
        from l4cli.commands.bench_preset import write_preset

        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l4-bench-")))
        dtype = "bf16" if self.dtype == "auto" else self.dtype
        return write_preset(target.removeprefix("preset:"), place / "model", dtype), target

    def _check_lengths(self) -> None:
        room = self.config.text.max_position_embeddings
        longest = max([0, *(c.depth + c.num_tokens for c in self.plan.answering())])
        longest = max([longest, *(case.num_tokens for case in self.plan.training())])
        if longest >= room:
            why = f"{longest} tokens are needed, the model has room for {room}"
            fix = "shorten `--prompt`, `--depth` or `--seq-len`"
            raise UsageError("the texts are too long", why=why, fix=fix)

    def _answering_sides(self, folder: Path, stack: ExitStack) -> list[Side]:
        from l4cli.commands import bench_peers
        from l4cli.commands.bench_ours import OurEngine

        vocab_size = self.config.text.vocab_size
        engine = OurEngine(folder, str(self.device.type), self.dtype, vocab_size)
        sides: list[Side] = [engine]
        file = self._gguf_file(folder, stack)
        if file is not None:
            assert self.llama_bench is not None
            sides.append(bench_peers.LlamaBench(self.llama_bench, file, self.num_threads))
        if self._has_transformers():
            sides.append(bench_peers.Transformers(folder, self.device, self.compute, vocab_size))
        return sides

    def _training_sides(self, folder: Path, stack: ExitStack) -> list[Side]:
        from l4cli.commands.bench_ours import OurTraining
        from l4cli.commands.bench_peers import TransformersTraining
        from l4cli.planning import available_memory, training_bytes

        needed = training_bytes(
            self.config, "adamw", self.compute, self.plan.batch_size, self.plan.seq_len
        )
        free = available_memory(str(self.device))
        if sum(needed.values()) > free:
            text = terminal.bytes_text
            why = f"a step needs {text(sum(needed.values()))}, {text(free)} of memory are free"
            if self.plan.kinds == ("train",):
                fix = "lower `--batch-size` or `--seq-len`, or use a smaller model"
                raise L4Error("cannot measure training", why=why, fix=fix)
            self._note(f"training is left out: {why}")
            return []
        sides: list[Side] = [OurTraining(folder, self.device, self.compute)]
        if self._has_transformers():
            vocab_size = self.config.text.vocab_size
            sides.append(TransformersTraining(folder, self.device, self.compute, vocab_size))
        return sides

    def _gguf_file(self, folder: Path, stack: ExitStack) -> Path | None:
        """The file llama.cpp reads: the one named, or made of the same weights for the while."""
        from l4cli.commands.bench_peers import why_no_gguf

        if not self._wants("llama.cpp"):
            return None
        reason = "`llama-bench` is not on the PATH" if self.llama_bench is None else None
        if reason is None and self.gguf is None:
            reason = why_no_gguf(self.config)
        if reason is not None:
            self._leave_out("llama.cpp", reason)
            return None
        if self.gguf is not None:
            return self.gguf
        from l4cli.checkpoint.gguf_file import write_gguf
        from l4cli.checkpoint.parameters import ParameterReader
        from l4cli.text import load_tokenizer

        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l4-bench-")))
        kind = {"fp32": "f32"}.get(self.compute, self.compute)
        write_gguf(ParameterReader(folder), load_tokenizer(folder), place / "model.gguf", kind)
        return place / "model.gguf"

    def _has_transformers(self) -> bool:
        from l4cli.commands.bench_peers import why_no_transformers

        if not self._wants("transformers"):
            return False
        reason = why_no_transformers(self.config)
        if reason is not None:
            self._leave_out("transformers", reason)
        return reason is None

    def _leave_out(self, peer: str, reason: str) -> None:
        if peer in self.peers:  # asked for by name
            fix = f"leave `{peer}` out of `--peers`"
            raise L4Error(f"cannot measure {peer}", why=reason, fix=fix)
        self._note(f"{peer} is left out: {reason}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            terminal.say(text)

    def _measure(self, cases: list[Case], sides: list[Side]) -> None:
        from l4cli.commands.bench_cases import measure
        from l4cli.planning import BandwidthProbe
        from l4cli.planning.machine import measure_gemm_rate

        if not sides:
            return
        probe, device = BandwidthProbe(str(self.device)), str(self.device)
        ceilings = {
            "read": lambda: probe.measure(self.num_threads),
            "products": lambda: measure_gemm_rate(self.compute, device),
        }
        measure(cases, sides, ceilings, self.plan.repeats, self.figures)

    def _shares(self) -> dict[Case, tuple[str, float]]:
        """What of which ceiling one token a second takes."""
        from l4cli.commands.bench_cases import DECODE, PREFILL
        from l4cli.planning import STORAGES, flops_per_token, step_cost
        from l4cli.planning.roofline import prefill_flops

        shares: dict[Case, tuple[str, float]] = {}
        kv_bytes = 4.0 if self.compute == "fp32" else 2.0
        for case in self.figures.rates:
            if case.what == DECODE:
                # Halfway through the answer.
                depth = case.depth + case.num_tokens // 2
                storage = STORAGES[self.compute]
                cost = step_cost(self.config, storage, depth, case.batch, kv_bytes)
                shares[case] = ("read", cost.read_bytes / case.batch)
            elif case.what == PREFILL:
                flops = prefill_flops(self.config.text, case.num_tokens, case.depth)
                shares[case] = ("products", flops / case.num_tokens)
            else:
                shares[case] = ("products", flops_per_token(self.config, case.num_tokens))
        return shares

    def _show(self, name: str, sides: list[str], load_before: tuple[float, ...]) -> None:
        import torch

        from l4cli.commands.bench_cases import events, show

        shares = self._shares()
        read = self.figures.ceiling("read") if self.figures.ceilings else 0.0
        products = self.figures.ceiling("products") if self.figures.ceilings else 0.0
        loads = [round(load, 1) for load in (load_before[0], os.getloadavg()[0])]
        for event in events(self.figures, shares):
            terminal.emit(event)
        terminal.emit(
            {
                "event": "done",
                "model": name,
                "dtype": self.compute,
                "device": str(self.device),
                "threads": self.num_threads,
                "repeats": self.plan.repeats,
                "load_average": loads,
                "torch": torch.__version__,
                "read_bytes_per_sec": read,
                "products_per_sec": products,
                "notes": self.notes,
            }
        )
        terminal.result(
            f"{name}: {self.compute}, {self.device}, {self.num_threads} threads, medians of "
            f"{self.plan.repeats} rounds, load {loads[0]} -> {loads[1]}\n"
            f"memory is read at {read / 1e9:.1f} GB/s, {self.compute} products at "
            f"{products / 1e9:.0f} GFLOP/s"
        )
        show(self.figures, sides, shares)


def _stored_dtype(folder: Path) -> str:
    from l4cli.checkpoint import open_weights

    names = {"F32": "fp32", "BF16": "bf16"}
    return names.get(next(iter(open_weights(folder).dtypes)), "fp32")


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
