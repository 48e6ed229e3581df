"""`l4 quantize` with text: calibration, a budget of bits, what was lost on held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantize_runs import events, formats_of, refused
from tiny_chat import save_checkpoint

from l4cli.checkpoint import (
    open_weights,
    plan_quantization,
    read_quantized,
    verify_manifest,
)
from l4cli.cli import main
from l4cli.commands.quantize_calibrate import TextWords, read_calibration, read_eval_data
from l4cli.errors import L4Error
from l4cli.quantization import WeightFormat

README = Path(__file__).parents[2] / "README.md"
TEXT = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", intermediate_size=64)


@pytest.fixture(scope="module")
def stream(source: Path) -> Path:
    """About two thousand tokens of the checkpoint's own tokenizer."""
    return tokenized(source.parent, str(source))


def tokenized(folder: Path, tokenizer: str) -> Path:
    path, out = folder / "text.txt", folder / "text.tokens"
    path.write_text(TEXT)
    assert main(["tokenize", str(path), "--tokenizer", tokenizer, "-o", str(out), "--quiet"]) == 0
    return out


def test_calibrated(
    source: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--calibration", stream, "--calibration-tokens", "500", "--lm-head", "int8"]
    held_out = ["--eval-data", stream, "--eval-tokens", "300"]
    found = events(capsys, source, "-o", tmp_path / "q", "--method", "gptq", *words, *held_out)
    assert [event["event"] for event in found] == ["layer"] * 6 + ["done"]
    lost = found[-1]["quality"]
    assert 0 < lost["kl_mean"] <= lost["kl_99"]
    assert lost["num_tokens"] >= 290
    assert 0.5 < lost["top1_agreement"] <= 1
    assert 0.5 < lost["router_agreement"] <= 1
    report = json.loads((tmp_path / "q/quantize.json").read_text())
    assert report["method"] == "gptq"
    assert report["calibration_tokens"] == 500
    assert report["calibration"] == str(stream)
    assert set(report["output_errors"]) == set(formats_of(tmp_path / "q"))
    assert max(report["output_errors"].values()) < 0.05
    assert report["quality"] == lost
    assert lost["eval_data"] == str(stream)
    assert verify_manifest(tmp_path / "q") == []
    assert len(report["coverage"]) == 2 * 4
    assert all(each["num_tokens"] >= 128 for each in report["coverage"])


def test_report_for_people(
    source: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--calibration", str(stream), "--calibration-tokens", "300", "--quiet"]
    words += ["--eval-data", str(stream), "--eval-tokens", "300", "-o", str(tmp_path / "q")]
    assert main(["quantize", str(source), "--method", "gptq", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "calibration tokens of the experts"
    assert lines[2].split()[:2] == ["1", "4"]
    assert any(line.startswith("KL divergence, mean") for line in lines)
    assert lines[-1].startswith("bits per weight: ")


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_budget(
    source: Path,
    stream: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_calibrated: bool,
) -> None:
    words = ["--calibration", stream, "--calibration-tokens", "300"] if is_calibrated else []
    options = [*words, "--budget", "5.5", "--attention", "int8"]
    found = events(capsys, source, "-o", tmp_path / "q", *options)
    formats = formats_of(tmp_path / "q")
    attention = {formats.pop(name) for name in list(formats) if "self_attn" in name}
    assert attention == {"int8"}
    assert len(set(formats.values())) > 1
    stored = open_weights(tmp_path / "q")
    codes = {name: read_quantized(stored, name) for name in formats}
    bits = weights = 0.0
    for each in codes.values():
        bits += each.format.bits_per_weight(each.shape[1]) * each.codes.numel()
        weights += each.codes.numel()
    assert 5 < bits / weights <= 5.5
    for layer in (1, 3):
        assert (
            len({f for name, f in formats.items() if f"{layer}.feed_forward.experts" in name}) == 1
        )
    assert found[-1]["num_quantized"] > weights


def test_text_that_memory_cannot_hold_is_refused(source: Path, stream: Path) -> None:
    plan = plan_quantization(source, {"attention": WeightFormat("int8")})
    plan.config.text.hidden_size = 10**10
    words = TextWords(stream, "500", stream, "300", None, "cpu")
    for read, option in ((read_calibration, "calibration"), (read_eval_data, "eval")):
        with pytest.raises(L4Error, match="cannot read all of") as caught:
            read(plan, words)
        assert f"`--{option}-tokens " in caught.value.fix


def test_dry_run_foretells_no_time_of_a_calibration(
    source: Path, stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "gptq", "--calibration", stream, "--calibration-tokens", "500"]
    (told,) = events(capsys, source, "--dry-run", *words)
    assert told["bits_per_weight"] > 4
    assert told["time_s"] is None


def test_refusals(
    source: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    q = ["-o", tmp_path / "q"]
    gptq = ["--method", "gptq", "--calibration"]
    assert "needs text" in refused(capsys, source, *q, "--method", "gptq", code=2)
    assert "neither rounding" in refused(capsys, source, *q, "--calibration", stream, code=2)
    assert "names no text" in refused(capsys, source, *q, "--calibration-tokens", "9", code=2)
    assert "names no text" in refused(capsys, source, *q, "--eval-tokens", "9", code=2)
    assert "writes nothing" in refused(capsys, source, "--dry-run", "--eval-data", stream, code=2)
    asked = ["--calibration-tokens", "1M"]
    assert "and 1000000 are asked for" in refused(capsys, source, *q, *gptq, stream, *asked)
    assert "calibration-tokens many" in refused(
        capsys, source, *q, *gptq, stream, "--calibration-tokens", "many", code=2
    )
    words = [str(README), "--vocab-size", "300", "--quiet"]
    assert main(["train-tokenizer", *words, "-o", str(tmp_path / "tokenizer")]) == 0
    other = tokenized(tmp_path, str(tmp_path / "tokenizer"))
    asked = ["--calibration-tokens", "500"]
    assert "another tokenizer" in refused(capsys, source, *q, *gptq, other, *asked)
    assert "cannot measure on" in refused(capsys, source, *q, "--eval-data", other)
    assert "no such file" in refused(capsys, source, *q, *gptq, tmp_path / "absent", *asked)
    text = tmp_path / "text.txt"
    assert "as a token stream" in refused(capsys, source, *q, *gptq, text, *asked)
    assert "the least" in refused(capsys, source, *q, "--budget", "3").replace("it is", "the least")
    assert "chooses the formats and the groups" in refused(
        capsys, source, *q, "--budget", "5", "--group-size", "32", code=2
    )
    error = refused(capsys, source, *q, "--budget", "5", "--format", "fp8", code=2)
    assert "cannot use `--format` with `--budget`" in error
    error = refused(capsys, source, *q, "--budget", "5", "--blocks", code=2)
    assert "only fp8 has blocks" in error
    assert "nothing to quantize" in refused(capsys, source, *q, "--budget", "16")
    assert not (tmp_path / "q").exists()
