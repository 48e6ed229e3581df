"""Fast kernels only (C++ for CPUs, Triton for CUDA); imports nothing of `l4cli`."""
