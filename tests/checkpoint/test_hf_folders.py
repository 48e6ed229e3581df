"""Hugging Face folders, both directions, with transformers as the oracle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from l4cli.checkpoint import load_config, load_model, load_weights, open_weights, save_model
from l4cli.model import build_model

transformers = pytest.importorskip("transformers")


def logits(model: torch.nn.Module, ids: torch.Tensor, pixels: torch.Tensor | None = None):
    with torch.no_grad():
        out = model(ids, pixel_values=pixels)
    return getattr(out, "logits", out)


def picture_input() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = [1, 7, *oracle.picture_tokens(1, 2), 9, *oracle.picture_tokens(1, 1), 10]
    return torch.tensor([tokens]), torch.randn(4, 3, 32, 32, generator=generator)


def text_input() -> torch.Tensor:
    return torch.randint(0, 512, (2, 37), generator=torch.Generator().manual_seed(2))


def from_transformers(folder: Path, cls: str) -> torch.nn.Module:
    """Load with transformers and insist that every key fits."""
    loader = getattr(transformers, cls)
    model, info = loader.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], info
    return model.eval()


def test_text_folder_of_transformers_gives_its_logits(hf_text: Path) -> None:
    theirs = from_transformers(hf_text, "Llama4ForCausalLM")
    ids = text_input()
    torch.testing.assert_close(
        logits(load_model(hf_text), ids), logits(theirs, ids), atol=1e-4, rtol=0
    )


def test_sharded_picture_folder_of_transformers_gives_its_logits(hf_pictures: Path) -> None:
    assert len(list(hf_pictures.glob("model-*.safetensors"))) > 1
    theirs = from_transformers(hf_pictures, "Llama4ForConditionalGeneration")
    ids, pixels = picture_input()
    ours = logits(load_model(hf_pictures), ids, pixels)
    torch.testing.assert_close(ours, logits(theirs, ids, pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 300_000])
def test_transformers_loads_what_we_save(
    hf_text: Path, hf_pictures: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    for source, cls in (
        (hf_text, "Llama4ForCausalLM"),
        (hf_pictures, "Llama4ForConditionalGeneration"),
    ):
        model, folder = load_model(source), tmp_path / cls
        save_model(model, folder, {"tokenizer.json": "{}"}, max_shard_bytes=max_shard_bytes)
        ids = text_input()
        theirs = from_transformers(folder, cls)
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), atol=1e-4, rtol=0)
        again = load_model(folder)
        for name, parameter in model.state_dict().items():
            assert torch.equal(parameter, again.state_dict()[name]), name


def test_index_has_the_totals_and_the_header_its_format(hf_text: Path, tmp_path: Path) -> None:
    model = load_model(hf_text)
    save_model(model, tmp_path / "out", {}, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    count = sum(p.numel() for p in model.parameters())
    assert index["metadata"] == {"total_parameters": count, "total_size": 4 * count}
    stored = open_weights(tmp_path / "out")
    assert stored.num_parameters == count
    assert all(header.metadata == {"format": "pt"} for header in stored.files.values())
    biggest = max(header.size_bytes for header in stored.files.values())
    assert biggest < 400_000  # a fused expert tensor alone may exceed a shard, two never share one


def test_save_in_bf16_is_the_rounded_model(hf_pictures: Path, tmp_path: Path) -> None:
    model, folder = load_model(hf_pictures), tmp_path / "bf16"
    save_model(model, folder, {}, dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.state_dict().items():
        assert torch.equal(stored[name], parameter.bfloat16()), name
    theirs = from_transformers(folder, "Llama4ForConditionalGeneration")
    assert theirs.dtype == torch.bfloat16


def test_dtype_is_converted_while_loading_or_kept_as_stored(hf_text: Path, tmp_path: Path) -> None:
    save_model(load_model(hf_text), tmp_path / "bf16", {}, dtype=torch.bfloat16)
    as_stored = load_model(tmp_path / "bf16")
    assert {p.dtype for p in as_stored.parameters()} == {torch.bfloat16}
    assert as_stored.compute_dtype == torch.bfloat16
    wide = load_model(tmp_path / "bf16", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert wide.compute_dtype == torch.float32


def test_text_model_takes_the_text_half_of_a_picture_checkpoint(hf_pictures: Path) -> None:
    config = load_config(hf_pictures)
    config.vision = None
    text = build_model(config, device="meta")
    load_weights(text, hf_pictures)
    ids = text_input().clamp_max(499)
    torch.testing.assert_close(logits(text, ids), logits(load_model(hf_pictures), ids))


def unfuse(source: Path, folder: Path) -> None:
    """Write a checkpoint again with one nn.Linear per expert and projection."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(file).items():
            stem, _, leaf = name.rpartition(".")
            for e in range(len(tensor) if stem.endswith(".experts") else 0):
                half = tensor.shape[2] // 2
                if leaf == "gate_up_proj":
                    tensors[f"{stem}.{e}.gate_proj.weight"] = tensor[e, :, :half].T.contiguous()
                    tensors[f"{stem}.{e}.up_proj.weight"] = tensor[e, :, half:].T.contiguous()
                else:
                    tensors[f"{stem}.{e}.down_proj.weight"] = tensor[e].T.contiguous()
            if not stem.endswith(".experts"):
                tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})


