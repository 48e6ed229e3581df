"""Every operation with more than one version, and the only door to `src_kernels`."""
