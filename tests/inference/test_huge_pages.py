"""Huge pages that take a mapping's place: the same bytes, the same addresses, its own memory."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np
import pytest

from l4cli.inference import huge_pages
from l4cli.inference.huge_pages import HUGE, PIECE, take_over

SIZE = PIECE + 3 * HUGE + 12345


@pytest.fixture
def mapped(tmp_path):
    """A file's path, what it holds, and the same mapped."""
    if huge_pages._libc() is None or not huge_pages._has_huge_pages():
        pytest.skip("this system has no huge pages, or no mremap")
    path = tmp_path / "weights"
    expected = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    expected.tofile(path)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return path, expected, np.frombuffer(memory, dtype=np.uint8)


def of_file(address: int, size: int, path: Path) -> int:
    """How many bytes of a range are still the file's."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            total += max(0, min(end, address + size) - max(start, address))
    return total


def test_the_bytes_stay_and_the_file_goes(mapped):
    path, expected, found = mapped
    address = found.ctypes.data
    taken = take_over(address, SIZE)
    assert SIZE - 2 * HUGE < taken < SIZE
    assert of_file(address, SIZE, path) == SIZE - taken
    assert found.ctypes.data == address
    assert np.array_equal(found, expected)
    path.write_bytes(b"\0" * SIZE)  # in place: only what is still mapped changes
    assert np.count_nonzero(found != expected) <= SIZE - taken


def test_others_read_meanwhile(mapped):
    _, expected, found = mapped
    wanted, sums, is_done = int(expected.sum(dtype=np.int64)), [], threading.Event()

    def read():
        while not is_done.is_set() or not sums:
            sums.append(int(found.sum(dtype=np.int64)))

    reader = threading.Thread(target=read)
    reader.start()
    taken = take_over(found.ctypes.data, SIZE)
    is_done.set()
    reader.join()
    assert taken
    assert set(sums) == {wanted}


def test_what_is_too_small_stays(mapped):
    _, _, found = mapped
    assert take_over(found.ctypes.data, HUGE - 1) == 0
