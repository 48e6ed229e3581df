"""`l4 convert` through the front door: what it writes is read back, and llama.cpp agrees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import TEXT, expected_tensors, fitting_checkpoint, trained_tokenizer
from safetensors.torch import load_file, save_file
from tiny_chat import save_checkpoint

from l4cli.checkpoint import (
    RunFolder,
    load_model,
    open_weights,
    plan_quantization,
    quantize_checkpoint,
    save_model,
)
from l4cli.cli import main
from l4cli.quantization import RoundingQuantizer, WeightFormat
from l4cli.text import load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model with a trained tokenizer, of a shape that llama.cpp computes."""
    return fitting_checkpoint(tmp_path_factory.mktemp("fit") / "model", trained_tokenizer())


def error_of(capsys: pytest.CaptureFixture[str], code: int, *args: str | Path) -> str:
    assert main(["convert", *map(str, args)]) == code
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith(("error", "why", "fix"))]
    assert [line.partition(":")[0] for line in lines] == ["error", "why", "fix"]
    return err


def fields_of(path: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


# Hugging Face


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_hf_keeps_the_weights_and_drops_training_state(
    dtype: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as folder, folder.writing(3) as step:
        source = save_checkpoint(tmp_path / "source")
        for file in source.iterdir():
            if file.is_file():
                (step / file.name).write_bytes(file.read_bytes())
        (step / "l4").mkdir()
        (step / "l4" / "state.json").write_text("{}")
    flags = ["--dtype", dtype] if dtype else []
    out = tmp_path / "out"
    assert main(["convert", str(run), "-o", str(out), "--json", *flags]) == 0
    event = json.loads(capsys.readouterr().out)
    assert event["event"] == "done"
    assert event["bytes"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    ours, written = load_model(source), load_model(out)
    for name, weight in written.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name].to(kind)), name
        assert weight.dtype == kind
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(kind)[6:]
    assert {f.name for f in (out / "l4").iterdir()} == {"manifest.json"}
    names = ("tokenizer.json", "tokenizer_config.json", "processor_config.json")
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert main(["info", str(out), "--verify"]) == 0


def test_transformers_opens_it_with_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    import torchvision_schemas

    torchvision_schemas.declare()
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert main(["convert", str(checkpoint), "-o", str(out), "--dtype", "fp32", "--quiet"]) == 0
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        assert (peer(ids).logits - load_model(checkpoint)(ids)).abs().max() < 1e-4


def test_unfused_experts_come_out_fused(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unfused"
    folder.mkdir()
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        experts, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, (gate, up) in enumerate(zip(*weight.chunk(2, dim=2), strict=True)):
                weights[f"{experts}.{e}.gate_proj.weight"] = gate.T.contiguous()
                weights[f"{experts}.{e}.up_proj.weight"] = up.T.contiguous()
        elif last == "down_proj":
            for e, down in enumerate(weight):
                weights[f"{experts}.{e}.down_proj.weight"] = down.T.contiguous()
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    assert main(["convert", str(folder), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert open_weights(tmp_path / "out").tensors.keys() == open_weights(checkpoint).tensors.keys()
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(written[name], weight), name


def test_shards_have_an_index(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l4cli.checkpoint.parameters import ParameterReader
    from l4cli.checkpoint.rewrite import rewrite

    seen: list[int] = []
    rewrite(ParameterReader(checkpoint), tmp_path, None, seen.append, max_shard_bytes=200_000)
    stored = open_weights(tmp_path)
    assert len(stored.files) > 3
    assert seen[-1] == stored.size_bytes
    for name, weight in load_model(tmp_path).state_dict().items():
        assert torch.equal(weight, load_model(checkpoint).state_dict()[name]), name


# GGUF


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8_0", "q4_0"])
def test_gguf_holds_our_weights(
    dtype: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "model.gguf"
    flags = ["--to", "gguf", "--dtype", dtype, "--json"]
    assert main(["convert", str(checkpoint), "-o", str(out), *flags]) == 0
    event = json.loads(capsys.readouterr().out)
    reader = gguf.GGUFReader(out)
    expected = expected_tensors(load_model(checkpoint))
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    num_bits = 0
    for tensor in reader.tensors:
        wanted = expected[tensor.name]
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert read.shape == wanted.shape, tensor.name
        again = gguf.quants.dequantize(
            gguf.quants.quantize(wanted, tensor.tensor_type), tensor.tensor_type
        )
        assert np.array_equal(read, again), tensor.name
        num_bits += 8 * tensor.n_bytes
        if wanted.ndim == 1 or "ffn_gate_inp" in tensor.name:
            assert np.array_equal(read, wanted)
    num_values = sum(tensor.size for tensor in expected.values())
    assert event["bits_per_weight"] == pytest.approx(num_bits / num_values, abs=1e-3)
    assert event["bytes"] == out.stat().st_size
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["output.weight"] == {"fp32": "F32", "bf16": "BF16"}.get(dtype, "Q8_0")
    assert kinds["blk.1.ffn_up_exps.weight"] == {"fp32": "F32"}.get(dtype, dtype.upper())


def test_gguf_says_the_shape_and_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "model.gguf"
    assert main(["convert", str(checkpoint), "-o", str(out), "--to", "gguf", "--quiet"]) == 0
    fields = fields_of(out)
    shape = {
        "context_length": 16384,
        "embedding_length": 64,
        "block_count": 5,
        "feed_forward_length": 128,
        "expert_feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 500000.0,
        "expert_count": 4,
        "expert_used_count": 1,
        "interleave_moe_layer_step": 2,
        "vocab_size": 704,
    }
    for name, value in shape.items():
        assert fields[f"llama4.{name}"] == value, name
    assert fields["general.architecture"] == "llama4"
    tokenizer = trained_tokenizer()
    words = fields["tokenizer.ggml.tokens"]
    vocab = json.loads(tokenizer.files()["tokenizer.json"])["model"]["vocab"]
    assert words[: len(vocab)] == list(vocab)
    assert words[tokenizer.eot_id] == "<|eot|>"
    assert words[-1] == "[PAD703]"
    kinds = fields["tokenizer.ggml.token_type"]
    num_special = len(tokenizer.special_tokens)
    assert kinds == [1] * len(vocab) + [3] * num_special + [5] * (704 - tokenizer.vocab_size)
    merges = json.loads(tokenizer.files()["tokenizer.json"])["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == merges
    assert fields["tokenizer.ggml.pre"] == "llama4"
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_id
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.eot_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert "header_start" in fields["tokenizer.chat_template"]


def test_llama3_stretching_becomes_factors(tmp_path: Path) -> None:
    """Slow pairs turn `factor` times slower, fast ones as before."""
    gguf = pytest.importorskip("gguf")
    scaling = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    folder = fitting_checkpoint(tmp_path / "model", rope_scaling=scaling)
    out = tmp_path / "model.gguf"
    assert main(["convert", str(folder), "-o", str(out), "--to", "gguf", "--quiet"]) == 0
    tensors = {t.name: t.data for t in gguf.GGUFReader(out).tensors}
    factors = tensors["rope_freqs.weight"]
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(16) / 16)
    assert np.allclose(factors[wavelengths < 2048], 1)
    assert np.allclose(factors[wavelengths > 8192], 16)
    middle = (wavelengths >= 2048) & (wavelengths <= 8192)
    smooth = (8192 / wavelengths[middle] - 1) / 3
    assert middle.any()
    assert np.allclose(factors[middle], 1 / ((1 - smooth) / 16 + smooth), rtol=1e-5)


@pytest.mark.parametrize(
    ("format", "kind"),
    [(WeightFormat("int4", 32), "Q4_0"), (WeightFormat("int8"), "Q8_0")],
)
def test_codes_of_a_quantized_checkpoint_are_kept(
    format: WeightFormat, kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    """No rounding on top: values differ by their scales' rounding to fp16 alone."""
    gguf = pytest.importorskip("gguf")
    parts = ("attention", "experts", "shared", "dense")
    plan = plan_quantization(checkpoint, dict.fromkeys(parts, format))
    quantize_checkpoint(plan, tmp_path / "codes", RoundingQuantizer())
    out = tmp_path / "model.gguf"
    flags = ["--to", "gguf", "--quiet"]
    assert main(["convert", str(tmp_path / "codes"), "-o", str(out), *flags]) == 0
    expected = expected_tensors(load_model(tmp_path / "codes", dtype=torch.float32))
    kinds = {}
    for tensor in gguf.GGUFReader(out).tensors:
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kinds[tensor.name] = tensor.tensor_type.name
        if kinds[tensor.name] == kind and tensor.name != "output.weight":
            assert np.allclose(read, expected[tensor.name], rtol=2**-11, atol=0), tensor.name
    assert kinds["blk.1.ffn_gate_exps.weight"] == kinds["blk.0.attn_q.weight"] == kind
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["output.weight"] == "Q8_0"


def test_codes_of_several_formats_are_kept_only_where_all_can_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first layer alone would be Q4_0; codes of the others would be rounded once more."""
    pytest.importorskip("gguf")
    plan = plan_quantization(checkpoint, {"attention": WeightFormat("int4", 32)})
    for name in plan.choices:
        if ".layers.0." not in name:
            plan.choices[name] = WeightFormat("int8")
    quantize_checkpoint(plan, tmp_path / "codes", RoundingQuantizer())
    out = tmp_path / "model.gguf"
    flags = ["--to", "gguf", "--json"]
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "codes"), "-o", str(out), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bf16"


def test_codes_become_plain_values(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_quantization(checkpoint, {"experts": WeightFormat("int4", 32, symmetric=False)})
    quantize_checkpoint(plan, tmp_path / "codes", RoundingQuantizer())
    assert main(["convert", str(tmp_path / "codes"), "-o", str(tmp_path / "hf"), "--quiet"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    written, coded = (load_model(tmp_path / name).state_dict() for name in ("hf", "codes"))
    for name, weight in written.items():
        assert torch.equal(weight, coded[name]), name
        assert weight.dtype == coded[name].dtype
        assert weight.dtype == torch.bfloat16 or "experts." not in name


def test_a_picture_encoder_stays_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    folder = save_checkpoint(tmp_path / "model", attention_chunk_size=8192)
    out = tmp_path / "model.gguf"
    flags = ["--to", "gguf", "--dtype", "q4_0"]
    assert main(["convert", str(folder), "-o", str(out), *flags]) == 0
    err = capsys.readouterr().err
    assert "picture encoder stays out" in err
    assert "stay bf16: 32 does not divide their rows" in err  # experts are 48 wide
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert kinds["blk.1.ffn_down_exps.weight"] == "BF16"
    assert kinds["blk.1.ffn_up_exps.weight"] == "Q4_0"
    assert not any(name.startswith("v.") for name in kinds)


def test_what_llama_cpp_gets_wrong_is_refused_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    folder = save_checkpoint(tmp_path / "model", sees=False)
    out = tmp_path / "model.gguf"
    err = error_of(capsys, 1, folder, "-o", out, "--to", "gguf")
    assert "`attention_chunk_size` 16" in err
    assert "texts above 16 tokens" in err
    assert "--force" in err
    assert not out.exists()
    assert main(["convert", str(folder), "-o", str(out), "--to", "gguf", "--force"]) == 0
    assert "warning: `attention_chunk_size` 16" in capsys.readouterr().err
    assert out.exists()


def test_what_llama_cpp_cannot_open_is_refused_even_if_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    folder = fitting_checkpoint(tmp_path / "model", moe_layers=[0, 1, 4])
    err = error_of(capsys, 1, folder, "-o", tmp_path / "x.gguf", "--to", "gguf", "--force")
    assert "`moe_layers` [0, 1, 4]" in err
    assert "cannot run" in err


def test_other_tokenizers_and_other_mistakes_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "there.gguf").write_text("x")
    gguf = ("--to", "gguf")
    assert "a file stands" in error_of(capsys, 1, checkpoint, "-o", tmp_path / "there.gguf", *gguf)
    assert "a folder stands" in error_of(capsys, 1, checkpoint, "-o", tmp_path, *gguf)
    err = error_of(capsys, 2, checkpoint, "-o", tmp_path / "a", "--dtype", "q4_0")
    assert "`--to gguf`" in err
    assert "leave `--force` out" in error_of(capsys, 2, checkpoint, "-o", tmp_path / "a", "--force")
    assert "no such folder" in error_of(capsys, 1, tmp_path / "none", "-o", tmp_path / "a")
    assert "not empty" in error_of(capsys, 1, checkpoint, "-o", tmp_path)
    model = load_model(checkpoint)
    data = json.loads((checkpoint / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "NFC"}
    save_model(model, tmp_path / "foreign", {"tokenizer.json": json.dumps(data)})
    err = error_of(capsys, 1, tmp_path / "foreign", "-o", tmp_path / "b.gguf", *gguf)
    assert "it normalises the text" in err
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e9)
    save_model(model, tmp_path / "huge", load_tokenizer(checkpoint).files())
    huge = (tmp_path / "huge", "-o", tmp_path / "b.gguf", *gguf, "--dtype", "q8_0")
    err = error_of(capsys, 1, *huge)
    assert "`model.layers.1.self_attn.v_proj.weight` as q8_0" in err
    assert "at most 65504" in err
    assert not list(tmp_path.glob("*b.gguf*"))


def test_without_the_library_it_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "gguf", None)
    err = error_of(capsys, 1, checkpoint, "-o", tmp_path / "a.gguf", "--to", "gguf")
    assert "pip install gguf" in err


# llama.cpp itself


def llama_cpp(name: str) -> str:
    folder = os.environ.get("L4_LLAMA_CPP")
    if not folder:
        pytest.skip("`L4_LLAMA_CPP` does not name a folder with llama.cpp's programs")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"`{path}` is not built")
    return str(path)


def logits_there(program: str, model: Path, prompt: str, folder: Path) -> tuple[Any, Any]:
    """The ids llama.cpp reads a prompt as, and the logits after it, caches in fp32."""
    args = [program, "-m", str(model), "-p", prompt, "-t", "1", "--save-logits",
            "--logits-output-dir", str(folder), "-ctk", "f32", "-ctv", "f32",
            "-c", "16384", "-b", "16384", "-ub", "512"]  # fmt: skip
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (tokens,) = folder.glob("*-tokens.bin")
    (logits,) = (p for p in folder.glob("*.bin") if p != tokens)
    return np.fromfile(tokens, "<i4"), np.fromfile(logits, "<f4")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("num_chars", "changes"),
    [
        (600, {}),
        (600, {"rope_scaling": LLAMA3}),
        (600, {"rope_scaling": YARN}),
        (600, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (600, {"interleave_moe_layer_step": 1, "num_experts_per_tok": 2}),
        (600, {"num_local_experts": 128, "use_qk_norm": False, "rope_scaling": YARN}),
        pytest.param(40_000, {}, marks=pytest.mark.slow),  # past the chunk and the first step
    ],
)
def test_llama_cpp_reads_the_same_ids_and_gives_the_same_logits(
    num_chars: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    program = llama_cpp("llama-debug")
    pytest.importorskip("gguf")
    tokenizer = trained_tokenizer()
    folder = fitting_checkpoint(tmp_path / "model", tokenizer, **changes)
    out = tmp_path / "model.gguf"
    flags = ["--to", "gguf", "--dtype", "fp32", "--quiet"]
    assert main(["convert", str(folder), "-o", str(out), *flags]) == 0
    prompt = (TEXT * 5)[:num_chars]
    ids, theirs = logits_there(program, out, prompt, tmp_path)
    assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(prompt)]
    with torch.no_grad():
        ours = load_model(folder)(torch.from_numpy(ids).long()[None])[0, -1].numpy()
    assert ours.std() > 1
    assert np.abs(theirs - ours).max() < 1e-3


def test_llama_cpp_opens_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    program = llama_cpp("llama-debug")
    pytest.importorskip("gguf")
    folder = fitting_checkpoint(tmp_path / "model")
    out = tmp_path / "model.gguf"
    flags = ["--to", "gguf", "--dtype", "q8_0", "--quiet"]
    assert main(["convert", str(folder), "-o", str(out), *flags]) == 0
    ids, theirs = logits_there(program, out, "a b\u00e9\n", tmp_path)
    assert ids.tolist() == [load_tokenizer("bytes").bos_id, *"a b\u00e9\n".encode()]
    with torch.no_grad():
        ours = load_model(folder)(torch.from_numpy(ids).long()[None])[0, -1].numpy()
    assert np.corrcoef(theirs, ours)[0, 1] > 0.99
