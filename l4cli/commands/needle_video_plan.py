"""What a needle test in films would take: frames, tokens, memory and time.

in: a request; out: a table on stdout, or one JSON line a length. No weights are loaded
"""

from __future__ import annotations

from typing import Any

from l4cli import terminal
from l4cli.commands.needle_dry_run import event_of, machine_of, shape_of
from l4cli.commands.needle_frames import axis_of, tasks_of
from l4cli.commands.needle_options import Request
from l4cli.commands.needle_video import jobs_of
from l4cli.errors import L4Error
from l4cli.evals.needle import Role
from l4cli.model import Llama4Config
from l4cli.planning import Machine, ReadingPlan, plan_reading, vision_flops_per_tile

FRAME_MARKERS = 3  # around a frame's tile: where it begins, what it is, where it ends
_FORWARD_SHARE = 1 / 3  # of training operations


def show(request: Request) -> None:
    """Print the plan."""
    config, dtype = shape_of(request)
    if config.vision is None:
        why, fix = "it has no picture encoder", "name a preset or checkpoint with vision"
        raise L4Error("no plan for frames", why=why, fix=fix)
    machine, axis = machine_of(request, dtype), axis_of(request)
    per_frame = config.vision.tokens_per_tile + FRAME_MARKERS
    rows, total_s = [], 0.0
    for num_frames in axis.num_frames:
        kv = request.kv_dtype.value
        num_tokens = num_frames * per_frame
        plan = plan_reading(config, num_tokens, machine, dtype=dtype, kv_dtype=kv)
        by_layer = plan_reading(
            config, num_tokens, machine, dtype=dtype, kv_dtype=kv, is_layer_major=True
        )
        vision_s = _vision_s(config, num_frames, machine)
        jobs = [job for job in jobs_of(request) if job.length == num_frames]
        num_films = sum(job.role is not Role.closed_book for job in jobs)
        film_s = plan.time_s + vision_s
        total_s += num_films * film_s
        frames = {"num_frames": num_frames, "hours": num_frames / axis.fps / 3600}
        event = event_of(plan, num_films) | frames | {"vision_time_s": vision_s}
        event |= {"time_s": film_s, "total_time_s": num_films * film_s}
        event["bytes_total_layer_major"] = int(by_layer.total_bytes)
        event["bytes_host_layer_major"] = int(by_layer.host_bytes)
        terminal.emit(event)
        rows.append(_row(frames, num_films, plan, by_layer, film_s))
    terminal.emit({"event": "plan_total", "machine": machine.name, "total_time_s": total_s})
    columns = ["frames", "film", "films", "tokens", "keys and values", "memory", "fits"]
    columns += ["layer by layer", "a film", "all"]
    terminal.table("", columns, rows)
    terminal.result(
        f"{', '.join(tasks_of(request))} at {axis.fps:g} frames a second, {per_frame} tokens a "
        f"frame; in all {terminal.time_text(total_s)} on {machine.name}, an estimate without the "
        "time to write and decode the films, which stream"
    )


def _vision_s(config: Llama4Config, num_frames: int, machine: Machine) -> float:
    """Time to encode the frames' tiles."""
    flops = num_frames * vision_flops_per_tile(config) * _FORWARD_SHARE
    return flops / (machine.linear_rate * machine.num_devices * machine.efficiency)


def _row(
    frames: dict[str, Any], num_films: int, plan: ReadingPlan, by_layer: ReadingPlan, film_s: float
) -> tuple[str, ...]:
    text = terminal.bytes_text
    return (
        str(frames["num_frames"]),
        terminal.time_text(frames["hours"] * 3600),
        str(num_films),
        terminal.count_text(plan.num_tokens),
        text(plan.full_cache_bytes + plan.local_cache_bytes),
        text(plan.total_bytes),
        "yes" if plan.fits else "no",
        text(by_layer.total_bytes),
        terminal.time_text(film_s),
        terminal.time_text(num_films * film_s),
    )
