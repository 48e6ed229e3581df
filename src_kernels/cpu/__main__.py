"""Compile the kernels beside their sources: for a checkout that is run without being installed.

run: python -m src_kernels.cpu
"""

from src_kernels.cpu.compiling import LIBRARY, compile_library

if __name__ == "__main__":
    failure = compile_library(LIBRARY)
    if failure:
        raise SystemExit(f"error: {failure}")
    print(LIBRARY)
