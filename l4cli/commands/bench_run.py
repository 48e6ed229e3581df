"""One run of `l4 bench`: finds the model and the programs, measures, shows.

in: a plan, peers, a target; out: a table or JSON lines; raises L4Error for what cannot be measured
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from l4cli import terminal
from l4cli.checkpoint import load_config, open_weights
from l4cli.checkpoint.gguf_file import kind_of_codes, write_gguf
from l4cli.checkpoint.parameters import ParameterReader
from l4cli.commands import bench_peers, chat_model
from l4cli.commands.bench_cases import (
    DECODE,
    PREFILL,
    READ,
    Case,
    Figures,
    Side,
    events,
    measure,
    show,
)
from l4cli.commands.bench_ours import OurEngine, OurTraining, native_weight_bytes
from l4cli.commands.bench_plan import Plan
from l4cli.commands.bench_preset import write_preset
from l4cli.errors import L4Error, UsageError
from l4cli.inference.native import NativeModel
from l4cli.model import Llama4Config
from l4cli.planning import (
    STORAGES,
    BandwidthProbe,
    available_memory,
    flops_per_token,
    step_cost,
    training_bytes,
)
from l4cli.planning.machine import measure_gemm_rate
from l4cli.planning.roofline import prefill_flops
from l4cli.text import load_tokenizer
from l4cli.training.device import num_threads, torch_device


class Bench:
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
        self.plan, self.peers, self.gguf = plan, peers, gguf
        self.device, self.dtype = torch_device(device), dtype
        self.num_threads = threads or num_threads()
        torch.set_num_threads(self.num_threads)
        self.llama_bench = (
            bench_peers.find_llama_bench(llama_bench) if self._wants("llama.cpp") else None
        )
        self.figures: Figures = Figures()
        self.notes: list[str] = []
        self.native: NativeModel | None = None

    def run(self, target: str | None, format: str | None) -> None:
        """Measure answering, then training, each with what it needs in memory."""
        load_before = os.getloadavg()
        with ExitStack() as stack:
            folder, name = self._folder(target, format, stack)
            self.config: Llama4Config = load_config(folder)
            self._check_lengths()
            self._find_precision(folder)
            names = ["l4"]
            if self.plan.answering():
                sides = self._answering_sides(folder, stack)
                names += [side.name for side in sides[1:]]
                self._measure(self.plan.answering(), sides, self.products)
                del sides  # their weights make room for those that are trained
            if self.plan.training():
                sides = self._training_sides(folder)
                names += [side.name for side in sides if side.name not in names]
                self._measure(self.plan.training(), sides, self.compute)
        self._show(name, names, load_before)

    def _wants(self, peer: str) -> bool:
        return peer in self.peers or "auto" in self.peers

    def _find_precision(self, folder: Path) -> None:
        """What the weights are stored in, and what is computed in where torch computes."""
        formats = sorted(map(str, ParameterReader(folder).formats()))
        self.is_quantized = bool(formats)
        names = {"F32": "fp32", "BF16": "bf16"}
        stored = names.get(next(iter(open_weights(folder).dtypes)), "fp32")
        plain = "bf16" if self.is_quantized else stored
        self.compute = plain if self.dtype == "auto" else self.dtype
        self.products = self.compute
        self.weights = ", ".join(formats) or self.compute

    def _folder(self, target: str | None, format: str | None, stack: ExitStack) -> tuple[Path, str]:
        """The checkpoint, or a temporary one with random weights of a preset."""
        if target is None or not target.startswith("preset:"):
            folder = chat_model.find(None if target is None else Path(target))
            return folder, str(folder)

        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l4-bench-")))
        dtype = "bf16" if self.dtype == "auto" else self.dtype
        name = target.removeprefix("preset:")
        return write_preset(name, place / "model", dtype, format), target

    def _check_lengths(self) -> None:
        room = self.config.text.max_position_embeddings
        longest = max([0, *(c.depth + c.num_tokens for c in self.plan.answering())])
        longest = max([longest, *(case.num_tokens for case in self.plan.training())])
        if longest >= room:
            why = f"{longest} tokens are needed, the model has room for {room}"
            fix = "shorten `--prompt`, `--depth` or `--seq-len`"
            raise UsageError("the texts are too long", why=why, fix=fix)

    def _answering_sides(self, folder: Path, stack: ExitStack) -> list[Side]:
        vocab_size = self.config.text.vocab_size
        engine = OurEngine(folder, str(self.device.type), self.dtype, vocab_size)
        self.native = engine.native
        if self.native is not None:
            if self.weights.startswith("int"):
                self.products = "int8"  # what these codes are multiplied as
            self.weights += f", in C++ ({self.native.instructions})"
        sides: list[Side] = [engine]
        file = self._gguf_file(folder, stack)
        if file is not None:
            assert self.llama_bench is not None
            sides.append(bench_peers.LlamaBench(self.llama_bench, file, self.num_threads))
        if self._has_transformers(trains=False):
            sides.append(bench_peers.Transformers(folder, self.device, self.compute, vocab_size))
        return sides

    def _training_sides(self, folder: Path) -> list[Side]:
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
        if self._has_transformers(trains=True):
            vocab_size = self.config.text.vocab_size
            sides.append(
                bench_peers.TransformersTraining(folder, self.device, self.compute, vocab_size)
            )
        return sides

    def _gguf_file(self, folder: Path, stack: ExitStack) -> Path | None:
        """The file llama.cpp reads: the one named, or made of the same weights for the while."""
        if not self._wants("llama.cpp"):
            return None
        reason = "`llama-bench` is not on the PATH" if self.llama_bench is None else None
        if reason is None and self.gguf is None:
            reason = bench_peers.why_no_gguf(self.config)
        if reason is not None:
            self._leave_out("llama.cpp", reason)
            return None
        if self.gguf is not None:
            return self.gguf

        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l4-bench-")))
        parameters = ParameterReader(folder)
        kind = kind_of_codes(parameters) or {"fp32": "f32"}.get(self.compute, self.compute)
        write_gguf(parameters, load_tokenizer(folder), place / "model.gguf", kind)
        return place / "model.gguf"

    def _has_transformers(self, *, trains: bool) -> bool:
        if not self._wants("transformers"):
            return False
        reason = bench_peers.why_no_transformers(
            self.config, is_quantized=self.is_quantized, trains=trains
        )
        if trains and self.is_quantized:
            self._note(f"transformers is left out of training: {reason}")
        elif reason is not None:
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

    def _measure(self, cases: list[Case], sides: list[Side], products: str) -> None:
        """`products`: the dtype whose products are the ceiling."""
        if not sides:
            return
        probe, device = BandwidthProbe(str(self.device)), str(self.device)
        ceilings = {
            READ: lambda: probe.measure(self.num_threads),
            f"{products} products": lambda: measure_gemm_rate(products, device),
        }
        measure(cases, sides, ceilings, self.plan.repeats, self.figures)

    def _shares(self) -> dict[Case, tuple[str, float]]:
        """What of which ceiling one token a second takes."""
        shares: dict[Case, tuple[str, float]] = {}
        products, text = f"{self.products} products", self.config.text
        kv_bytes = 4.0 if self.compute == "fp32" else 2.0
        for case in self.figures.rates:
            if case.what == DECODE:
                depth = case.depth + case.num_tokens // 2  # halfway through the answer
                storage = STORAGES[self.compute]
                cost = step_cost(self.config, storage, depth, case.batch, kv_bytes)
                read_bytes = cost.read_bytes
                if self.native is not None:
                    weights = native_weight_bytes(self.native, case.batch)
                    read_bytes = weights + cost.cache_bytes
                shares[case] = (READ, read_bytes / case.batch)
            elif case.what == PREFILL:
                flops = prefill_flops(text, case.num_tokens, case.depth)
                shares[case] = (products, flops / case.num_tokens)
            else:
                flops = flops_per_token(self.config, case.num_tokens)
                shares[case] = (f"{self.compute} products", flops)
        return shares

    def _show(self, name: str, sides: list[str], load_before: tuple[float, ...]) -> None:
        shares = self._shares()
        rates = {name: self.figures.ceiling(name) for name in self.figures.ceilings}
        loads = [round(load, 1) for load in (load_before[0], os.getloadavg()[0])]
        terminal.result(
            f"{name}: {self.weights}, {self.device}, {self.num_threads} threads, medians of "
            f"{self.plan.repeats} rounds, load {loads[0]} -> {loads[1]}\nceilings: "
            + ", ".join(_ceiling_text(name, rate) for name, rate in rates.items())
        )
        for event in events(self.figures, shares):
            terminal.emit(event)
        terminal.emit(
            {
                "event": "done",
                "model": name,
                "dtype": self.compute,
                "weights": self.weights,
                "device": str(self.device),
                "threads": self.num_threads,
                "repeats": self.plan.repeats,
                "load_average": loads,
                "torch": torch.__version__,
                "read_bytes_per_sec": rates.pop(READ, None),
                "products_per_sec": {name.split()[0]: rate for name, rate in rates.items()},
                "notes": self.notes,
            }
        )
        show(self.figures, sides, shares)


def _ceiling_text(name: str, rate: float) -> str:
    if name == READ:
        return f"memory is read at {rate / 1e9:.1f} GB/s"
    return f"{name} {rate / 1e9:.0f} G/s"
