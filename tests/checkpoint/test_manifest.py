"""Manifests notice every change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from l4cli.checkpoint import verify_manifest, write_manifest
from l4cli.errors import L4Error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "l4/tensors").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "l4/tensors/model-1.safetensors").write_bytes(b"xyz")
    write_manifest(tmp_path)
    return tmp_path


def test_hashes_are_sha256_of_every_file(folder: Path) -> None:
    files = json.loads((folder / "l4/manifest.json").read_text())["files"]
    assert sorted(files) == ["config.json", "l4/tensors/model-1.safetensors", "model.safetensors"]
    assert files["model.safetensors"] == {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert verify_manifest(folder) == []


def test_what_differs_is_listed(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(b"abcd")
    (folder / "l4/tensors/model-1.safetensors").unlink()
    (folder / "l4/tensors/model-2.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("a reader's own file is no problem")
    problems = {problem.name: problem.why for problem in verify_manifest(folder)}
    assert problems == {
        "config.json": "has the right size, and other content than was recorded",
        "model.safetensors": "has 4 bytes, 3 were recorded",
        "l4/tensors/model-1.safetensors": "is missing",
        "l4/tensors/model-2.safetensors": "was not there when the folder was written",
    }
    below = verify_manifest(folder, under="l4/")
    assert [problem.name for problem in below] == sorted(n for n in problems if n.startswith("l4"))


def test_without_a_readable_manifest(folder: Path) -> None:
    for content in ("", "[]", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 3}}'):
        (folder / "l4/manifest.json").write_text(content)
        with pytest.raises(L4Error, match="damaged"):
            verify_manifest(folder)
    (folder / "l4/manifest.json").unlink()
    with pytest.raises(L4Error, match=r"no `l4/manifest\.json`"):
        verify_manifest(folder)
