"""C++ kernels for CPUs live here; none is built yet."""
