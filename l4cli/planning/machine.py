"""What this machine has: memory that can be taken, how fast it is read, its rate of products.

in: a device; out: bytes, bytes per second, operations per second
source: /proc/meminfo, cgroup v2 and v1 files; torch.cuda.mem_get_info; a timed product
"""

from __future__ import annotations

import mmap
import os
import time
from functools import cache
from pathlib import Path

import torch

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
_MEASURE_S = 0.3
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be allocated now: of the machine, its container, and this process."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return cpu_memory(Path("/"))


def cpu_memory(root: Path) -> int:
    """The least of what the kernel, the control groups and the process limit leave."""
    amounts = [_of_kernel(root), *_of_groups(root), *_of_process()]
    return max(0, min(amount for amount in amounts if amount is not None))


def _of_kernel(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> list[int]:
    """What each control group this process is in leaves, from the innermost to the root."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, cached = "memory.usage_in_bytes", "total_"
        else:
            continue
        inner = (top / path.strip().lstrip("/")).resolve()
        # A container sees its own group as the top, whatever the path says.
        folders = [f for f in (inner, *inner.parents) if f.is_relative_to(top.resolve())] or [top]
        found += [_of_group(f, limit, used, cached + "inactive_file") for f in folders]
    return [amount for amount in found if amount is not None]


def _of_group(folder: Path, limit: str, used: str, cached: str) -> int | None:
    limits, usage = _lines(folder / limit), _lines(folder / used)
    if not limits or not usage or not limits[0].strip().isdigit():
        return None  # `max`: no limit here
    if int(limits[0]) >= _UNLIMITED:
        return None
    reclaimable = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == cached:
            reclaimable = int(value)
    return int(limits[0]) - int(usage[0]) + reclaimable


def _of_process() -> list[int]:
    try:
        import resource
    except ImportError:  # not a Unix
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _lines(Path("/proc/self/statm"))
    if limit == resource.RLIM_INFINITY or not pages:
        return []
    return [limit - int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE")]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # another kernel, or a container that hides it


@cache
def gemm_rate(dtype: str, device: str = "cpu") -> float:
    """Operations per second of a large matrix product here: what MFU is a fraction of.

    Takes about 0.3 s once per process. Training in fp8 is a fraction of bf16's rate: experts alone
    compute in fp8, and only forward and towards their inputs.
    """
    return measure_gemm_rate("bf16" if dtype == "fp8" else dtype, device)


def measure_gemm_rate(dtype: str, device: str = "cpu") -> float:
    """The same measured now; the best repetition counts, as it is a ceiling."""
    is_cuda = torch.device(device).type == "cuda"
    size = 8192 if is_cuda else 1024
    kind = _DTYPES[dtype]
    a, b = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))
    out = torch.empty(size, size, dtype=torch.int32 if dtype == "int8" else kind, device=device)
    product = torch._int_mm if dtype == "int8" else torch.mm
    best_s = float("inf")
    with torch.no_grad():
        product(a, b, out=out)  # the first call builds the kernel
        end = time.perf_counter() + _MEASURE_S
        repetitions = 0
        while repetitions < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            product(a, b, out=out)
            if is_cuda:
                torch.cuda.synchronize()
            best_s = min(best_s, time.perf_counter() - start)
            repetitions += 1
    return 2 * size**3 / best_s


class BandwidthProbe:
    """A block of memory that is read again and again: how fast weights could be read here.

    On a CPU by torch's maximum, which only reads, from huge pages where there are any, as the
    weights lie; the block is larger than the caches. `measure` takes about 0.1 s.
    """

    def __init__(self, device: str = "cpu", size_bytes: int = 1 << 28) -> None:
        if torch.device(device).type == "cpu":
            memory = mmap.mmap(-1, size_bytes)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.block = torch.frombuffer(memory, dtype=torch.int64).fill_(7)
        else:
            self.block = torch.full((size_bytes // 8,), 7, dtype=torch.int64, device=device)

    def measure(self, num_threads: int) -> float:
        """Bytes per second of the best of three readings."""
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        best_s = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            self.block.max()
            if self.block.is_cuda:
                torch.cuda.synchronize()
            best_s = min(best_s, time.perf_counter() - start)
        torch.set_num_threads(before)
        return self.block.numel() * 8 / best_s
