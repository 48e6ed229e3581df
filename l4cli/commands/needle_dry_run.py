"""What a needle test would take, by length: tokens, memory, operations and time.

in: a request; out: a table on stdout, or one JSON line a length. No weights are loaded
"""

from __future__ import annotations

from typing import Any

from l4cli import terminal
from l4cli.commands.needle_grid import jobs_of
from l4cli.commands.needle_model import TestedModel
from l4cli.commands.needle_options import Request
from l4cli.evals.cells import length_text
from l4cli.evals.needle.grid import Role
from l4cli.model import Llama4Config, load_preset
from l4cli.planning.reading import Machine, ReadingPlan, parse_gpus, plan_reading, this_machine
from l4cli.training.device import torch_device


def show(request: Request) -> None:
    """Print the plan."""
    config, dtype = shape_of(request)
    machine = machine_of(request, dtype)
    num_texts = _num_texts(request)
    rows, total_s = [], 0.0
    for length in request.length_list:
        plan = plan_reading(
            config,
            length,
            machine,
            dtype=dtype,
            kv_dtype=request.kv_dtype.value,
            is_layer_major=request.layer_major,
        )
        total_s += num_texts[length] * plan.time_s
        terminal.emit(event_of(plan, num_texts[length]))
        rows.append(_row(plan, num_texts[length]))
    terminal.emit({"event": "plan_total", "machine": machine.name, "total_time_s": total_s})
    columns = (
        "length",
        "texts",
        "keys and values",
        "memory",
        "host memory",
        "fits",
        "FLOPs",
        "a text",
        "all",
    )
    terminal.table("", columns, rows)
    where = f"this machine ({machine.name})" if request.gpus is None else machine.name
    terminal.result(f"in all {terminal.time_text(total_s)} on {where}, an estimate")


def _num_texts(request: Request) -> dict[int, int]:
    """Texts at each length; a question without a text costs next to nothing."""
    lengths = [job.length for job in jobs_of(request) if job.role is not Role.closed_book]
    counts = {length: lengths.count(length) for length in request.length_list}
    counts[request.length_list[-1]] += 2 if request.wants_nll else 0
    return counts


def event_of(plan: ReadingPlan, num_texts: int) -> dict[str, Any]:
    caches = {"full": plan.full_cache_bytes, "local": plan.local_cache_bytes}
    sizes = {
        "bytes_weights": plan.weights_bytes,
        "bytes_kv": sum(caches.values()),
        "bytes_activations": plan.activation_bytes,
        "bytes_host": plan.host_bytes,
        "bytes_total": plan.total_bytes,
        "bytes_available": plan.machine.total_memory_bytes,
    }
    return {
        "event": "plan",
        "length": plan.num_tokens,
        "num_texts": num_texts,
        "num_tokens": num_texts * plan.num_tokens,
        **{name: int(size) for name, size in sizes.items()},
        "fits": plan.fits,
        "linear_flops": plan.linear_flops,
        "attention_flops": plan.full_attention_flops + plan.local_attention_flops,
        "time_s": plan.time_s,
        "total_time_s": num_texts * plan.time_s,
    }


def _row(plan: ReadingPlan, num_texts: int) -> tuple[str, ...]:
    flops = plan.linear_flops + plan.full_attention_flops + plan.local_attention_flops
    return (
        length_text(plan.num_tokens),
        str(num_texts),
        terminal.bytes_text(plan.full_cache_bytes + plan.local_cache_bytes),
        terminal.bytes_text(plan.total_bytes),
        terminal.bytes_text(plan.host_bytes),
        "yes" if plan.fits else "no",
        f"{flops:.2e}",
        terminal.time_text(plan.time_s),
        terminal.time_text(num_texts * plan.time_s),
    )


def shape_of(request: Request) -> tuple[Llama4Config, str]:
    """The config, and what is computed in."""
    if request.preset is not None:
        dtype = "bf16" if request.dtype.value == "auto" else request.dtype.value
        return load_preset(request.preset), dtype
    model = TestedModel.of(request)
    return model.config, model.compute_dtype


def machine_of(request: Request, dtype: str) -> Machine:
    """The machine that was named, or this one."""
    if request.gpus is not None:
        return parse_gpus(request.gpus)
    return this_machine(dtype, str(torch_device(request.device.value)))
