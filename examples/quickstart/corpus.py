"""Collect real text that every machine with Python has: its standard library and help topics.

in: a folder; out: FOLDER/train/ and FOLDER/held-out/, one file a document

Files are chosen by name alone, so that the same Python gives the same corpus. About one in forty
is held out, whole.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from pathlib import Path

# Generated tables and tests of tests; what is left is prose and code that people wrote.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "__pycache__"}
LEFT_OUT |= {"ensurepip", "turtledemo", "config-3", "pydoc_data"}
MAX_BYTES = 300_000  # a file
HELD_OUT_SHARE = 40


def documents() -> list[tuple[str, str]]:
    """Names and texts: sources of the standard library, then one document a help topic."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT.intersection(parts) or path.stat().st_size > MAX_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files test other encodings
        if text.strip():
            found.append(("-".join(parts), text))
    return found + _topics()


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems ship Python without them
        return []
    return [(f"topic-{name.replace('/', '-')}.txt", text) for name, text in sorted(topics.items())]


def is_held_out(name: str) -> bool:
    """Whether a document is kept for measuring."""
    return hashlib.sha256(name.encode()).digest()[0] * HELD_OUT_SHARE < 256


def main() -> None:
    """Write both halves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder")
    folder = parser.parse_args().folder
    sizes = {"train": 0, "held-out": 0}
    for half in sizes:
        (folder / half).mkdir(parents=True)
    for name, text in documents():
        half = "held-out" if is_held_out(name) else "train"
        (folder / half / name).write_text(text, encoding="utf-8")
        sizes[half] += len(text.encode())
    for half, size in sizes.items():
        print(f"{size / 1e6:.2f} MB into {folder / half}")


if __name__ == "__main__":
    main()
