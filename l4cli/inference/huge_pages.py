"""Bring a mapped file into huge pages where it lies: decoding from those was a tenth faster.

in: the address of a mapping; out: the same bytes at the same addresses, in memory of our own
A piece is copied, and its copy takes the mapping's place in one call: whoever reads meanwhile finds
the same bytes, and never more than a piece is in memory twice.
source: mremap(2), MREMAP_FIXED
"""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_int, c_long, c_size_t, c_void_p
from pathlib import Path

HUGE = 2 << 20
PIECE = 16 * HUGE
_PLACE_THERE = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
_FAILED = c_void_p(-1).value
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def take_over(address: int, size_bytes: int) -> int:
    """Do so for all whole huge pages of a mapping. out: bytes that were; 0 where it cannot be

    The mapping must stay, and nothing may write to it.
    """
    libc = _libc()
    if libc is None or not _has_huge_pages():
        return 0
    first, end = -(-address // HUGE) * HUGE, (address + size_bytes) // HUGE * HUGE
    done = 0
    for start in range(first, end, PIECE):
        length = min(PIECE, end - start)
        if not _replace(libc, start, length):
            break
        done += length
    return done


def _replace(libc: ctypes.CDLL, start: int, length: int) -> bool:
    """Put a copy of a piece in its place."""
    # Room for a start at a huge page's border; what lies beside the copy goes back.
    room = length + HUGE
    own = libc.mmap(
        None,
        room,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        -1,
        0,
    )
    if own == _FAILED:
        return False
    copy = -(-own // HUGE) * HUGE
    libc.madvise(copy, length, mmap.MADV_HUGEPAGE)
    ctypes.memmove(copy, start, length)
    libc.mprotect(copy, length, mmap.PROT_READ)
    if libc.mremap(copy, length, length, _PLACE_THERE, start) == _FAILED:
        libc.munmap(own, room)
        return False
    if copy > own:
        libc.munmap(own, copy - own)
    if copy < own + HUGE:
        libc.munmap(copy + length, own + HUGE - copy)
    return True


def _libc() -> ctypes.CDLL | None:
    """The system's calls; None where they are not Linux's."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.mremap.argtypes = [c_void_p, c_size_t, c_size_t, c_int, c_void_p]
        libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
        libc.munmap.argtypes = [c_void_p, c_size_t]
        libc.madvise.argtypes = libc.mprotect.argtypes = [c_void_p, c_size_t, c_int]
    except (OSError, AttributeError):
        return None
    libc.mmap.restype = libc.mremap.restype = c_void_p
    return libc


def _has_huge_pages() -> bool:
    """Without them a mapping is better: several processes share it."""
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False
