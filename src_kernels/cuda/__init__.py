"""Triton kernels for CUDA. Importing this package imports neither torch nor Triton."""
