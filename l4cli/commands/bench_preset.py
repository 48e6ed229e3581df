"""A checkpoint with random weights of a preset's shape, for measuring what does not depend on them.

in: a preset's name, a folder to make; out: the folder
"""

from __future__ import annotations

import shutil
from pathlib import Path

from l4cli import terminal
from l4cli.checkpoint import plan_quantization, quantize_checkpoint, save_model
from l4cli.commands.bench_ours import DTYPES
from l4cli.errors import L4Error
from l4cli.model import build_model, load_preset
from l4cli.planning import available_memory, inference_bytes
from l4cli.quantization import RoundingQuantizer, WeightFormat
from l4cli.text import load_tokenizer

_MLPS = ("experts", "shared", "dense")


def write_preset(name: str, folder: Path, dtype: str, format: str | None = None) -> Path:
    """Write it, text half only; `format`: the decoder's weights rounded to int4, int8 or fp8.

    raises: L4Error when memory or disk have no room
    """
    config = load_preset(name)
    config.vision = None
    needed = 2 * inference_bytes(config, dtype, 0)["weights"]  # also of the one that is loaded
    free = min(available_memory(), shutil.disk_usage(folder.parent).free)
    if needed > free:
        text = terminal.bytes_text
        why = f"its weights take {text(needed)} twice over, and {text(free)} are free"
        fix = "choose a smaller preset, or work it out with `l4 bench --roofline`"
        raise L4Error(f"cannot measure `preset:{name}` here", why=why, fix=fix)
    tokenizer = load_tokenizer("bytes")
    config.text.bos_token_id, config.text.pad_token_id = tokenizer.bos_id, tokenizer.pad_id
    config.text.eos_token_id = list(tokenizer.stop_ids)
    model = build_model(config, dtype=DTYPES[dtype], seed=0)
    save_model(model, folder, tokenizer.files())
    if format is None:
        return folder
    weights = WeightFormat(format, group_size=32 if format == "int4" else None)
    plan = plan_quantization(folder, dict.fromkeys(("attention", *_MLPS), weights))
    quantize_checkpoint(plan, folder.with_name("quantized"), RoundingQuantizer())
    return folder.with_name("quantized")
