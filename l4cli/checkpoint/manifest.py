"""The SHA-256 of every file of a folder, and what differs from it later.

in: a folder; out: `l4/manifest.json`, or a list of problems
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4cli.checkpoint.atomic import write_text
from l4cli.errors import L4Error

MANIFEST = "l4/manifest.json"
KERNELS = "l4/kernels.safetensors"  # made from the weights at any time, where no reader looks


@dataclass(frozen=True)
class Problem:
    """One file that is not what was recorded."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"`{self.name}`: {self.why}"


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Record every file below a folder; `known` holds hashes taken while writing."""
    known = known or {}
    files = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": known.get(name) or hash_file(folder / name),
        }
        for name in _names(folder)
    }
    (folder / MANIFEST).parent.mkdir(exist_ok=True)
    fields = {"format": "l4-manifest", "version": 1, "files": files}
    write_text(folder / MANIFEST, json.dumps(fields, indent=1) + "\n")


def recorded_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 as recorded; empty without a manifest."""
    if not (folder / MANIFEST).exists():
        return {}
    return {name: entry["sha256"] for name, entry in _read(folder).items()}


def verify_manifest(folder: Path, under: str = "") -> list[Problem]:
    """Hash every recorded file again (below `under` only) and list what differs.

    raises: L4Error when there is no readable manifest
    """
    files = _read(folder)
    problems = []
    for name, entry in sorted(files.items()):
        why = _difference(folder / name, entry) if name.startswith(under) else None
        if why is not None:
            problems.append(Problem(name, why))
    # Readers take every safetensors file they find, so an extra one is no harmless note.
    for name in _names(folder):
        if name in files or name == KERNELS:
            continue
        if name.endswith(".safetensors") and name.startswith(under):
            problems.append(Problem(name, "was not there when the folder was written"))
    return problems


def _difference(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes, {entry['size']} were recorded"
        if hash_file(path) != entry["sha256"]:
            return "has the right size, and other content than was recorded"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {(error.strerror or str(error)).lower()}"
    return None


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    what = f"cannot verify `{folder}`"
    try:
        fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = fields["files"]
        if not all({"size", "sha256"} <= entry.keys() for entry in files.values()):
            raise KeyError("size")
    except FileNotFoundError as error:
        why = f"it has no `{MANIFEST}`: nobody recorded what its files should be"
        raise L4Error(what, why=why, fix="use another checkpoint, or restore the file") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"`{MANIFEST}` is damaged: {error}"
        raise L4Error(what, why=why, fix="use another checkpoint") from error
    return files


def _names(folder: Path) -> Iterator[str]:
    """Files below a folder as relative names, the manifest and hidden leftovers apart."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not path.name.startswith("."):
            yield name
