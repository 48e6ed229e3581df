"""`l4 pretrain` refuses what cannot work, before anything is made, and says what would."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from tiny_pretrain import (
    only_error,
    pretrain,
    weights_of,
)

from l4cli.cli import main


def test_other_options_are_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(data, out, "--steps", "2") == 0
    capsys.readouterr()
    assert pretrain(data, out, "--steps", "2", "--lr", "0.5", "--set", "rope_theta=5e5") == 2
    error = only_error(capsys)
    assert "`lr` was" in error
    assert "`model.rope_theta` was 10000.0, now 500000.0" in error
    assert pretrain(data, out, "--steps", "1") == 2
    assert "`steps` was 2, now 1" in only_error(capsys)
    assert pretrain(data, out, "--steps", "2", "--fresh") == 2
    assert "new or empty folder" in only_error(capsys)
    # How often to save and to log is no part of what the run is.
    assert pretrain(data, out, "--steps", "3", "--log-every", "1", "--save-every", "1") == 0


def test_fp8_needs_experts_of_whole_blocks(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp8 = ["--steps", "2", "--dtype", "fp8"]
    for more, why in (
        ([], "the widths 32 and 32 of experts are not both multiples of 128"),
        (["--set", "moe_layers=[]"], "experts compute in it, and the model has none"),
    ):
        assert pretrain(data, tmp_path / "run", *fp8, *more) == 2
        error = only_error(capsys)
        assert why in error
        assert "`--dtype bf16`" in error
    assert not (tmp_path / "run").exists()


def test_a_model_too_large_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scout"
    began = time.process_time()
    shards = str(data / "text")
    assert main(["pretrain", shards, "--preset", "scout", "-o", str(out)]) == 1
    assert time.process_time() - began < 5
    error = only_error(capsys)
    assert "`scout` does not fit this machine" in error
    assert "weights 404.7 GiB" in error
    assert "`--preset " in error
    assert not out.exists()


def test_codes_are_nothing_to_train_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, codes = tmp_path / "run", tmp_path / "codes"
    assert pretrain(data, tmp_path / "first", "--steps", "1", "-q") == 0
    assert main(["quantize", str(tmp_path / "first"), "-o", str(codes), "--quiet"]) == 0
    capsys.readouterr()
    for command in (
        ["pretrain", str(data / "text"), "--init-from", str(codes), "--steps", "1"],
        ["extend-context", str(codes), str(data / "text.tokens"), "--stages", "128:1k"],
    ):
        assert main([*command, "-o", str(out)]) == 1
        error = only_error(capsys)
        assert "it is quantized" in error
        assert f"`l4 convert {codes} -o plain/`" in error
        assert not out.exists()


def test_vocabulary_follows_the_shards_or_has_to_hold_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(data, out, "--steps", "1", "--set", "vocab_size=100") == 2
    error = only_error(capsys)
    assert "the model 100" in error
    assert "--set vocab_size=277" in error
    assert main(["pretrain", str(data / "text"), "--steps", "1", "-o", str(out), "-q"]) == 0
    config = json.loads((out / "latest" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 320
    assert config["text_config"]["bos_token_id"] == 256
    assert config["image_token_index"] == 274


def test_pictures_of_another_geometry_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = str(data / "pictures")
    assert main(["pretrain", pictures, "--preset", "mini", "-o", str(tmp_path / "a")]) == 2
    assert "`image_size` is 64, the model's 112" in only_error(capsys)
    config = ["--config", str(data / "tiny.json"), "-o", str(tmp_path / "b")]
    assert main(["pretrain", pictures, *config]) == 2
    assert "has no vision" in only_error(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "hiden_size=3"], "did you mean `hidden_size`?"),
        (["--set", "text_config.hidden_sise=3"], "did you mean `text_config.hidden_size`?"),
        (["--set", "hidden_size=abc"], "`hidden_size` is a whole number"),
        (["--set", "hidden_size"], "it has no `=`"),
        (["--set", "num_key_value_heads=3"], "does not divide"),
        (["--set", "image_size=3"], "has no vision"),
        (["--steps", "3", "--tokens", "4M"], "give one of them"),
        (["--tokens", "4X"], "cannot use `--tokens 4X`"),
        (["--epochs", "0"], "cannot use `--epochs 0.0`"),
        (["--lr", "-1"], "cannot use `--lr -1.0`"),
        (["--lr", "1e-3", "--min-lr", "1"], "cannot use `--min-lr 1`"),
        (["--seq-len", "128"], "rows of 64 tokens"),
        (["--preset", "nano"], "each brings a shape of its own"),
        (["--micro-batch-size", "3"], "does not divide"),
        (["--freeze", "vision"], "no vision"),
        (["--balance", "maybe"], "maybe"),
        (["--seq-len", "4x"], "cannot use `--seq-len 4x`"),
        (["--seed", str(2**64)], "--seed"),
        (["--epochs", "1e300"], "cannot use `--epochs 1e+300`"),
        (["--set", "max_position_embeddings=32"], "rows of 64 tokens are too long"),
        (["--set", "initializer_range=0.5"], "cannot set `initializer_range`"),
        (["--set", "rope_theta=0"], "`rope_theta` is 0"),
        (["--optim", "sgd"], "sgd"),
    ],
)
def test_wrong_usage(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    assert pretrain(data, tmp_path / "run", *options) == 2
    assert words in only_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("patch_size=0", "`patch_size` is 0"),
        ("pixel_shuffle_ratio=0", "`pixel_shuffle_ratio` is 0"),
        ("vision_config.num_attention_heads=0", "`num_attention_heads` is 0"),
        ("vision_config.num_hidden_layers=-1", "`num_hidden_layers` is -1"),
        ("num_channels=1", "`num_channels` is 1"),
    ],
)
def test_impossible_vision_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    options = [str(data / "pictures"), "--preset", "nano", "--set", word, "-o", str(tmp_path / "r")]
    assert main(["pretrain", *options]) == 2
    assert said in only_error(capsys)
    assert not (tmp_path / "r").exists()


def test_several_ranks_are_refused(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert pretrain(data, tmp_path / "run") == 2
    assert "cannot train on several ranks" in only_error(capsys)
    assert not (tmp_path / "run").exists()
    # Whoever starts us may set these for every program; only training is of several ranks.
    assert main(["info", "preset:nano"]) == 0
    assert "num_hidden_layers" in capsys.readouterr().out


def test_held_out_pictures_are_checked_against_the_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tmp_path / "wide"
    stream = tmp_path / "wide.tokens"
    rows = str(data / "pictures.jsonl")
    assert main(["tokenize", rows, "-o", str(stream), "-q", "--preset", "mini"]) == 0
    assert main(["pack", str(stream), "--seq-len", "64", "-o", str(wide), "-q"]) == 0
    nano = [str(data / "text"), "--preset", "nano", "--steps", "1", "--batch-size", "2", "-q"]
    capsys.readouterr()
    bad = ["pretrain", *nano, "--eval-data", str(wide), "-o", str(tmp_path / "bad")]
    assert main(bad) == 2
    assert "do not fit the model" in only_error(capsys)
    assert not (tmp_path / "bad").exists()
    # Training on text alone says nothing about pictures; the model does.
    good = ["--eval-data", str(data / "pictures"), "-o", str(tmp_path / "good")]
    assert main(["pretrain", *nano, *good]) == 0


def test_starting_from_weights_of_another_shape_is_refused_first(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(data, tmp_path / "first", "--steps", "1", "-q") == 0
    capsys.readouterr()
    options = [str(data / "text"), "--init-from", str(tmp_path / "first")]
    options += ["--set", "hidden_size=64", "-o", str(tmp_path / "second")]
    assert main(["pretrain", *options]) == 2
    assert "leave out `--set hidden_size=64`" in only_error(capsys)
    assert not (tmp_path / "second").exists()


def test_wrong_files(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", str(data / "nothing"), "-o", str(out)]) == 1
    assert "there is no such folder" in only_error(capsys)
    assert main(["pretrain", str(data / "text"), "--preset", "nan", "-o", str(out)]) == 2
    assert "did you mean `nano`?" in only_error(capsys)
    damaged = tmp_path / "damaged"
    shutil.copytree(data / "text", damaged)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert pretrain(data, out, "--eval-data", str(damaged)) == 1
    only_error(capsys)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert pretrain(data, foreign, "--steps", "1") == 2
    assert "belongs to something else" in only_error(capsys)


def test_a_damaged_checkpoint_is_refused_with_the_way_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(data, out, "--steps", "4", "-q", "--save-every", "2") == 0
    straight = weights_of(out)
    newest = out / "step-000004"
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert pretrain(data, out, "--steps", "6", "-q") == 1
    assert f"remove `{newest}`" in only_error(capsys)
    shutil.rmtree(newest)
    assert pretrain(data, out, "--steps", "4", "-q") == 0
    assert weights_of(out) == straight
