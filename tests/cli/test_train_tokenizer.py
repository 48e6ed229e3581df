"""`l4 train-tokenizer`: what it learns, what it writes, how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from l4cli.cli import main
from l4cli.text import NAMED_SPECIAL_TOKENS, SPECIAL_TOKENS, load_tokenizer
from l4cli.text.training import train_vocabulary

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def run(*args: str | Path, text: str | bytes = b"") -> subprocess.CompletedProcess:
    """Run the command as a user does, with something on stdin."""
    data = text.encode() if isinstance(text, str) else text
    words = [sys.executable, "-m", "l4cli", "train-tokenizer", *map(str, args)]
    return subprocess.run(words, input=data, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tok"
    assert main(["train-tokenizer", str(STDLIB / "asyncio"), "--vocab-size", "1000", "-q",
                 "-o", str(folder)]) == 0  # fmt: skip
    return folder


def test_vocabulary_is_bytes_then_merges_then_special_tokens(trained):
    tokenizer = load_tokenizer(trained)
    assert tokenizer.vocab_size == 1000
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([b]) for b in range(256)]
    ordinary = [tokenizer.token_bytes(i) for i in range(979)]
    for token in ordinary[256:]:
        shorter = set(ordinary[: ordinary.index(token)])
        assert any(token[:i] in shorter and token[i:] in shorter for i in range(1, len(token)))
    assert list(tokenizer.special_tokens.items()) == [
        (name, 979 + i) for i, name in enumerate(NAMED_SPECIAL_TOKENS)
    ]
    assert {b"self", b" the", b"async"} <= set(ordinary) | {b" " + t for t in ordinary}
    source = (STDLIB / "asyncio" / "tasks.py").read_text()
    ids = tokenizer.encode(source)
    assert tokenizer.decode(ids) == source
    assert len(source) / len(ids) > 2.5


def test_both_engines_give_the_same_ids_on_a_trained_vocabulary(trained):
    pytest.importorskip("tiktoken")
    plain = load_tokenizer(trained, backend="tokenizers")
    fast = load_tokenizer(trained, backend="tiktoken")
    assert plain.fingerprint == fast.fingerprint
    for path in sorted(STDLIB.glob("[ab]*.py")):
        text = path.read_text("utf-8")
        assert np.array_equal(plain.encode(text), fast.encode(text))


def test_training_again_gives_the_same_files(trained, tmp_path):
    folder = tmp_path / "again"
    done = run(STDLIB / "asyncio", "--vocab-size", "1000", "-o", folder)
    assert done.returncode == 0
    assert done.stdout == b""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_all_special_tokens(tmp_path):
    done = run("--all-special", "--vocab-size", "2400", "-o", tmp_path / "t", text="low lower " * 9)
    assert done.returncode == 0
    tokenizer = load_tokenizer(tmp_path / "t")
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert tokenizer.vocab_size < 2400
    warning = f"the text gave {tokenizer.vocab_size} tokens of the 2400 asked for"
    assert warning.encode() in done.stderr


def test_stdin_files_patterns_and_rows_are_read_as_tokenize_reads_them(tmp_path):
    answer = [{"type": "text", "text": "gamma gamma gamma"}]
    messages = [
        {"role": "user", "content": "beta beta beta"},
        {"role": "assistant", "content": answer},
    ]
    rows = [{"text": "alpha alpha alpha"}, {"messages": messages}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.txt").write_text("delta delta delta")
    pattern = str(tmp_path / "*.txt")
    done = run(tmp_path / "rows.jsonl", pattern, "-", "-o", tmp_path / "t", "--json",
               text="epsilon epsilon epsilon")  # fmt: skip
    assert done.returncode == 0
    event = json.loads(done.stdout.splitlines()[-1])
    tokenizer = load_tokenizer(tmp_path / "t")
    words = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {b" alpha", b" beta", b" gamma", b" delta", b" epsilon"} <= words
    assert not any(b"role" in word or b"user" in word for word in words)
    assert event == {
        "event": "done",
        "out": str(tmp_path / "t"),
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "bytes_per_token": event["bytes_per_token"],
        "num_documents": 4,
        "num_bytes": event["num_bytes"],
        "skipped": {},
        "bad": {},
    }


def test_quiet_says_nothing(tmp_path):
    done = run("--vocab-size", "279", "-q", "-o", tmp_path / "t", text="a b a b a b a b")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_special_tokens_in_the_text_are_learned_as_text(tmp_path):
    done = run("--vocab-size", "300", "-o", tmp_path / "t", text="<|eot|> " * 50)
    assert done.returncode == 0
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.eot_id not in tokenizer.encode("<|eot|>")


def refuses(capsys, code: int, args: list[str | Path], *facts: str) -> None:
    """Run the command in this process and look at its three lines."""
    assert main(["train-tokenizer", *map(str, args)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["error", "why", "fix"]
    for fact in facts:
        assert fact in "\n".join(lines)


def test_wrong_use(tmp_path, capsys):
    out = ("-o", tmp_path / "t")
    refuses(
        capsys, 2, ["--vocab-size", "276", *out], "276", "256 bytes and 21 special tokens are 277"
    )
    refuses(capsys, 2, ["--vocab-size", "2000", "--all-special", *out], "2304", "--all-special")
    refuses(capsys, 2, ["--vocab-size", "many", *out], "--vocab-size")
    refuses(capsys, 2, ["--vocabsize", "300", *out], "--vocab-size")
    refuses(capsys, 2, ["-", "-", *out], "given twice")
    refuses(capsys, 2, ["--format", "lines", "--text-key", "body", *out], "--text-key")
    assert not (tmp_path / "t").exists()


def test_inputs_that_give_no_vocabulary(tmp_path, capsys):
    out = ("-o", tmp_path / "t")
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("  \n \n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (tmp_path / "folder").mkdir()
    refuses(capsys, 1, [tmp_path / "nothing", *out], "nothing")
    refuses(capsys, 1, [tmp_path / "bad.txt", *out], "bad.txt", "UTF-8")
    refuses(capsys, 1, [tmp_path / "bad.txt", "--skip-bad", *out], "no text", "invalid UTF-8")
    refuses(capsys, 1, [tmp_path / "empty.txt", *out], "no text")
    refuses(capsys, 1, [tmp_path / "folder", *out], "no text")
    refuses(capsys, 1, [tmp_path / "rows.jsonl", *out], "rows.jsonl", "line 2")
    refuses(capsys, 1, [sys.executable, *out], "not UTF-8")
    refuses(capsys, 1, [tmp_path / "blank.txt", *out], "no text")
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.glob(".t*"))


def test_bad_documents_can_be_left_out(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    (tmp_path / "good.txt").write_text("good good good")
    folder = tmp_path / "t"
    names = (tmp_path / "bad.txt", tmp_path / "good.txt")
    done = run(*names, "--skip-bad", "-o", folder, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["bad"] == {"invalid UTF-8": 1}
    assert b"left out 1 bad: invalid UTF-8" in done.stderr


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    folder, text = tmp_path / "t", tmp_path / "a.txt"
    text.write_text("a a a")
    folder.mkdir()
    assert run(text, "-o", folder).returncode == 0  # an empty folder may be filled
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refuses(capsys, 1, [text, "-o", folder], "not empty", "-o")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").touch()
    refuses(capsys, 1, [text, "-o", tmp_path / "file"], "a file stands there")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a a a")
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "t"
    refuses(capsys, 1, [tmp_path / "a.txt", "-o", out], "permission denied")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_at_once_and_leaves_nothing(tmp_path, number, code):
    words = [sys.executable, "-m", "l4cli", "train-tokenizer", "-q", "-o", str(tmp_path / "t")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        # A pipe holds far less than this, so it is reading; then it waits for more.
        process.stdin.write(b"some words of a text without an end\n" * 30_000)
        process.stdin.flush()
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")
        process.stdin.close()
    assert not list(tmp_path.iterdir())


def test_long_text_is_learned_from_in_bounded_pieces():
    def texts():
        yield "a" * 1_000_000 + " " * 1_000_000
        yield from ("word " * 10_000 for _ in range(20))

    vocabulary = train_vocabulary(texts(), 400)
    assert b" word" in vocabulary.tokens
