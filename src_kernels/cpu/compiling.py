"""Compile the CPU kernels by hand: beside their sources, or into the user's cache when asked.

in: the `.cpp` of this folder, a C++17 compiler (`$CXX`, else g++, c++ or clang++); out: a `.so`
run: python -m src_kernels.cpu
An installation has the library already, unless it had no compiler.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "_kernels.so"
# No -march: the hot functions say themselves what they need, and are chosen at run time.
# Without errno and traps, roundings become instructions; sums keep their order (no -ffast-math).
FLAGS: tuple[str, ...] = (
    *("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
CANDIDATES = ("g++", "c++", "clang++")


def compiler() -> str | None:
    """The C++ compiler that would be used, None without one."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else CANDIDATES:
        found = shutil.which(name)
        if found:
            return found
    return None


def sources() -> list[Path]:
    """What the library is made of."""
    return sorted(HERE.glob("*.cpp"))


def fingerprint() -> str:
    """Of all sources, headers and flags: names the library in the cache."""
    digest = hashlib.sha256(" ".join((*FLAGS, platform.machine())).encode())
    for path in [*sources(), *sorted(HERE.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(target: Path) -> str | None:
    """Write the library, replacing it at once when it is whole. out: None, or why it failed"""
    found = compiler()
    if found is None:
        return "no C++ compiler found"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compiling-") as folder:
        parts = [(path, Path(folder, path.stem + ".o")) for path in sources()]
        whole = Path(folder, target.name)
        calls = [[found, *FLAGS, "-c", str(path), "-o", str(part)] for path, part in parts]
        calls.append(
            [found, "-shared", "-fopenmp", *(str(part) for _, part in parts), "-o", str(whole)]
        )
        for call in calls:
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                return f"`{found}` failed: {(done.stderr.strip() or '?').splitlines()[-1]}"
        whole.replace(target)
    return None


def cached_library() -> Path:
    """Where a library made on demand lies; of other sources it has another name."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "l4", f"kernels-{fingerprint()}.so")


def compile_in_cache() -> Path | str:
    """The library in the cache, made now if need be, once among processes. out: it, or why not"""
    target = cached_library()
    if target.exists():
        return target
    if compiler() is None:
        return "no C++ compiler found"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, also by a killed process
            failure = None if target.exists() else compile_library(target)
    except OSError as error:
        failure = str(error)
    return failure or target
