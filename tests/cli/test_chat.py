"""`l4 chat` through its real entry point: what is asked, what is answered, what is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_chat import save_checkpoint, save_picture

from l4cli.cli import main

SAYS = "R\u00e9d[5 23,64\t97]!"  # two bytes in one character, and a box
KEYS = {
    "answer",
    "num_prompt_tokens",
    "num_answer_tokens",
    "prefill_tok_per_sec",
    "decode_tok_per_sec",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("chat") / "says", SAYS)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    return save_picture(tmp_path_factory.mktemp("pictures") / "a picture.png")


@pytest.fixture
def ask(monkeypatch, capsys):
    """Run one command line in this process, with `piped` on standard input."""

    def run(*words: object, piped: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        code = main(["chat", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def run_l4(*words: object, **options) -> subprocess.CompletedProcess[bytes]:
    """Run one command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, "-m", "l4cli", "chat", *map(str, words)]
    return subprocess.run(command, capture_output=True, env=environment, timeout=300, **options)


def test_stdout_holds_the_answer_and_nothing_else(checkpoint, picture):
    done = run_l4(checkpoint, "Where?", "--image", picture, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    assert done.stdout.decode() == SAYS + "\n"
    assert f"picture `{picture}`: 40 x 24, 5 tiles (2 x 2 and an overview), 27 tokens" in (
        done.stderr.decode()
    )
    assert b"\x1b" not in done.stdout + done.stderr


def test_closed_pipe_is_silent(checkpoint):
    command = f"'{sys.executable}' -m l4cli chat '{checkpoint}' -p hi --quiet | true"
    script = f"set -o pipefail; {command}; echo $?"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.stdout == b"141\n"
    assert done.stderr == b""


def test_locale_without_the_letters(checkpoint):
    done = run_l4(
        checkpoint, "-p", "hi", env={"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}, input=b""
    )
    assert (done.returncode, done.stdout) == (0, SAYS.replace("\u00e9", "?").encode() + b"\n")


def test_json_object(ask, checkpoint):
    code, out, _ = ask(checkpoint, "--json", "-q", piped=b"Where?\n")
    event = json.loads(out)
    assert code == 0
    assert set(event) == KEYS
    assert event["answer"] == SAYS
    assert event["num_answer_tokens"] == len(SAYS.encode())
    # BOS, header (3), 6 bytes and two newlines, eot, header (11 bytes of role) and two newlines.
    assert event["num_prompt_tokens"] == 1 + (2 + 4 + 2 + 6 + 1) + (2 + 9 + 2)
    assert event["prefill_tok_per_sec"] > 0
    assert event["decode_tok_per_sec"] > 0


def test_piped_text_joins_the_question(ask, checkpoint):
    def count(*words, piped):
        code, out, _ = ask(checkpoint, "--json", *words, piped=piped)
        assert code == 0
        return json.loads(out)["num_prompt_tokens"]

    alone = count("-p", "four", piped=b"")
    assert count(piped=b"four\n") == alone
    assert count("-p", "four", piped=b"eight ch\n") == alone + len("eight ch\n\n")


def test_picture_alone_is_described(ask, checkpoint, picture):
    _, out, _ = ask(checkpoint, "--json", "--image", picture)
    default = json.loads(out)["num_prompt_tokens"]
    _, out, _ = ask(checkpoint, "--json", "--image", picture, "-p", "Describe the picture.")
    assert json.loads(out)["num_prompt_tokens"] == default
    _, out, _ = ask(checkpoint, "--json", "--image", picture, "--image", picture)
    assert json.loads(out)["num_prompt_tokens"] == default + 27


def test_boxes_are_drawn(ask, checkpoint, picture, tmp_path):
    target = tmp_path / "boxes.png"
    code, out, err = ask(checkpoint, "Where?", "--image", picture, "--boxes", target)
    assert (code, out) == (0, SAYS + "\n")
    assert f"1 box drawn into `{target}`" in err
    with Image.open(target) as drawn, Image.open(picture) as original:
        assert drawn.size == original.size
        changed = [
            (x, y)
            for x in range(40)
            for y in range(24)
            if drawn.getpixel((x, y)) != original.getpixel((x, y))
        ]
    xs, ys = zip(*changed, strict=True)
    # 5 to 64 percent of 40, 23 to 97 percent of 24.
    assert (min(xs), max(xs), min(ys), max(ys)) == (2, 25, 6, 22)


def test_sampling_has_a_seed(ask, tmp_path):
    folder = save_checkpoint(tmp_path / "random")
    words = [folder, "-p", "hi", "--json", "--max-new-tokens", "12"]

    def answer(*more):
        return json.loads(ask(*words, *more)[1])["answer"]

    greedy = answer()
    assert greedy == answer("--seed", "5")
    drawn = answer("--temperature", "3", "--seed", "5")
    assert drawn != greedy
    assert drawn == answer("--temperature", "3", "--seed", "5")
    assert drawn != answer("--temperature", "3", "--seed", "6")
    # Filters alone mean sampling; the narrowest of them is greedy again.
    assert answer("--top-k", "1", "--seed", "5") == greedy
    assert answer("--top-p", "0.5", "--seed", "5") != greedy
    assert answer("--dtype", "bf16") is not None


def test_threads_are_as_before(ask, checkpoint, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert ask(checkpoint, "-p", "hi")[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_defaults_come_from_the_checkpoint(ask, tmp_path):
    folder = save_checkpoint(tmp_path / "random")
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "do_sample": True, "temperature": 3.0, "top_p": 0.9}))
    words = [folder, "-p", "hi", "--json", "--max-new-tokens", "12"]
    drawn = json.loads(ask(*words)[1])["answer"]
    explicit = [*words, "--temperature", "3", "--top-p", "0.9"]
    assert drawn == json.loads(ask(*explicit)[1])["answer"]
    assert drawn != json.loads(ask(*words, "--temperature", "0")[1])["answer"]
    path.write_text(json.dumps({**config, "temperature": "hot"}))
    code, _, err = ask(*words)
    assert code == 1
    assert "`temperature` is 'hot', not a number" in err


def test_newest_run_answers_when_none_is_named(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("L4_MODEL", raising=False)
    code, out, err = ask("-p", "hi")
    assert (code, out) == (1, "")
    assert "error: no model to talk to" in err
    assert ask() == (code, out, err)
    assert "sh examples/quickstart.sh" in err
    for name, says in (("old", "old"), ("new", "newly")):
        save_checkpoint(tmp_path / "runs" / name / "step-000001", says)
        (tmp_path / "runs" / name / "latest").symlink_to("step-000001")
        os.utime(
            tmp_path / "runs" / name / "latest", (1, 1 + (name == "new")), follow_symlinks=False
        )
    code, out, err = ask("-p", "hi")
    assert (code, out) == (0, "newly\n")
    assert "model: `runs/new/latest`" in err
    (tmp_path / "runs" / "new" / "step-000001" / "tokenizer_config.json").unlink()
    assert ask("-p", "hi")[1] == "old\n"
    monkeypatch.setenv("L4_MODEL", "runs/new")
    code, _, err = ask("-p", "hi")
    assert code == 1
    assert "no chat template" in err
    assert "--raw" in err
    assert ask("--raw", "-p", "hi")[:2] == (0, "newly\n")


def test_context_too_long_names_the_numbers(ask, checkpoint, picture):
    code, out, err = ask(checkpoint, piped=b"x" * 600)
    assert (code, out) == (1, "")
    assert "624 tokens are needed, the model has room for 512" in err
    code, _, err = ask(checkpoint, "-p", "hi", "--max-new-tokens", "500")
    assert code == 1
    assert "525 tokens are needed" in err
    code, _, err = ask(checkpoint, *["--image", picture] * 20)
    assert code == 1
    assert f"{20 * 27 + 22 + 1 + 2 + 4 + 2 + 13 + 1} tokens are needed" in err


def test_answer_that_reaches_a_limit_says_so(ask, tmp_path):
    folder = save_checkpoint(tmp_path / "endless", "abc", ends=False)
    code, out, err = ask(folder, "-p", "hi", "--max-new-tokens", "5")
    assert (code, out) == (0, "abcab\n")
    assert "cut at 5 tokens: `--max-new-tokens`" in err
    code, out, err = ask(folder, "-p", "x" * 400)
    assert code == 0
    assert len(out.strip()) == 512 - 423
    assert "warning: the answer was cut: the context of 512 tokens is full" in err


@pytest.mark.parametrize(
    ("words", "piped", "code", "message"),
    [
        (["CHECKPOINT"], b"", 2, "standard input is empty"),
        (["CHECKPOINT", "a", "-p", "b"], b"", 2, "both name the question"),
        (["CHECKPOINT", "-p", ""], b"", 2, "it is empty"),
        (["CHECKPOINT", "-p", "\udc80"], b"", 2, "not UTF-8"),
        (["CHECKPOINT"], b"\xff\xfe", 2, "byte 0 of standard input is not UTF-8"),
        (["CHECKPOINT", "-p", "a", "--raw", "--system", "b"], b"", 2, "no system message"),
        (["CHECKPOINT", "-p", "a", "--temperature", "-1"], b"", 2, "--temperature"),
        (["CHECKPOINT", "-p", "a", "--top-p", "0"], b"", 2, "above 0"),
        (["CHECKPOINT", "-p", "a", "--top-k", "3", "--temperature", "0"], b"", 2, "always takes"),
        (["CHECKPOINT", "-p", "a", "--device", "tpu"], b"", 2, "--device"),
        (["CHECKPOINT", "-p", "a", "--boxes", "x.png"], b"", 2, "0 pictures were given"),
        (["CHECKPOINT", "-p", "a", "--image", "PICTURE", "--boxes", "x.gif"], b"", 2, "`.png`"),
        (["CHECKPOINT", "-p", "a", "--image", "PICTURE", "--boxes", "no/x.png"], b"", 2, "mkdir"),
        (["CHECKPOINT", "-p", "a", "--image", "nowhere.png"], b"", 1, "no such file"),
        (["CHECKPOINT", "-p", "a", "--image", "CHECKPOINT"], b"", 1, "is a directory"),
        (["CHECKPOINT", "-p", "a", "--image", "TEXT"], b"", 1, "neither a PNG nor a JPEG"),
        (["CHECKPOINT", "-p", "a", "--image", "EMPTY"], b"", 1, "the file is empty"),
        (["CHECKPOINT", "-p", "a", "--image", "CUT"], b"", 1, "damaged or cut off"),
        (["nowhere", "-p", "a"], b"", 1, "no such folder"),
        (["What is this?"], b"hm", 1, 'a question without a checkpoint: `l4 chat -p "..."`'),
        (["TEXT", "-p", "a"], b"", 1, "it is a file"),
    ],
)
def test_bad_input_is_refused(ask, checkpoint, picture, tmp_path, words, piped, code, message):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:100])
    known = {"CHECKPOINT": checkpoint, "PICTURE": picture}
    known |= {name.upper(): tmp_path / f"{name}.png" for name in ("text", "empty", "cut")}
    got, out, err = ask(*(known.get(word, word) for word in words), piped=piped)
    assert (got, out) == (code, "")
    assert message in err
    assert [line.split(":")[0] for line in err.splitlines()[-3:]] == ["error", "why", "fix"]


def test_a_checkpoint_that_does_not_fit_together(ask, tmp_path):
    folder = save_checkpoint(tmp_path / "random")
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    code, _, err = ask(folder, "-p", "hi")
    assert code == 1
    assert "`image_size` is 32 there and 16 in `config.json`" in err

    small = save_checkpoint(tmp_path / "small", vocab_size=280)
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["vocab_size"] = 270
    (small / "config.json").write_text(json.dumps(config))
    code, _, err = ask(small, "-p", "hi")
    assert code == 1
    assert "tokens, and the model knows 270" in err


def test_a_model_without_eyes(ask, picture, tmp_path):
    folder = save_checkpoint(tmp_path / "blind", sees=False)
    code, out, err = ask(folder, "-p", "hi", "--image", picture)
    assert (code, out) == (1, "")
    assert "has no picture encoder" in err
    assert ask(folder, "-p", "hi", "--max-new-tokens", "3")[0] == 0


def test_a_model_larger_than_memory(ask, checkpoint, monkeypatch):
    monkeypatch.setattr("l4cli.commands.chat_model.available_memory", lambda device: 1000)
    code, out, err = ask(checkpoint, "-p", "hi")
    assert (code, out) == (1, "")
    assert "1000 B of memory are free" in err
