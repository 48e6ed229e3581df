"""Write English prose that every machine with Python has: its help topics.

in: a folder; out: FOLDER/train/ and FOLDER/held-out/, one file a topic

One topic in five is held out, chosen by its name alone: nothing a model was trained on is in the
haystacks it is tested with.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
from pathlib import Path

HELD_OUT_SHARE = 5


def topics() -> dict[str, str]:
    """Texts by name."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:  # some systems ship Python without them: then the modules' own words
        import argparse as a
        import asyncio as b
        import decimal as c
        import logging as d
        import statistics as e
        import typing as f

        modules = (a, b, c, d, e, f)
        names = [(m, n) for m in modules for n in sorted(vars(m))]
        texts = {f"{m.__name__}.{n}": inspect.getdoc(getattr(m, n)) or "" for m, n in names}
        return {name: text for name, text in texts.items() if len(text) > 200}
    return dict(found)


def main() -> None:
    """Write both halves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder")
    folder = parser.parse_args().folder
    sizes = {"train": 0, "held-out": 0}
    for half in sizes:
        (folder / half).mkdir(parents=True)
    for name, text in sorted(topics().items()):
        is_held_out = hashlib.sha256(name.encode()).digest()[0] * HELD_OUT_SHARE < 256
        half = "held-out" if is_held_out else "train"
        path = folder / half / f"{name.replace('/', '-')}.txt"
        path.write_text(text, encoding="utf-8")
        sizes[half] += len(text.encode())
    for half, size in sizes.items():
        print(f"{size / 1e6:.2f} MB into {folder / half}")


if __name__ == "__main__":
    main()
