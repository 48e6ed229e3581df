"""Every operation with more than one version, and the only door to `src_kernels`."""

from l4cli.ops.choice import describe

__all__ = ["describe"]
