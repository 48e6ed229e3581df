"""Quantized folders for tests: written by us, and laid out by compressed-tensors itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import torch
from safetensors.torch import load_file, save_file

from l4cli.checkpoint import load_model, plan_quantization, quantize_checkpoint
from l4cli.quantization import RoundingQuantizer, WeightFormat

DECODER = ("attention", "experts", "shared", "dense")


def quantize(
    source: Path,
    out: Path,
    formats: WeightFormat | Mapping[str, WeightFormat],
    searches: bool = False,
    **options: Any,
) -> Path:
    """Quantize the decoder's parts, or those of `formats`."""
    if isinstance(formats, WeightFormat):
        formats = dict.fromkeys(DECODER, formats)
    plan = plan_quantization(source, formats)
    quantize_checkpoint(plan, out, RoundingQuantizer(searches), **options)
    return out


def from_transformers(folder: Path, cls: str) -> Any:
    """Load with transformers in fp32, insist that every key fits; activations are not rounded."""
    import transformers

    loader = getattr(transformers, cls)
    model, info = loader.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (problem, sorted(info[problem])[:3])
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.input_activations = None
    return model.eval()


def logits(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(inputs[0], pixel_values=inputs[1] if len(inputs) > 1 else None)
    return getattr(out, "logits", out)


def text_input() -> torch.Tensor:
    return torch.randint(0, 500, (2, 37), generator=torch.Generator().manual_seed(2))


def picture_input() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = [1, 7, *oracle.picture_tokens(1, 2), 9, *oracle.picture_tokens(1, 1), 10]
    return torch.tensor([tokens]), torch.randn(4, 3, 32, 32, generator=generator)


def unfused(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module weights [out, in] by module name, and all other tensors, written out in full."""
    tensors = {}
    for key, value in state.items():
        if not key.endswith(("gate_up_proj", "experts.down_proj")):
            tensors[key] = value
            continue
        experts = key.rpartition(".")[0]
        for e, matrix in enumerate(value):
            if key.endswith("down_proj"):
                tensors[f"{experts}.{e}.down_proj.weight"] = matrix.T
            else:
                gate, up = matrix.T.chunk(2)
                tensors[f"{experts}.{e}.gate_proj.weight"] = gate
                tensors[f"{experts}.{e}.up_proj.weight"] = up
    return {key: value.contiguous() for key, value in tensors.items()}


def publish(source: Path, out: Path, config: Mapping[str, Any], pattern: str) -> Path:
    """What compressed-tensors makes of the maps whose names match, scales in fp32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors = {}
    for key, weight in unfused(load_model(source, dtype=torch.float32).state_dict()).items():
        if not (key.endswith(".weight") and re.fullmatch(pattern, key.removesuffix(".weight"))):
            tensors[key] = weight
            continue
        size = scheme.weights.group_size or weight.shape[1]
        low, high = weight.unflatten(1, (-1, size)).aminmax(dim=-1)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        done = compressor.compress(state, scheme)
        tensors |= {key.removesuffix("weight") + leaf: value for leaf, value in done.items()}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit_config(out, quantization_config=dict(config))
    return out


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def edit(folder: Path, change: Any) -> None:
    """Change the tensors of a one-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
