"""Reading stdin: the same bytes, and a signal that comes at a bad moment is not lost."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from l4cli.data.standard_input import standard_input


def test_gives_the_bytes_of_a_pipe_a_file_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    code = (
        "import hashlib; from l4cli.data.standard_input import standard_input as s; "
        "f = s(); print(hashlib.sha256(f.read(5) + f.read()).hexdigest())"
    )
    words = [sys.executable, "-c", code]
    piped = subprocess.run(words, input=data, capture_output=True, check=True).stdout
    with open(tmp_path / "file", "rb") as file:
        redirected = subprocess.run(words, stdin=file, capture_output=True, check=True).stdout
    assert piped.strip() == redirected.strip() == hashlib.sha256(data).hexdigest().encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert standard_input().read() == data


def test_a_signal_in_another_thread_ends_the_wait() -> None:
    """The kernel may give the signal to any thread; only the main one may raise from it."""
    code = """
import signal, threading, time
from l4cli.data.standard_input import standard_input

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # of the main thread
is_ready = threading.Event()
def take_it():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    is_ready.set()
    time.sleep(60)
threading.Thread(target=take_it, daemon=True).start()
is_ready.wait()
try:
    print("reading", flush=True)
    standard_input().read()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        guard = threading.Timer(30, process.kill)  # a wait that does not end is a failure
        guard.daemon = True
        guard.start()
        assert process.stdout.readline() == b"reading\n"
        process.send_signal(signal.SIGINT)
        # Stdin stays open meanwhile: its end would end the wait as well.
        assert process.stdout.readline() == b"interrupted\n"
        guard.cancel()
        process.communicate(timeout=30)
