"""Write what a teacher predicts on shards, once, for any number of students to learn from.

in: shards, a teacher, how many tokens to keep; out: a folder `l4 distill --teacher-cache` reads
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from l4cli import terminal
from l4cli.errors import UsageError

if TYPE_CHECKING:
    from l4cli.commands.distill_request import Request


def write(request: Request) -> None:
    """Write the rows that are not in the cache yet; say where it is."""
    from l4cli.commands import shard_training as shared
    from l4cli.commands.distill_teacher import (
        load_teacher,
        prepare_teacher,
        require_teacher_fits,
    )
    from l4cli.data.teacher_cache import TeacherCache
    from l4cli.data.teacher_cache_writer import CacheOptions, TeacherCacheWriter
    from l4cli.training import data_setup
    from l4cli.training.device import make_repeatable, torch_device
    from l4cli.training.teacher_writing import write_cache

    assert request.write_cache is not None
    assert request.teacher is not None
    device = torch_device(request.device.value)
    # Opened as for training: the same words name the data, and are refused for the same reasons.
    source = data_setup.open_source(
        request.shards,
        seq_len=request.row_tokens,
        batch_size=request.micro_batch_size or 1,
        micro_batch_size=request.micro_batch_size,
        seed=request.seed,
        attention_chunk_size=None,
    )
    teacher = prepare_teacher(Path(request.teacher), request.dtype.value, source)
    most = teacher.config.text.vocab_size - 1
    if request.top_k > most:
        raise UsageError(
            f"cannot use `--top-k {request.top_k}`",
            why=f"beside the true token there are {most} others",
            fix=f"`--top-k {most} --tail-samples 0` keeps all of them",
        )
    num_entries = 1 + request.top_k + request.tail_samples
    num_bytes = source.num_tokens * (4 * num_entries + 2)
    terminal.say(
        f"teacher `{request.teacher}`, {teacher.dtype}, {device.type}; {source.num_rows} rows, "
        f"at most {terminal.bytes_text(num_bytes)}"
    )
    if request.dry_run:
        terminal.emit({"event": "plan", "num_rows": source.num_rows, "bytes_cache": num_bytes})
        return
    require_teacher_fits(teacher, device)
    make_repeatable(request.seed, device)
    options = CacheOptions(
        teacher=str(request.teacher),
        teacher_fingerprint=teacher.fingerprint,
        num_exact=1 + request.top_k,
        num_drawn=request.tail_samples,
        dtype=teacher.dtype,
        temperature=request.temperature,
        seed=request.seed,
    )
    num_workers = shared.passes_at_once(teacher.config, device)
    size = max(1, data_setup.MICRO_BATCH_TOKENS // source.seq_len // num_workers)
    with TeacherCacheWriter(request.write_cache, options, source.datasets) as writer:
        if not any(writer.rows_left(i) for i in range(len(source.datasets))):
            writer.finish()
            terminal.say(f"finished: `{request.write_cache}` has all rows")
        else:
            write_cache(
                load_teacher(teacher, device),
                writer,
                micro_batch_size=request.micro_batch_size or size,
                num_workers=num_workers,
            )
    cache = TeacherCache.open(request.write_cache).describe()
    terminal.say(
        f"{cache['num_tokens']} targets, {cache['bytes_per_token']:.1f} bytes each, "
        f"{terminal.bytes_text(cache['size_bytes'])}"
    )
    terminal.emit({"event": "done", "cache": str(request.write_cache), **cache})
    terminal.result(str(request.write_cache))
