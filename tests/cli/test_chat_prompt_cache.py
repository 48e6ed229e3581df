"""`l4 chat --prompt-cache`: a long prompt is read once, and another model's file is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_chat import save_checkpoint, save_picture

from l4cli.checkpoint import load_model
from l4cli.cli import main
from l4cli.inference import Cache, Engine

TEXT = b"Call me Ishmael. Some years ago, never mind how long precisely, " * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("chat") / "model", max_position_embeddings=2048)


@pytest.fixture
def ask(monkeypatch, capsys):
    def run(*words: object, piped: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        code = main(["chat", *map(str, words), "--max-new-tokens", "6"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_another_question_reads_only_itself(ask, checkpoint, tmp_path):
    file = tmp_path / "text.cache"
    kept = ("--prompt-cache", file)
    code, _, err = ask(checkpoint, "-p", "Who?", *kept, piped=TEXT)
    assert code == 0, err
    assert f"tokens kept in `{file}`" in err
    stamp = file.stat().st_mtime_ns
    for question in ("Who?", "Where and when?", "W"):
        _, alone, _ = ask(checkpoint, "-p", question, "--json", piped=TEXT)
        code, out, err = ask(checkpoint, "-p", question, "--json", *kept, piped=TEXT)
        assert code == 0
        ours, expected = json.loads(out), json.loads(alone)
        assert ours["answer"] == expected["answer"]
        assert ours["num_prompt_tokens"] == expected["num_prompt_tokens"]
        found, total = (
            int(word) for word in err.split("tokens are in")[0].split() if word.isdigit()
        )
        assert total == ours["num_prompt_tokens"]
        if question == "Who?":
            assert found == total
        else:  # up to the last border before they differ, which is within the first two letters
            shared = total - len(question) - 1 - (2 + 9 + 2)
            assert found in (shared // 16 * 16, (shared + 2) // 16 * 16)
    assert file.stat().st_mtime_ns == stamp


def test_another_text_takes_the_files_place(ask, checkpoint, tmp_path):
    file = tmp_path / "text.cache"
    ask(checkpoint, "-p", "Who?", "--prompt-cache", file, piped=TEXT)
    code, _, err = ask(checkpoint, "-p", "Who?", "--prompt-cache", file, piped=b"Other. " * 50)
    assert code == 0
    assert "tokens kept in" in err
    config = load_model(checkpoint).config.text
    assert bytes(i for i in Cache.load(file, config).tokens if i < 256).count(b"Other. ") == 50


def test_another_models_file_is_refused(ask, checkpoint, tmp_path):
    file = tmp_path / "text.cache"
    shape = save_checkpoint(tmp_path / "shape", attention_chunk_size=32)
    ask(shape, "-p", "Who?", "--prompt-cache", file, piped=TEXT)
    code, out, err = ask(checkpoint, "-p", "Who?", "--prompt-cache", file, piped=TEXT)
    assert (code, out) == (1, "")
    assert "it was made by a model of another config" in err
    model = load_model(checkpoint)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.add_(0.5)
    Engine(model).prefill([1, 2, 3]).save(file)
    code, _, err = ask(checkpoint, "-p", "Who?", "--prompt-cache", file, piped=TEXT)
    assert code == 1
    assert "with other weights" in err


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_refused_and_left_alone(ask, checkpoint, tmp_path, damage):
    file = tmp_path / "text.cache"
    ask(checkpoint, "-p", "Who?", "--prompt-cache", file, piped=TEXT)
    damage = file.read_bytes()[:-50] if damage is None else damage
    file.write_bytes(damage)
    code, _, err = ask(checkpoint, "-p", "Who?", "--prompt-cache", file, piped=TEXT)
    assert code == 1
    assert f"error: cannot open cache `{file}`" in err
    assert file.read_bytes() == damage


def test_what_cannot_be_kept(ask, checkpoint, tmp_path):
    picture = save_picture(tmp_path / "a.png")
    file = tmp_path / "x.cache"
    code, _, err = ask(checkpoint, "-p", "?", "--prompt-cache", file, "--image", picture)
    assert code == 2
    assert "the same tokens whatever they show" in err
    code, _, err = ask(checkpoint, "-p", "?", "--prompt-cache", tmp_path / "no" / "x.cache")
    assert code == 2
    assert "there is no folder" in err
    code, _, err = ask(checkpoint, "-p", "?", "--prompt-cache", tmp_path)
    assert code == 2
    assert "it is a folder" in err
