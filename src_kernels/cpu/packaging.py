"""How setuptools builds the library into a wheel or an editable install; imported by it alone.

in: `ext-modules` and `cmdclass` of pyproject.toml; out: `_kernels.so` beside the sources' copies
The library is plain C, the same for every Python: its name and the wheel's tag say so. It is
optional: without a compiler the installation succeeds and the package works through torch.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


class BuildKernels(build_ext):
    """All `.cpp` of the folder in one library without Python's suffix."""

    def finalize_options(self) -> None:
        """Find the sources, as paths from the project's root."""
        super().finalize_options()
        names = sorted(path.name for path in HERE.glob("*.cpp"))
        for extension in self.extensions:
            extension.sources = [f"src_kernels/cpu/{name}" for name in names]
            extension.depends = [f"src_kernels/cpu/{path.name}" for path in HERE.glob("*.h")]

    def get_ext_filename(self, fullname: str) -> str:
        """Without the interpreter's version: ctypes loads it in any."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: object) -> list[str]:
        """It is no module: there is no `PyInit_`."""
        return []


class TagWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none and the platform; any platform when no library was built."""
        is_built = any(Path(self.bdist_dir).rglob("_kernels.so"))
        return "py3", "none", super().get_tag()[2] if is_built else "any"
