"""`l4 tokenize` through its real entry point: streams, exit codes, bad input, bounded memory."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from l4cli.cli import main
from l4cli.data.stream import StreamReader, read_stream
from l4cli.errors import L4Error

L4 = [sys.executable, "-m", "l4cli"]


def l4(*args: object, stdin: bytes | None = b"", **options) -> subprocess.CompletedProcess[bytes]:
    command = [*L4, "tokenize", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, **options)


def stream(data: bytes) -> tuple[StreamReader, list]:
    reader = read_stream(io.BytesIO(data), "stdout")
    return reader, list(reader)


def refused(result: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The text of an error: three lines, once, and no traceback."""
    text = result.stderr.decode()
    lines = text.splitlines()
    assert result.returncode == code, text
    assert [line.split(":")[0] for line in lines[-3:]] == ["error", "why", "fix"], text
    assert "Traceback" not in text
    return text


def l4_here(capsys, *args: object) -> subprocess.CompletedProcess[bytes]:
    """The same in this process, where a new one would show nothing more."""
    code = main(["tokenize", *map(str, args)])
    said = capsys.readouterr()
    return subprocess.CompletedProcess(args, code, said.out.encode(), said.err.encode())


def picture(path: Path, width: int = 20, height: int = 10) -> Path:
    Image.new("RGB", (width, height), (200, 30, 30)).save(path)
    return path


def test_stdin_to_stdout() -> None:
    result = l4(stdin="one\ntwo é\n".encode())
    assert result.returncode == 0
    reader, (frame,) = stream(result.stdout)
    assert frame.num_documents == 1
    assert bytes(frame.tokens[1:-1].astype("u1")) == "one\ntwo é\n".encode()
    assert reader.totals.tokens == 13
    text = result.stderr.decode()
    assert "documents 1  tokens 13" in text
    assert "MB/s" in text
    assert "tok/s" in text


def test_stdin_formats() -> None:
    assert stream(l4("--format", "lines", stdin=b"a\nb\n").stdout)[0].totals.documents == 2
    rows = b'{"text": "a"}\n{"text": "b"}\n'
    assert stream(l4("--format", "jsonl", stdin=rows).stdout)[0].totals.documents == 2
    assert stream(l4("--text-key", "text", stdin=rows).stdout)[0].totals.documents == 2
    assert stream(l4("-", stdin=rows).stdout)[0].totals.documents == 1


def test_folder_to_file_with_json(tmp_path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("aaa")
    (docs / "b.jsonl").write_text('{"text": "b"}\n{"text": "c", "images": ["p.png"]}\n')
    (docs / "c.bin").write_bytes(b"\0\1")
    picture(docs / "p.png")
    out = tmp_path / "docs.tokens"
    result = l4(docs, "-o", out, "--json", "--preset", "nano")
    assert result.returncode == 0, result.stderr
    (done,) = map(json.loads, result.stdout.splitlines())
    assert done["event"] == "done"
    assert (done["num_documents"], done["num_media"]) == (3, 1)
    assert done["skipped"]["binary files"] == 1
    assert {"num_tokens", "num_bytes", "mb_per_sec", "tok_per_sec", "bad"} <= done.keys()
    with open(out, "rb") as file:
        reader = read_stream(file, "docs.tokens")
        assert sum(frame.num_tokens for frame in reader) == done["num_tokens"]
    assert reader.header.geometry.image_size == 64
    assert os.listdir(tmp_path).count("docs.tokens") == 1
    assert len(os.listdir(tmp_path)) == 2


def test_geometry_of_the_tokenizer_folder(tmp_path) -> None:
    from l4cli.data.geometry import PictureGeometry
    from l4cli.text import load_tokenizer

    load_tokenizer("bytes").save(tmp_path)
    geometry = PictureGeometry(32, 8, 0.5, 4)
    for name, text in geometry.to_processor_files().items():
        (tmp_path / name).write_text(text)
    assert stream(l4("--tokenizer", tmp_path, stdin=b"x").stdout)[0].header.geometry == geometry
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert "preprocessor_config.json" in refused(l4("--tokenizer", tmp_path, stdin=b"x"), 1)


def test_pieces_can_be_joined() -> None:
    data = l4(stdin=b"one").stdout + l4(stdin=b"two").stdout
    assert stream(data)[0].totals.documents == 2


@pytest.mark.parametrize("jobs", [1, 3])
def test_bytes_do_not_depend_on_jobs(tmp_path, jobs) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}\n" * 3000)
    assert l4(tmp_path, "--jobs", jobs).stdout == l4(tmp_path, "--jobs", 2).stdout


# Wrong usage


