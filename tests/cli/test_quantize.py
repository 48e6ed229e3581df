"""`l4 quantize`: a small folder out of a large one, what it says on the way, and refusals."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantize_runs import events, formats_of, refused
from safetensors.torch import load_file, save_file
from tiny_chat import save_checkpoint, tiny_config

from l4cli.checkpoint import load_model, open_weights, quantized_names, read_quantized, save_model
from l4cli.cli import main
from l4cli.model import build_model
from l4cli.text import load_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers with vision, tokenizer and template; 32 and 64 wide."""
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", intermediate_size=64)


def test_folder_and_events(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = events(capsys, source, "-o", tmp_path / "q")
    assert [event["event"] for event in found] == ["layer"] * 6 + ["done"]
    assert [event.get("layer") for event in found[:-1]] == [0, 1, 2, 3, 4, None]
    for event in found[:5]:
        assert 0.03 < event["error"] < 0.12
        assert event["size_bytes"] < event["bytes_before"] / 5
    done = found[-1]
    stored = open_weights(tmp_path / "q")
    assert done["bits_per_weight"] == 8 * stored.size_bytes / done["num_parameters"]
    assert done["num_parameters"] == sum(p.numel() for p in load_model(source).parameters())
    assert done["num_quantized"] == sum(
        read_quantized(stored, name).codes.numel() for name in quantized_names(stored)
    )
    report = json.loads((tmp_path / "q/quantize.json").read_text())
    assert report["layers"] == [
        {k: v for k, v in event.items() if k != "event"} for event in found[:-1]
    ]
    assert report["method"] == "search"
    # Everything else that makes a model comes along; training state would not.
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.is_file() and path.name != "config.json":
            assert (tmp_path / "q" / path.name).read_bytes() == path.read_bytes(), path.name


def test_report_for_people(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), "-o", str(tmp_path / "q"), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[1].split() == [
        *("layer", "attention", "experts", "shared", "dense", "lm-head", "vision", "size"),
    ]
    assert len(lines) == 9
    assert lines[-2].split()[:3] == ["outside", "-", "-"]
    assert lines[-1].startswith("bits per weight: ")


def test_methods_and_formats(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The search loses less than plain rounding, int8 less than int4, zero points less too."""
    errors = {}
    for name, options in {
        "round": ["--method", "round"],
        "search": [],
        "zero": ["--zero-points"],
        "int8": ["--format", "int8"],
        "fp8": ["--format", "fp8"],
    }.items():
        found = events(capsys, source, "-o", tmp_path / name, *options)
        errors[name] = sum(event["error"] for event in found[:5])
    assert errors["search"] < 0.93 * errors["round"]
    assert errors["zero"] < errors["search"]
    assert errors["int8"] < 0.15 * errors["search"]
    assert errors["int8"] < errors["fp8"] < errors["search"]


def test_parts_choose_for_themselves(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--attention", "int8", "--experts", "fp8", "--shared", "bf16", "--lm-head", "int8"]
    events(capsys, source, "-o", tmp_path / "q", "--dense", "int4", *options)
    formats = formats_of(tmp_path / "q")
    text = "language_model.model.layers"
    assert formats[f"{text}.0.self_attn.q_proj"] == "int8"
    assert formats[f"{text}.1.feed_forward.experts.3.down_proj"] == "fp8"
    assert formats[f"{text}.0.feed_forward.up_proj"] == "int4 g32"
    assert formats["language_model.lm_head"] == "int8"
    words = ("shared_expert", "router", "vision", "projector", "embed", "norm")
    assert not [name for name in formats if any(word in name for word in words)]


def test_a_run_folder_is_its_latest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run / "step-000005")
    (run / "latest").symlink_to("step-000005")
    events(capsys, run, "-o", tmp_path / "q")
    assert formats_of(tmp_path / "q")


def test_dry_run_writes_nothing_and_foretells(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (told,) = events(capsys, source, "-o", tmp_path / "q", "--dry-run")
    assert not (tmp_path / "q").exists()
    assert told["event"] == "dry_run"
    assert 0 < told["time_s"] < 60
    done = events(capsys, source, "-o", tmp_path / "q")[-1]
    for key in ("bits_per_weight", "size_bytes", "bytes_before", "num_quantized"):
        assert told[key] == done[key]


def test_it_chats(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole road: what was written is a checkpoint like any other."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    events(capsys, source, "-o", tmp_path / "q")
    assert main(["chat", str(tmp_path / "q"), "hi", "--max-new-tokens", "4", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["num_answer_tokens"] >= 1
    assert main(["info", str(tmp_path / "q"), "--verify"]) == 0
    assert "compressed-tensors int4 g32" in capsys.readouterr().out


def test_refusals(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    q = tmp_path / "q"
    assert "`-o` is missing" in refused(capsys, source, code=2)
    assert "32, 64, 128" in refused(capsys, source, "-o", q, "--group-size", "48", code=2)
    assert "only int4" in refused(
        capsys, source, "-o", q, "--format", "fp8", "--zero-points", code=2
    )
    assert "only fp8" in refused(capsys, source, "-o", q, "--blocks", code=2)
    assert "nf4" in refused(capsys, source, "-o", q, "--format", "nf4", code=2)
    error = refused(capsys, source, "-o", q, "--group-size", "128")
    assert "no whole groups of int4 g128" in error
    assert "--group-size" in error
    all_stay = [f"--{part}=bf16" for part in ("attention", "experts", "shared", "dense")]
    assert "every part is left" in refused(capsys, source, "-o", q, *all_stay)
    q.mkdir()
    assert "it exists already" in refused(capsys, source, "-o", q)
    q.rmdir()
    events(capsys, source, "-o", q)
    assert "quantized already: compressed-tensors int4" in refused(capsys, q, "-o", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_what_does_not_divide_stays_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = save_checkpoint(tmp_path / "odd")  # experts 48 wide
    assert main(["quantize", str(odd), "-o", str(tmp_path / "q")]) == 0
    err = capsys.readouterr().err
    assert "down_proj` stays bf16: its 48 inputs are no whole groups of int4 g32" in err
    left = json.loads((tmp_path / "q/quantize.json").read_text())["left"]
    assert len(left) == 2 * 5  # four experts and a shared one in two layers
    assert not set(left) & set(formats_of(tmp_path / "q"))


def test_weights_that_are_not_finite_leave_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    tensors = load_file(bad / "model.safetensors")
    key = "language_model.model.layers.4.feed_forward.up_proj.weight"
    tensors[key][3, 5] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    error = refused(capsys, bad, "-o", tmp_path / "q")
    assert f"`{key}` has 1 of" in error
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


LIMITED = """
import resource, sys
import torch
from l4cli.cli import main
from l4cli.quantization import WeightFormat, round_weight
torch.set_num_threads(1)
main(["quantize", sys.argv[1], "--dry-run", "--quiet"])  # everything that is imported, is
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
before = int(status["VmSize"].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_AS, (before + int(sys.argv[3]), -1))
code = main(["quantize", sys.argv[1], "-o", sys.argv[2], "--method", "round", "--quiet"])
try:
    torch.empty(4 * int(sys.argv[3]), dtype=torch.uint8)
except RuntimeError:
    sys.exit(code)
sys.exit("the limit does not hold")
"""


def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    """38 MiB of weights, 8 MiB to work in: an address space that ends there says no to more."""
    config = tiny_config(
        hidden_size=256, intermediate_size=512, intermediate_size_mlp=512, num_hidden_layers=3,
        num_local_experts=16, interleave_moe_layer_step=1,
    )  # fmt: skip
    model = build_model(config, dtype=torch.bfloat16)
    tile = torch.randn(1 << 16).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                tile.repeat(-(-parameter.numel() // 65536))[: parameter.numel()].view_as(parameter)
            )
    save_model(model, tmp_path / "big", load_tokenizer("bytes").files(), max_shard_bytes=10 << 20)
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    limit = 8 << 20
    assert size > 4 * limit
    command = [sys.executable, "-c", LIMITED, tmp_path / "big", tmp_path / "q", str(limit)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected, found = load_model(tmp_path / "big"), load_model(tmp_path / "q", dtype=torch.float32)
    for name, parameter in found.named_parameters():
        before = expected.get_parameter(name).float()
        assert (parameter - before).norm() < 0.12 * before.norm(), name
