"""`l4 needle-test --layer-major`: the same answers, one layer at a time, and its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evals.test_engine_subject import sample_for
from tiny_chat import save_checkpoint, tiny_config

from l4cli.checkpoint import save_model
from l4cli.cli import main
from l4cli.commands import needle_model
from l4cli.evals.needle.layer_subject import LayerSubject
from l4cli.model import build_model
from l4cli.text import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
NEEDLES = ["--needle", "#{key}={value};", "--question", "#{key}=", "--keys", "letters:3"]
GRID = ["--lengths", "256,512", "--depths", "3", "--samples", "2", *NEEDLES, "--values", "digits:2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that says letters and digits only, so that some answers can be right."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny_config()
    config.vision = None
    built = build_model(config, seed=0)
    said = torch.from_numpy(TOKENIZER.encode("0123456789abc").astype("int64"))
    with torch.no_grad():
        rows = built.lm_head.weight[said] * 50
        built.lm_head.weight.zero_()
        built.lm_head.weight[said] = rows
    save_model(built, folder, TOKENIZER.files(), None)
    return folder


def answers(out: Path) -> list[list[dict]]:
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [record["answers"] for record in records]


def test_layer_by_layer_the_answers_are_the_same(model: Path, tmp_path: Path) -> None:
    assert main(["needle-test", str(model), *GRID, "-o", str(tmp_path / "whole")]) == 0
    call = ["needle-test", str(model), *GRID, "--layer-major", "-o", str(tmp_path / "layers")]
    assert main(call) == 0
    assert answers(tmp_path / "layers") == answers(tmp_path / "whole")
    said = {answer["answer"] for record in answers(tmp_path / "whole") for answer in record}
    assert len(said) > 1
    assert not list((tmp_path / "layers").glob(".hidden*"))


@pytest.mark.parametrize("free", [10**12, 2 * 10**5])
def test_little_memory_brings_layers_from_disk_and_states_into_a_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(needle_model, "available_memory", lambda device: free)
    scratch = tmp_path / "states"
    tested = needle_model.TestedModel.open(
        model, None, "cpu", "auto", "auto", layer_major=True, scratch=scratch
    )
    subject = tested.subject(512)
    assert isinstance(subject, LayerSubject)
    is_small = free < 10**6
    assert (subject.weights is not None) == is_small
    assert subject.hidden_store == (scratch if is_small else "memory")
    plain = needle_model.TestedModel.open(model, None, "cpu", "auto", "auto").subject(512)
    said = plain.read(sample_for(["#ab=", "who?"], ["77", "cc"])).answers
    sample = sample_for(["#ab=", "who?"], ["77", said[1][:1] + "c"])  # one half right
    assert subject.read(sample).answers == plain.read(sample).answers
    assert not scratch.exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--tasks", "multi-value"], "cannot test `multi-value` with `--layer-major`"),
        (["--chat"], "`--chat` and `--layer-major` given"),
        (["--tasks", "nll"], "`--tasks nll` and `--layer-major` given"),
    ],
)
def test_what_has_to_write_cannot_go_layer_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], told: str
) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny", sees=False)
    call = ["needle-test", str(checkpoint), "--layer-major", "--lengths", "1k", *args]
    assert main([*call, "-o", str(tmp_path / "report")]) == 2
    assert told in capsys.readouterr().err


def test_scout_reads_ten_million_tokens_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["needle-test", "--dry-run", "--preset", "scout", "--gpus", "h100", "--lengths", "10m"]
    assert main([*call, "--json"]) == 0
    ordinary = json.loads(capsys.readouterr().out.splitlines()[0])
    assert main([*call, "--layer-major", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out.splitlines()[0])
    assert not ordinary["fits"]
    assert layers["fits"]
    # One such layer's keys and values, 4096 bytes a token, and one chunk; states of 5120 in bf16.
    assert layers["bytes_kv"] == 4096 * (10 << 20) + 4096 * 8192
    assert layers["bytes_host"] == (10 << 20) * 5120 * 2


def test_sparse_reading_says_what_it_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    call = ["needle-test", str(model), "--lengths", "20k", "--depths", "1", "--samples", "1"]
    call += ["--no-controls", "--sparse-topk", "8", *NEEDLES, "--values", "digits:2"]
    assert main([*call, "-o", str(out)]) == 0
    recall = json.loads((out / "summary.json").read_text())["sparse_recall"]["20480"]
    assert 0 < recall["least"] <= recall["mean"] < 1  # a random model attends everywhere
    assert "sparse reading at 20k holds 0." in capsys.readouterr().out