def test_unfused_experts_are_the_same_model(hf_text: Path, tmp_path: Path) -> None:
    unfuse(hf_text, tmp_path / "unfused")
    names = open_weights(tmp_path / "unfused").tensors
    assert any(name.endswith("experts.3.up_proj.weight") for name in names)
    fused, unfused = load_model(hf_text), load_model(tmp_path / "unfused")
    for name, parameter in fused.state_dict().items():
        assert torch.equal(parameter, unfused.state_dict()[name]), name


def test_published_spelling_of_the_config_is_read(hf_text: Path, tmp_path: Path) -> None:
    """`rope_theta` beside `rope_scaling`, no lists, `torch_dtype`: as the hub has it."""
    folder = tmp_path / "published"
    shutil.copytree(hf_text, folder)
    keys = json.loads((folder / "config.json").read_text())
    rope = keys.pop("rope_parameters")
    keys["rope_theta"], keys["rope_scaling"] = rope.pop("rope_theta"), rope
    for name in ("layer_types", "moe_layers", "dtype"):
        keys.pop(name)
    keys["no_rope_layers"] = []
    (folder / "config.json").write_text(json.dumps(keys))
    ids = text_input()
    assert torch.equal(logits(load_model(folder), ids), logits(load_model(hf_text), ids))


def test_transformers_builds_its_processor_from_what_we_save(
    hf_pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchvision")
    save_model(load_model(hf_pictures), tmp_path / "out", {})
    processor = transformers.Llama4ImageProcessor.from_pretrained(tmp_path / "out")
    size = dict(processor.size)
    assert (size["height"], size["width"]) == (32, 32)
    assert processor.max_patches == 16


def test_generation_config_names_the_stop_tokens(hf_text: Path, tmp_path: Path) -> None:
    save_model(load_model(hf_text), tmp_path / "out", {})
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [2]
    assert generation.pad_token_id == 0


PEAK = """
import resource, sys
import torch
from l4cli.checkpoint import load_model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
before = peak()
for dtype in (torch.bfloat16, torch.float32):
    model = load_model(sys.argv[1], dtype=dtype)
    print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
    del model
"""


def test_loading_needs_the_model_and_one_shard(tmp_path: Path) -> None:
    config = oracle.Llama4Config.from_dict({"model_type": "llama4_text", **oracle.TEXT})
    config.text.vocab_size = 60_000
    config.text.intermediate_size, config.text.num_local_experts = 4096, 16
    config.text.num_hidden_layers = 3
    model = build_model(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    shard_bytes = 48 << 20
    save_model(model, tmp_path / "big", {}, max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "big").glob("model-*.safetensors"))) >= 4
    command = [sys.executable, "-c", PEAK, str(tmp_path / "big")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in out.splitlines():
        grown, size = (int(word) for word in line.split())
        assert size > 1.5 * shard_bytes
        assert grown < size + shard_bytes + (24 << 20), (grown, size)


def test_a_big_file_is_opened_piece_by_piece(
    hf_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_model(hf_text)
    monkeypatch.setattr("l4cli.checkpoint.reader._MAPPED_BYTES", 20_000)
    for name, parameter in load_model(hf_text).state_dict().items():
        assert torch.equal(parameter, whole.state_dict()[name]), name
