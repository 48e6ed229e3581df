"""`l4 tokenize --synthetic`: documents made on the spot, and options that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4cli.cli import main
from l4cli.data.shards import ShardSet
from l4cli.data.stream import read_stream
from l4cli.text import load_tokenizer

FORMAT = ["--needle", "#{key}={value};", "--question", "#{key}=", "--keys", "letters:2"]
FORMAT += ["--values", "digits:3"]


def refused(capsys, *args: object) -> str:
    code = main(["tokenize", *map(str, args)])
    said = capsys.readouterr()
    assert code == 2
    assert [line.split(":")[0] for line in said.err.splitlines()[-3:]] == ["error", "why", "fix"]
    return said.err


def test_documents_are_made_written_and_packed(tmp_path: Path, capsys):
    book, out = tmp_path / "book.txt", tmp_path / "x.tokens"
    book.write_text("".join(f"This is line {i} of the book. It is short.\n" for i in range(99)))
    args = ["--synthetic", "retrieval,copies", "--count", "20k", "--length", "256", *FORMAT]
    args += ["--haystack", str(book), "--hard", "0.5", "--seed", "5"]
    assert main(["tokenize", *args, "-o", str(out), "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["event"] == "done"
    assert 20_000 <= done["num_tokens"] < 20_256
    assert (done["kinds"], done["length"]) == (["retrieval", "copies"], 256)
    with open(out, "rb") as file:
        reader = read_stream(file, "x")
        frames = list(reader)
    assert reader.totals.tokens == done["num_tokens"]
    assert sum(int(frame.loss_mask.sum()) for frame in frames) == done["num_targets"]
    text = load_tokenizer("bytes").decode(frames[0].tokens)
    assert " of the book." in text
    assert main(["tokenize", *args, "-o", str(tmp_path / "y.tokens")]) == 0
    assert (tmp_path / "y.tokens").read_bytes() == out.read_bytes()
    pack = ["pack", str(out), "--seq-len", "256", "-o", str(tmp_path / "shards")]
    assert main(pack) == 0
    assert ShardSet.open(tmp_path / "shards").num_tokens == done["num_tokens"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--synthetic", "retrieval"], "--count"),
        (["--synthetic", "retrievel", "--count", "1k"], "did you mean `retrieval`"),
        (["--synthetic", "retrieval", "--count", "lots"], "--count lots"),
        (["--synthetic", "retrieval", "--count", "1k", "--length", "0"], "--length 0"),
        (["--synthetic", "retrieval", "--count", "1k", "--length", "30"], "too short"),
        (["--synthetic", "retrieval", "--count", "1k", "book.txt"], "`book.txt` is not read"),
        (["--synthetic", "retrieval", "--count", "1k", "--keys", "leters:2"], "unknown kind"),
        (["--synthetic", "retrieval", "--count", "1k", "--needle", "#{key}"], "--question"),
        (["--hard", "0.5", "book.txt"], "`--hard` needs `--synthetic`"),
        (["--haystack", "a", "book.txt"], "`--haystack` needs `--synthetic`"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, capsys, args, said: str):
    out = tmp_path / "x.tokens"
    assert said in refused(capsys, *args, "-o", out)
    assert not list(tmp_path.iterdir())
