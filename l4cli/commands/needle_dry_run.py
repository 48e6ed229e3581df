"""What a needle test would take, by length: tokens, memory, operations and time.

in: a request; out: a table on stdout, or one JSON line a length. No weights are loaded
"""

from __future__ import annotations

from l4cli import terminal
from l4cli.commands.needle_grid import jobs_of
from l4cli.commands.needle_lists import length_text
from l4cli.commands.needle_options import Request
from l4cli.evals.needle.costs import (
    CPU_SHARE,
    Rates,
    ReadingCost,
    gpu_rates,
    reading_cost,
    weights_bytes,
)
from l4cli.model import Llama4Config


def show(request: Request) -> None:
    """Print the plan."""
    config, dtype = _shape(request)
    rates = gpu_rates(request.gpus) if request.gpus is not None else _here(request, dtype)
    jobs = jobs_of(request)
    weights = weights_bytes(config, dtype)
    rows = []
    total_s = 0.0
    for length in request.length_list:
        # A question without a text costs next to nothing.
        num_texts = sum(job.length == length and job.role != "closed_book" for job in jobs)
        num_texts += 2 * request.wants_nll * (length == request.length_list[-1])
        cost = reading_cost(config, length, dtype, request.kv_dtype.value)
        time_s = cost.time_s(rates)
        total_s += num_texts * time_s
        needed = weights + cost.kv_bytes + cost.activation_bytes
        terminal.emit(
            {
                "event": "plan",
                "length": length,
                "num_texts": num_texts,
                "num_tokens": num_texts * length,
                "bytes_weights": weights,
                "bytes_kv": cost.kv_bytes,
                "bytes_activations": cost.activation_bytes,
                "bytes_available": rates.memory_bytes,
                "fits": needed <= rates.memory_bytes,
                "linear_flops": cost.linear_flops,
                "attention_flops": cost.attention_flops,
                "time_s": time_s,
                "total_time_s": num_texts * time_s,
            }
        )
        fits = "yes" if needed <= rates.memory_bytes else "no"
        rows.append(_row(length, num_texts, cost, weights, fits, time_s))
    terminal.emit({"event": "plan_total", "machine": rates.name, "total_time_s": total_s})
    columns = ("length", "texts", "KV", "with weights", "fits", "FLOPs", "a text", "all")
    terminal.table("", columns, rows)
    terminal.result(f"in all {terminal.time_text(total_s)} on {rates.name}")


def _row(
    length: int, num_texts: int, cost: ReadingCost, weights: int, fits: str, time_s: float
) -> tuple[str, ...]:
    needed = weights + cost.kv_bytes + cost.activation_bytes
    return (
        length_text(length),
        str(num_texts),
        terminal.bytes_text(cost.kv_bytes),
        terminal.bytes_text(needed),
        fits,
        f"{cost.flops:.2e}",
        terminal.time_text(time_s),
        terminal.time_text(num_texts * time_s),
    )


def _shape(request: Request) -> tuple[Llama4Config, str]:
    """The config, and what is computed in."""
    from l4cli.commands.needle_model import TestedModel, require_checkpoint
    from l4cli.model import load_preset

    if request.preset is not None:
        dtype = "bf16" if request.dtype.value == "auto" else request.dtype.value
        return load_preset(request.preset), dtype
    model = TestedModel.open(
        require_checkpoint(request.checkpoint),
        request.tokenizer,
        request.device.value,
        request.dtype.value,
        request.kv_dtype.value,
    )
    return model.config, model.compute_dtype


def _here(request: Request, dtype: str) -> Rates:
    """This machine: its product rate, of which reading reaches a share."""
    from l4cli.planning import available_memory, gemm_rate
    from l4cli.training.device import torch_device

    device = str(torch_device(request.device.value))
    rate = CPU_SHARE * gemm_rate(dtype, device)
    return Rates(f"this machine's {device} (an estimate)", rate, rate, available_memory(device))
