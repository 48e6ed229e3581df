"""The bare install, as a wheel outside the checkout, without compiler and extras, does the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Runs one `l4` command line while every module outside the base dependencies is missing.
BARE = """
import importlib.abc, importlib.metadata as md, re, sys

def closure(name, seen):
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        return
    try:
        requires = md.distribution(name).requires or []
    except md.PackageNotFoundError:
        return
    seen.add(key)
    for line in requires:
        spec, _, marker = line.partition(";")
        if "extra" not in marker:
            closure(re.match(r"[A-Za-z0-9_.-]+", spec.strip()).group(), seen)

allowed = {"l4", "pip", "setuptools"}
for name in "typer rich torch safetensors numpy tokenizers pillow av".split():
    closure(name, allowed)
blocked = {
    module
    for module, names in md.packages_distributions().items()
    if not any(re.sub(r"[-_.]+", "-", name).lower() in allowed for name in names)
}
assert not {"torch", "numpy", "PIL"} & blocked

class Without(importlib.abc.MetaPathFinder):
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in blocked:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import l4cli
assert l4cli.__file__.startswith(sys.argv[1]), l4cli.__file__
from l4cli.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a compiler and unpacked outside the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    call = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    env = {**os.environ, "CC": "/nonexistent", "CXX": "/nonexistent"}
    subprocess.run(call, check=True, env=env, cwd=folder)
    (wheel,) = folder.glob("l4-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_what_runs_and_nothing_else(site: Path) -> None:
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert "l4cli/model/presets/nano.toml" in names
    assert "src_kernels/cpu/__init__.py" in names
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"l4cli", "src_kernels"}


def test_the_bare_install_runs_the_main_job(site: Path, tmp_path: Path) -> None:
    from PIL import Image

    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(8):
        (docs / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    chat = [
        {"role": "user", "content": "<|image|>What colour?"},
        {"role": "assistant", "content": "red"},
    ]
    row = json.dumps({"messages": chat, "images": ["red.png"]})
    (tmp_path / "chats.jsonl").write_text(f"{row}\n" * 8)

    def l4(*args: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"}
        call = [sys.executable, "-c", BARE, str(site), *args]
        done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    l4("train-tokenizer", "docs", "--vocab-size", "320", "-o", "tok")
    l4("tokenize", "docs", "--tokenizer", "tok", "-o", "text.tokens", "--preset", "nano")
    l4("tokenize", "chats.jsonl", "--tokenizer", "tok", "-o", "chat.tokens", "--preset", "nano")
    l4("pack", "text.tokens", "chat.tokens", "--seq-len", "128", "-o", "shards")
    l4("pretrain", "shards", "--preset", "nano", "--steps", "2", "--batch-size", "2", "-o", "run")
    answer = l4("chat", "run", "What colour?", "--image", "red.png", "--max-new-tokens", "2")
    assert answer is not None
    found = json.loads(l4("info", "run/latest", "--json").splitlines()[0])
    assert found["num_parameters"] > 1_000_000
    assert "`tiktoken` is not installed" in l4("info", "tok")
