"""`l4 pack` through the real entry point: pipes, files, wrong input, interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from shard_samples import GEOMETRY, picture_frame, text_frame, write_stream

from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.shards import ShardSet
from l4cli.data.stream import StreamWriter
from l4cli.text import load_tokenizer

L4 = [sys.executable, "-m", "l4cli"]


def l4(*args: object, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [*L4, *(str(arg) for arg in args)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=cwd)


def lines_of(done: subprocess.CompletedProcess[bytes], code: int = 1) -> list[str]:
    """The three lines of an error, and nothing on stdout."""
    assert done.returncode == code, done.stderr.decode()
    assert done.stdout == b""
    lines = [line for line in done.stderr.decode().splitlines() if ": " in line][-3:]
    assert [line.partition(":")[0] for line in lines] == ["error", "why", "fix"], lines
    return lines


def tokens_of(folder: Path) -> np.ndarray:
    shards = ShardSet.open(folder)
    rows = [shards.row(i) for i in range(shards.num_rows)]
    return np.concatenate([row.input_ids[row.document_ids > 0] for row in rows])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pipe_without_options(tmp_path) -> None:
    """`l4 tokenize docs/ | l4 pack`, as a shell runs it."""
    (tmp_path / "docs").mkdir()
    for i in range(5):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"document {i}\n" * 300 * (i + 1))
    shell = " ".join(L4)
    done = subprocess.run(
        ["sh", "-c", f"{shell} tokenize docs/ | {shell} pack"], capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    assert b"% full" in done.stderr
    shards = ShardSet.open(tmp_path / "shards")
    assert shards.seq_len == 1024
    assert shards.num_tokens == sum(11 * 300 * (i + 1) + 2 for i in range(5))
    assert shards.tokenizer().fingerprint == load_tokenizer("bytes").fingerprint
    assert shards.verify() == []
    assert names_in(tmp_path) == ["docs", "shards"]


def test_files_options_and_json(tmp_path) -> None:
    a = write_stream(tmp_path / "a.tokens", text_frame(0), picture_frame(1))
    b = write_stream(tmp_path / "b.tokens", text_frame(2))
    options = ["--seq-len", "64", "--shard-rows", "8", "--seed", "3", "--json"]
    done = l4("pack", a, b, "-o", "s", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    (line,) = done.stdout.decode().splitlines()
    facts = json.loads(line)
    shards = ShardSet.open(tmp_path / "s")
    assert facts["event"] == "done"
    assert facts["shards"] == "s"
    for name in ("num_rows", "num_tokens", "num_documents", "num_media", "seq_len", "fill"):
        assert facts[name] == shards.index[name]
    assert facts["num_shards"] == len(shards.index["shards"]) == -(-shards.num_rows // 8)
    assert shards.geometry == GEOMETRY
    assert shards.index["packing"] == {
        "method": "best-fit",
        "window": 1 << 21,
        "shuffle": True,
        "seed": 3,
    }
    # The same command gives the same bytes; another seed another order of the same tokens.
    l4("pack", a, b, "-o", "again", *options, cwd=tmp_path)
    l4("pack", a, b, "-o", "other", *options[:4], "--seed", "4", cwd=tmp_path)
    assert ShardSet.open(tmp_path / "again").digest == shards.digest
    one, other = tokens_of(tmp_path / "s"), tokens_of(tmp_path / "other")
    assert one.tolist() != other.tolist()
    assert sorted(one.tolist()) == sorted(other.tolist())


def test_quiet_and_joined_streams_on_stdin(tmp_path) -> None:
    a = write_stream(tmp_path / "a.tokens", text_frame(0)).read_bytes()
    b = write_stream(tmp_path / "b.tokens", text_frame(1)).read_bytes()
    done = l4("pack", "-", "-q", "-o", "s", "--seq-len", "1k", cwd=tmp_path, stdin=a + b)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    num_tokens = text_frame(0).num_tokens + text_frame(1).num_tokens
    assert ShardSet.open(tmp_path / "s").num_tokens == num_tokens


def test_concat_without_shuffling_keeps_the_order(tmp_path) -> None:
    frames = text_frame(0), text_frame(1)
    stream = write_stream(tmp_path / "a.tokens", *frames)
    options = ["--concat", "--no-shuffle", "--seq-len", "50"]
    done = l4("pack", stream, "-o", "s", *options, cwd=tmp_path)
    assert done.returncode == 0
    wanted = np.concatenate([frame.tokens for frame in frames])
    np.testing.assert_array_equal(tokens_of(tmp_path / "s"), wanted)
    assert ShardSet.open(tmp_path / "s").index["packing"]["method"] == "concat"


def test_documents_that_do_not_pair_up_are_told(tmp_path) -> None:
    frame = Frame(np.zeros(60 * 100, np.uint32), np.arange(0, 6001, 60))
    stream = write_stream(tmp_path / "a.tokens", frame)
    done = l4("pack", stream, "-q", "-o", "s", "--seq-len", "100", cwd=tmp_path)
    assert done.returncode == 0
    assert b"40% of all positions are padding" in done.stderr
    assert b"--concat" in done.stderr


# Wrong usage and bad input, one by one.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--seq-len", "0"], "--seq-len 0"),
        (["--seq-len", "1"], "--seq-len 1"),
        (["--seq-len", "many"], "--seq-len many"),
        (["--seq-len", "1g"], "--seq-len 1g"),
        (["--seq-len", "64m"], "--seq-len 67108864"),
        (["--window", "512"], "window of 512"),
        (["--window", "-3"], "--window"),
        (["--seed", "-1"], "--seed"),
        (["--shard-rows", "0"], "--shard-rows"),
        (["--shuffle"], "--shuffle"),
        (["-", "-"], "named twice"),
    ],
)
def test_wrong_usage(tmp_path, args, words) -> None:
    lines = lines_of(l4("pack", *args, cwd=tmp_path), code=2)
    assert words in lines[0]
    assert names_in(tmp_path) == []


def test_terminal_as_stdin_is_refused(tmp_path) -> None:
    parent, child = os.openpty()
    done = subprocess.run([*L4, "pack"], stdin=child, capture_output=True, cwd=tmp_path)
    os.close(parent)
    os.close(child)
    assert "no token stream" in lines_of(done, code=2)[0]


def test_missing_folder_empty_and_foreign_files(tmp_path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "empty.tokens").write_bytes(b"")
    (tmp_path / "book.txt").write_text("Once upon a time there was a book.")
    before = names_in(tmp_path)
    for name, why, fix in (
        ("none.tokens", "no such file", "l4 tokenize"),
        ("docs", "a folder", "l4 tokenize docs | l4 pack"),
        ("empty.tokens", "empty", "l4 tokenize"),
        ("book.txt", "byte 0", "l4 tokenize"),
    ):
        lines = lines_of(l4("pack", name, cwd=tmp_path))
        assert f"`{name}`" in lines[0]
        assert why in lines[1]
        assert fix in lines[2]
    assert "empty" in lines_of(l4("pack", cwd=tmp_path))[1]
    assert names_in(tmp_path) == before


def test_streams_that_do_not_agree(tmp_path) -> None:
    a = write_stream(tmp_path / "a.tokens", text_frame(0))
    other_geometry = PictureGeometry(image_size=32, patch_size=8, max_patches=4)
    b = write_stream(tmp_path / "b.tokens", text_frame(0), geometry=other_geometry)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    (tmp_path / "tok").mkdir()
    words = {f"w{i}": i for i in range(300)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(tmp_path / "tok" / "tokenizer.json"))
    c = write_stream(tmp_path / "c.tokens", text_frame(0), tokenizer=str(tmp_path / "tok"))
    before = names_in(tmp_path)
    for other, why in ((b, "32 px"), (c, "tokenizers")):
        lines = lines_of(l4("pack", a, other, cwd=tmp_path))
        assert why in lines[1]
        # As one stream on stdin, and with stdin as one of two, they are refused alike.
        joined = a.read_bytes() + other.read_bytes()
        assert "cannot join" in lines_of(l4("pack", cwd=tmp_path, stdin=joined))[0]
        lines = lines_of(l4("pack", a, "-", cwd=tmp_path, stdin=other.read_bytes()))
        assert "together" in lines[0]
    assert names_in(tmp_path) == before


def test_cut_off_stream_leaves_nothing(tmp_path) -> None:
    data = write_stream(tmp_path / "a.tokens", text_frame(0), text_frame(1)).read_bytes()
    for size in (len(data) // 2, len(data) - 1, 20):
        lines = lines_of(l4("pack", "-o", "s", cwd=tmp_path, stdin=data[:size]))
        assert f"cut off at byte {size}" in lines[1]
    damaged = bytearray(data)
    damaged[-60] ^= 255
    lines_of(l4("pack", "-o", "s", cwd=tmp_path, stdin=bytes(damaged)))
    assert names_in(tmp_path) == ["a.tokens"]


def test_killed_producer_leaves_nothing(tmp_path) -> None:
    """`l4 tokenize` dies in the middle of a pipe."""
    shell = " ".join(L4)
    endless = f"({shell} tokenize - < /dev/zero & pid=$!; sleep 3; kill -9 $pid)"
    done = subprocess.run(
        ["sh", "-c", f"{endless} | {shell} pack -o s"],
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert b"cut off" in done.stderr or b"empty" in done.stderr
    assert names_in(tmp_path) == []


def test_folder_that_holds_something_is_refused_before_reading(tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine").write_text("keep")
    process = subprocess.Popen(
        [*L4, "pack"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.wait(60) == 1  # although nothing was ever sent
    assert process.stdin is not None
    assert process.stderr is not None
    assert b"not empty" in process.stderr.read()
    process.stdin.close()
    process.stderr.close()
    assert (tmp_path / "shards" / "mine").read_text() == "keep"


def test_stream_without_documents(tmp_path) -> None:
    stream = write_stream(tmp_path / "a.tokens")
    assert "no document" in lines_of(l4("pack", stream, cwd=tmp_path))[1]
    assert names_in(tmp_path) == ["a.tokens"]


def test_picture_longer_than_a_row(tmp_path) -> None:
    stream = write_stream(tmp_path / "a.tokens", text_frame(0), picture_frame(1))
    lines = lines_of(l4("pack", stream, "--seq-len", "8", cwd=tmp_path))
    assert "document 2" in lines[0]
    assert "--seq-len" in lines[2]
    assert names_in(tmp_path) == ["a.tokens"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_interrupted_pack_leaves_nothing_that_looks_finished(tmp_path, number, code) -> None:
    process = subprocess.Popen(
        [*L4, "pack", "-o", "s", "--seq-len", "64", "--window", "64", "--shard-rows", "1"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    writer = StreamWriter(process.stdin, load_tokenizer("bytes"), GEOMETRY)  # type: ignore[arg-type]
    for _ in range(3):
        writer.write(text_frame(0))
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".s.partial/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.glob(".s.partial/*"))
    process.send_signal(number)
    assert process.wait(60) == code
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.stdin.close()
    if number != signal.SIGKILL:
        assert names_in(tmp_path) == []
    assert not (tmp_path / "s").exists()
    stream = write_stream(tmp_path / "a.tokens", text_frame(0))
    assert l4("pack", stream, "-o", "s", cwd=tmp_path).returncode == 0
    assert names_in(tmp_path) == ["a.tokens", "s"]


def test_help_names_every_option_and_example(tmp_path) -> None:
    done = l4("pack", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in (b"--seq-len", b"--concat", b"--window", b"--no-shuffle", b"l4 tokenize docs/"):
        assert word in done.stdout
