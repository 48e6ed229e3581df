"""Triton kernels for CUDA live here; none is built yet."""
