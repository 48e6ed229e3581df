"""Open the shards of a run and refuse those that do not fit the model or each other.

in: words such as `code/:0.3`, a config; out: a `ShardSource`, held-out shards, what identifies them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from l4cli.data.loader import ShardSource
from l4cli.data.mixing import parse_mixture
from l4cli.data.shards import ShardSet
from l4cli.data.teacher_cache import TeacherCache
from l4cli.errors import UsageError
from l4cli.model import Llama4Config

MICRO_BATCH_TOKENS = 8192  # held at once when nothing is said


def open_source(
    specs: Sequence[str],
    *,
    seq_len: int | None,
    batch_size: int,
    micro_batch_size: int | None,
    seed: int,
    attention_chunk_size: int | None,
    passes_at_once: int = 1,
    teacher_cache: TeacherCache | None = None,
) -> ShardSource:
    """Open training data. `seq_len` is a check: rows have the length they were packed with."""
    packed_len = ShardSet.open(parse_mixture(specs)[0].path).seq_len
    if seq_len not in (None, packed_len):
        why = f"the shards hold rows of {packed_len} tokens"
        fix = f"leave it out, or pack again with `l4 pack --seq-len {seq_len}`"
        raise UsageError(f"cannot use `--seq-len {seq_len}`", why=why, fix=fix)
    return ShardSource(
        specs,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size or default_micro_batch_size(batch_size, packed_len),
        seed=seed,
        attention_chunk_size=attention_chunk_size,
        passes_at_once=passes_at_once,
        teacher_cache=teacher_cache,
    )


def default_micro_batch_size(batch_size: int, seq_len: int) -> int:
    """The largest divisor of the batch that holds at most `MICRO_BATCH_TOKENS`."""
    most = max(1, MICRO_BATCH_TOKENS // seq_len)
    return max(n for n in range(1, min(most, batch_size) + 1) if batch_size % n == 0)


def open_held_out(folder: Path, source: ShardSource, config: Llama4Config) -> ShardSet:
    """Open evaluation data, which has to speak the training data's tokens and fit the model."""
    shards = ShardSet.open(folder)
    if shards.fingerprint != source.fingerprint:
        raise UsageError(
            f"cannot evaluate on `{folder}`",
            why="it was tokenized with another tokenizer than the training data",
            fix="tokenize both with the same `--tokenizer`",
        )
    require_geometry(config, [shards])
    return shards


def require_context(config: Llama4Config, seq_len: int) -> None:
    """Refuse rows longer than what the model says it can read."""
    most = config.text.max_position_embeddings
    if seq_len > most:
        raise UsageError(
            f"rows of {seq_len} tokens are too long for the model",
            why=f"its `max_position_embeddings` is {most}",
            fix=f"pack with `l4 pack --seq-len {most}`, or train a longer model with "
            f"`--set max_position_embeddings={seq_len}`",
        )


def require_geometry(config: Llama4Config, datasets: Sequence[ShardSet]) -> None:
    """Refuse shards with pictures that the model's vision would cut in another way."""
    for shards in datasets:
        if shards.num_media:
            _require_geometry_of(config, shards)


def _require_geometry_of(config: Llama4Config, shards: ShardSet) -> None:
    if config.vision is None:
        raise UsageError(
            f"the model has no vision and `{shards.folder}` holds pictures",
            why="`vision_config` is null",
            fix="leave `vision_config` in, or tokenize without pictures",
        )
    names = ("image_size", "patch_size", "pixel_shuffle_ratio")
    pairs = [(n, getattr(shards.geometry, n), getattr(config.vision, n)) for n in names]
    differing = [
        f"`{n}` is {theirs:g}, the model's {ours:g}" for n, theirs, ours in pairs if theirs != ours
    ]
    if differing:
        raise UsageError(
            f"the pictures in `{shards.folder}` do not fit the model",
            why="; ".join(differing),
            fix="tokenize again with `l4 tokenize --preset NAME`, naming the preset to be trained",
        )


def identity(source: ShardSource) -> list[str]:
    """What data a run is made of, wherever it lies: hashes and weights."""
    weights = source.state_dict()["weights"]
    return [
        f"shards {shards.digest[:12]} x {weight}"
        for shards, weight in zip(source.datasets, weights, strict=True)
    ]
