"""`l4 chat --draft` and `--lookup`: the same answers, and how many guesses stood."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from tiny_chat import save_checkpoint, save_picture

from l4cli.cli import main

NEW_KEYS = {"num_steps", "num_draft_tokens", "num_accepted_tokens", "accepted_per_step"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def random_model(folder) -> Path:
    return save_checkpoint(folder / "random")


@pytest.fixture(scope="module")
def draft(folder) -> Path:
    """Smaller, blind, and with fewer rows of padding above the same tokenizer."""
    return save_checkpoint(folder / "draft", sees=False, num_hidden_layers=2, vocab_size=288)


@pytest.fixture
def ask(monkeypatch, capsys):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        code = main(["chat", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_answers_stay_the_same(ask, random_model, draft):
    words = (random_model, "-p", "how", "--raw", "--json", "-q", "--max-new-tokens", 60)
    plain = json.loads(ask(*words)[1])
    assert not NEW_KEYS & set(plain)
    for more in (["--lookup"], ["--draft", draft], ["--draft", random_model, "--draft-tokens", 3]):
        code, out, _ = ask(*words, *more)
        event = json.loads(out)
        assert code == 0
        assert set(event) == set(plain) | NEW_KEYS
        assert event["answer"] == plain["answer"]
        assert event["num_answer_tokens"] == plain["num_answer_tokens"] > 5
        assert event["num_accepted_tokens"] <= event["num_draft_tokens"]
    # The model itself guesses right wherever there is room before the border of a chunk.
    assert event["num_accepted_tokens"] == event["num_draft_tokens"] > 0
    assert event["num_steps"] + event["num_accepted_tokens"] >= event["num_answer_tokens"]
    rate = event["num_accepted_tokens"] / event["num_steps"]
    assert event["accepted_per_step"] == pytest.approx(rate, abs=1e-3)


def test_the_same_seed_gives_the_same_answer(ask, random_model, draft):
    words = (random_model, "-p", "hi", "-q", "--max-new-tokens", 40, "--temperature", 1)
    first, again, other = (ask(*words, "--draft", draft, "--seed", s)[1] for s in (1, 1, 2))
    assert first == again != other


def test_the_line_below_tells_of_guesses(ask, random_model):
    _, _, err = ask(random_model, "-p", "hi", "--draft", random_model, "--draft-tokens", 2)
    assert " guesses accepted, " in err
    assert " guesses accepted" not in ask(random_model, "-p", "hi")[2]


def test_pictures_are_read_around(ask, random_model, draft, tmp_path):
    picture = save_picture(tmp_path / "a.png")
    words = (random_model, "-p", "hi", "--image", picture, "-q", "--max-new-tokens", 30)
    plain = ask(*words)[1]
    for more in (["--lookup"], ["--draft", draft], ["--draft", random_model]):
        assert ask(*words, *more)[:2] == (0, plain)


def test_another_tokenizer_is_refused(ask, random_model, folder):
    other = save_checkpoint(folder / "other", sees=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (other / name).read_text()
        (other / name).write_text(text.replace("<|finetune_right_pad|>", "<|something_else|>"))
    code, out, err = ask(random_model, "-p", "hi", "--draft", other)
    assert (code, out) == (1, "")
    assert f"cannot draft with `{other}`" in err
    assert "its tokenizer is not that of" in err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--draft", "x", "--lookup"], "both guess what comes next"),
        (["--draft-tokens", 3], "nobody guesses"),
        (["--lookup", "--draft-tokens", 0], "--draft-tokens"),
    ],
)
def test_wrong_usage(ask, random_model, words, why):
    code, _, err = ask(random_model, "-p", "hi", *words)
    assert code == 2
    assert why in err


def test_no_such_draft(ask, random_model):
    code, _, err = ask(random_model, "-p", "hi", "--draft", "nowhere")
    assert code == 1
    assert "nowhere" in err


def test_offload_on_a_cpu_says_that_it_changes_nothing(ask, random_model):
    plain = ask(random_model, "-p", "hi", "--device", "cpu")
    code, out, err = ask(random_model, "-p", "hi", "--device", "cpu", "--offload", "experts")
    assert (code, out) == plain[:2]
    assert "`--offload experts` changes nothing on a CPU: experts are in host memory" in err


def test_offload_memory_without_offload(ask, random_model):
    code, _, err = ask(random_model, "-p", "hi", "--offload-memory", 2)
    assert code == 2
    assert "nothing is offloaded" in err
