"""`l4 bench --roofline`: how fast Llama 4 can answer at best on named devices, by arithmetic.

in: presets or configs, devices, depths, batches; out: a table, or JSON lines; nothing is measured
"""

from __future__ import annotations

from collections.abc import Sequence

from l4cli import terminal
from l4cli.errors import UsageError, suggest
from l4cli.model import Llama4Config, load_preset
from l4cli.planning import GPUS, QUOTED, STORAGES, ceiling
from l4cli.planning.roofline import NUM_GPUS, can_compute

SHOWN_STORAGES = ("bf16", "fp8", "int4")


def parse_gpus(text: str) -> list[str]:
    """`h100,b200`. raises: UsageError for a device that is not known"""
    names = [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in GPUS:
            why = "known are " + ", ".join(f"`{known}`" for known in GPUS)
            raise UsageError(f"unknown `--gpus {name}`", why=why, fix=suggest(name, GPUS))
    return names


def show_roofline(
    models: Sequence[tuple[str, Llama4Config]],
    gpus: Sequence[str],
    depths: Sequence[int],
    batches: Sequence[int],
) -> None:
    """Every model, format and device; then what others quote, beside its ceiling."""
    rows, left_out = [], {}
    for name, config in models:
        for storage in SHOWN_STORAGES:
            for gpu in gpus:
                for depth in depths:
                    for batch in batches:
                        row = _row(name, config, storage, gpu, depth, batch)
                        if row is not None:
                            rows.append(row)
                        else:
                            left_out[f"{name} in {storage} on {gpu}"] = _why_none(storage, gpu)
    for what, why in left_out.items():
        terminal.say(f"{what} is left out: {why}")
    columns = ["model", "weights", "devices", "depth", "batch", "held GB", "read GB/step", "tok/s"]
    terminal.table("decode ceilings: what a step reads over how fast it is read", columns, rows)
    _show_quoted({name for name, _ in models})


def _why_none(storage: str, gpu: str) -> str:
    if not can_compute(STORAGES[storage], GPUS[gpu]):
        return f"it has no {storage} products"
    return f"{NUM_GPUS[-1]} of them do not hold it"


def _row(
    name: str, config: Llama4Config, storage: str, gpu: str, depth: int, batch: int
) -> list[object] | None:
    found = ceiling(config, STORAGES[storage], gpu, depth, batch)
    if found is None:
        return None
    terminal.emit(
        {
            "event": "roofline",
            "model": name,
            "weights": storage,
            "gpu": gpu,
            "num_gpus": found.num_gpus,
            "depth": depth,
            "batch": batch,
            "held_bytes": found.held_bytes,
            "read_bytes": found.cost.read_bytes,
            "tok_per_sec": found.tok_per_sec,
        }
    )
    devices = f"{found.num_gpus} x {gpu}" if found.num_gpus > 1 else gpu
    held, read = f"{found.held_bytes / 1e9:.0f}", f"{found.cost.read_bytes / 1e9:.1f}"
    return [name, storage, devices, depth, batch, held, read, f"{found.tok_per_sec:.0f}"]


def _show_quoted(names: set[str]) -> None:
    """What others say, and what share of the ceiling that is where it can be told."""
    rows = []
    for quoted in QUOTED:
        if quoted.preset not in names:
            continue
        best = None
        if quoted.storage is not None and quoted.gpu is not None:
            config, storage = load_preset(quoted.preset), STORAGES[quoted.storage]
            best = ceiling(config, storage, quoted.gpu, num_gpus=quoted.num_gpus)
        rate = quoted.tok_per_sec
        share = rate / best.tok_per_sec if best is not None and rate is not None else None
        figures = {"tok_per_sec": rate, "ceiling": best and best.tok_per_sec, "share": share}
        terminal.emit({"event": "quoted", "model": quoted.preset, "said": quoted.said, **figures})
        ours = f"{best.tok_per_sec:.0f}" if best is not None else "-"
        if best is not None and rate is None:
            ours = f"{best.held_bytes / 1e9:.0f} GB of {best.num_gpus * _memory(best.gpu):.0f}"
        shown = [quoted.preset, "fits" if rate is None else f"{rate:.0f}", ours]
        rows.append([*shown, f"{share:.0%}" if share is not None else "-", quoted.said])
    if rows:
        terminal.table("\nquoted", ["model", "tok/s", "ceiling", "share", "said"], rows)


def _memory(gpu: str) -> float:
    return GPUS[gpu].memory_bytes / 1e9
