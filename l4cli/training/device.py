"""Where a run computes, with how many threads, and that it computes the same every time.

in: the word after `--device`; out: a torch device, process-wide settings made once by a command
"""

from __future__ import annotations

import os

import torch

from l4cli.errors import UsageError


def torch_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. raises: UsageError without a usable GPU"""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        built = "this torch was built without CUDA" if torch.version.cuda is None else "none found"
        raise UsageError("cannot use `--device cuda`", why=built, fix="`--device cpu`")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def make_repeatable(seed: int, device: torch.device) -> None:
    """Seed torch, choose algorithms whose result does not vary, take the threads there are."""
    torch.manual_seed(seed)
    if device.type == "cuda":
        # On a CPU all we use is repeatable as it is, and the call costs 0.6 s of imports.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        # The check would fill every new buffer with NaN; ours are written before they are read.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(num_threads())


def num_threads() -> int:
    """Count the threads to compute with: torch sees the machine's cores, `taskset` leaves fewer."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1 << 30
    return min(torch.get_num_threads(), usable)
