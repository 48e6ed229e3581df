"""What is changed in a model's config so that it reads further than it was trained.

in: a config, the changes wanted, the length to come; out: a config that says all of it
source: PI, arXiv 2306.15595 (`linear`); NTK-aware bases; YaRN, arXiv 2309.00071; Llama 3.1's
scaling as in transformers; Scalable-Softmax, arXiv 2501.19399; facts on Llama 4's temperature
"""

from __future__ import annotations

import dataclasses
from typing import Any

from l4cli.errors import L4Error, UsageError
from l4cli.model import Llama4Config, TextConfig
from l4cli.training.model_setup import apply_overrides
from l4cli.training.stages import Changes, RopeChange

_TYPES = {"llama3": "llama3", "yarn": "yarn", "pi": "linear"}  # as `rope_scaling` spells them
# Parameters that a stretched model has and the checkpoint it comes from may lack.
NEW_PARAMETERS = ("self_attn.softmax_scale",)


def stretch(
    config: Llama4Config, changes: Changes, seq_len: int, trained_len: int | None
) -> Llama4Config:
    """Apply the changes for a stage of `seq_len`.

    raises: UsageError for what the model has no use for, or a factor that cannot be known
    """
    config = apply_overrides(config, changes.overrides)
    text = dataclasses.replace(config.text)
    if changes.attention_chunk_size is not None:
        text.attention_chunk_size = changes.attention_chunk_size
    _change_temperature(text, changes)
    if changes.rope_theta is not None or changes.rope is not None:
        _change_rope(text, changes, seq_len, trained_len)
    text.max_position_embeddings = max(text.max_position_embeddings, seq_len)
    try:
        return dataclasses.replace(config, text=text)
    except L4Error as error:
        raise UsageError(error.what, why=error.why, fix=error.fix) from error


def _change_temperature(text: TextConfig, changes: Changes) -> None:
    has_nope = not all(text.uses_rope(i) for i in range(text.num_hidden_layers))
    given = {
        "--attn-scale": changes.attn_scale,
        "--floor-scale": changes.floor_scale,
        "--temperature": changes.temperature or None,
        "--scalable-softmax": changes.scalable_softmax or None,
    }
    used = [name for name, value in given.items() if value is not None]
    if used and not has_nope:
        why = "it acts on layers without positions, and every layer of the model uses RoPE"
        raise UsageError(
            f"cannot use `{used[0]}`", why=why, fix="leave it out, or `--rope-scaling`"
        )
    if changes.scalable_softmax:
        if len(used) > 1:
            why = f"`{used[0]}` and `--scalable-softmax` each scale the same queries"
            raise UsageError("two temperatures given", why=why, fix="give one of them")
        text.scalable_softmax, text.attn_temperature_tuning = True, False
        return
    if changes.temperature is not None:
        text.attn_temperature_tuning = changes.temperature
    if used and not text.attn_temperature_tuning:
        why = "attention temperature is off, so it would change nothing"
        raise UsageError(f"cannot use `{used[0]}`", why=why, fix="add `--temperature`")
    if changes.attn_scale is not None:
        text.attn_scale = changes.attn_scale
    if changes.floor_scale is not None:
        text.floor_scale = changes.floor_scale


def _change_rope(text: TextConfig, changes: Changes, seq_len: int, trained_len: int | None) -> None:
    """Write base and scaling for all layers, or for those that rotate and attend in full."""
    layers = [i for i in range(text.num_hidden_layers) if text.uses_rope(i)]
    if changes.only_full_rope:
        layers = [i for i in layers if not text.is_local(i)]
    if not layers:
        kind = "RoPE layer that attends in full" if changes.only_full_rope else "RoPE layer"
        fix = "leave `--rope-scope full` out" if changes.only_full_rope else "leave it out"
        raise UsageError("cannot change RoPE", why=f"the model has no {kind}", fix=fix)
    if text.full_rope is not None and not changes.only_full_rope:
        raise UsageError(
            "cannot change RoPE of all layers",
            why="those that attend in full have angles of their own (`full_rope`)",
            fix="add `--rope-scope full`, or `--set` the keys of the others",
        )
    before = text.rope_of(layers[-1])
    new: dict[str, Any] = {}
    if changes.rope_theta is not None:
        new["rope_theta"] = changes.rope_theta
    if changes.rope is not None:
        new |= _stretched(
            changes.rope, before.theta, before.scaling, text.head_dim, seq_len, trained_len
        )
    if changes.only_full_rope:
        text.full_rope = {**(text.full_rope or {}), **new}
    else:
        text.rope_theta = new.get("rope_theta", text.rope_theta)
        text.rope_scaling = new.get("rope_scaling", text.rope_scaling)


def _stretched(
    change: RopeChange,
    theta: float,
    scaling: dict[str, Any] | None,
    head_dim: int,
    seq_len: int,
    trained_len: int | None,
) -> dict[str, Any]:
    """The keys that stretch the angles; none where the stage is no longer than was trained."""
    has = (scaling or {}).get("rope_type", "default")
    if has not in ("default", _TYPES.get(change.kind)):
        raise UsageError(
            f"cannot use `--rope-scaling {change.kind}`",
            why=f"the checkpoint's angles are stretched already, as `{has}`",
            fix="stretch it the same way, or set the keys yourself with "
            "`--set rope_scaling='{...}'`",
        )
    old = scaling if scaling and has != "default" else {}
    trained_len = old.get("original_max_position_embeddings", trained_len)
    factor = change.factor
    if (factor is None or change.kind in ("yarn", "llama3")) and trained_len is None:
        raise UsageError(
            f"cannot use `--rope-scaling {change.kind}`",
            why="the checkpoint does not say which length it was trained at",
            fix="say it with `--trained-length N`",
        )
    if factor is None:
        assert trained_len is not None
        # A base of linear scaling stretches what is stretched already.
        factor = seq_len / trained_len * (old.get("factor", 1.0) if change.kind == "pi" else 1.0)
        if factor <= max(1.0, old.get("factor", 1.0)):
            return {}  # never back to less than it was trained with
    if change.kind == "ntk":
        return {"rope_theta": theta * factor ** (head_dim / (head_dim - 2))}
    new = {**old, "rope_type": _TYPES[change.kind], "factor": float(factor)}
    if change.kind != "pi":
        new["original_max_position_embeddings"] = trained_len
    if change.kind == "llama3":
        new = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **new}
    return {"rope_scaling": new}