def test_nothing_to_read_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    try:
        result = subprocess.run([*L4, "tokenize"], stdin=theirs, capture_output=True, timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "nothing to tokenize" in refused(result, 2)


def test_binary_is_not_written_to_a_terminal() -> None:
    ours, theirs = pty.openpty()
    try:
        result = subprocess.run(
            [*L4, "tokenize"], input=b"x", stdout=theirs, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(ours)
        os.close(theirs)
    result.stdout = b""
    assert "terminal" in refused(result, 2)


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--json"], 2, "-o"),
        (["-", "-"], 2, "twice"),
        (["--preset", "nono"], 2, "`nano`"),
        (["--format", "csv"], 2, "csv"),
        (["--format", "lines", "--text-key", "t"], 2, "--text-key"),
        (["--jobs", "0"], 2, "jobs"),
        (["--skip-bda"], 2, "--skip-bad"),
        (["--tokenizer", "nowhere"], 1, "nowhere"),
        (["nowhere.txt"], 1, "nowhere.txt"),
        (["-o", "no/such/folder/x"], 1, "mkdir"),
        (["-o", "."], 1, "folder"),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, capsys, args, code, word) -> None:
    monkeypatch.chdir(tmp_path)
    assert word in refused(l4_here(capsys, *args), code)
    assert os.listdir(tmp_path) == []


def test_existing_file_is_kept(tmp_path) -> None:
    out = tmp_path / "x.tokens"
    out.write_text("precious")
    assert "--force" in refused(l4("-o", out, stdin=b"x"), 1)
    assert out.read_text() == "precious"
    assert l4("-o", out, "--force", stdin=b"x").returncode == 0
    assert stream(out.read_bytes())[0].totals.documents == 1


def test_folder_without_text(tmp_path) -> None:
    picture(tmp_path / "p.png")
    assert "to take them): 1" in refused(l4(tmp_path), 1)


# Bad input


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"txt": "a"}', "--text-key txt"),
        (b'{"text": "\xe9"}', "UTF-8"),
        (b'{"text": "a", "images": ["gone.png"]}', "gone.png"),
        (b'{"text": "a", "images": ["cut.png"]}', "cut off"),
        (b'{"text": "a", "images": ["bomb.jpg"]}', "65535 x 65535"),
        (b'{"text": "<|image|><|image|>", "images": ["good.png"]}', "2 `<|image|>`"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "robot"),
    ],
)
def test_bad_rows_stop_with_file_and_line(tmp_path, capsys, data, reason) -> None:
    good = picture(tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[:-25])
    file = io.BytesIO()
    Image.new("L", (258, 258)).save(file, "JPEG")
    bomb = file.getvalue().replace(b"\1\2\1\2", b"\xff\xff\xff\xff")
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.tokens"
    path.write_bytes(b'{"text": "fine"}\n' + data + b'\n{"text": "fine"}\n')
    text = refused(l4_here(capsys, path, "-o", out), 1)
    assert f"`{path}` line 2" in text
    assert reason in text
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    result = l4_here(capsys, path, "-o", out, "--skip-bad", "--json")
    done = json.loads(result.stdout)
    assert done["num_documents"] == 2
    assert sum(done["bad"].values()) == 1
    assert f"`{path}` line 2" in result.stderr.decode()


def test_stream_of_a_failed_run_reads_as_cut_off(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "%b"}\n' % (b"fine " * 10_000) * 50 + b"{")
    result = l4(path)
    assert "line 51" in refused(result, 1)
    with pytest.raises(L4Error, match="cut off at byte"):
        stream(result.stdout)


def test_closed_pipe_is_silent() -> None:
    command = [*L4, "tokenize", "-q"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # nothing of ours is left to flush into a pipe that is gone
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        threading.Thread(target=feed, args=(run.stdin, 40), daemon=True).start()
        assert run.wait(timeout=60) == 141
        assert run.stderr.read() == b""


def test_interrupted_run_leaves_nothing(tmp_path) -> None:
    out = tmp_path / "out.tokens"
    command = [*L4, "tokenize", "-q", "-o", str(out)]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
            assert run.stdin is not None
            run.stdin.write(b"some text\n" * 800_000)  # some frames; it waits for more
            wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob(".*.partial")))
            time.sleep(0.3)
            run.send_signal(number)
            assert run.wait(timeout=60) == code
            assert os.listdir(tmp_path) == []


def test_full_disk_is_an_error() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    assert "space" in refused(l4("-o", "/dev/full", stdin=b"x" * 100_000), 1)


# Endless input


def feed(pipe, megabytes: int) -> None:
    block = b"A line of words, to be read again and again.\n" * 23_302  # 1 MiB
    try:
        for _ in range(megabytes):
            pipe.write(block)
        pipe.close()
    except BrokenPipeError:
        pass


def wait_for(condition, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def peak_memory_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    raise AssertionError("no VmHWM")


def test_memory_does_not_grow_with_the_input() -> None:
    """Feed a pipe: the peak after 200 MB is that of the first 50 MB, and no frame is large."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc here")
    with subprocess.Popen(
        [*L4, "tokenize", "-q", "--jobs", "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as run:
        threading.Thread(target=feed, args=(run.stdin, 200), daemon=True).start()
        peaks = []
        for frame in read_stream(run.stdout, "stdout"):
            assert frame.num_tokens <= 1 << 20
            peaks.append(peak_memory_mib(run.pid))
        assert run.wait(timeout=60) == 0
    assert len(peaks) >= 200
    assert peaks[-1] < 400
    assert peaks[-1] - peaks[50] < 60
