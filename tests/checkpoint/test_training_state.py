"""Training state comes back bit for bit, or not at all."""

from __future__ import annotations

import math
import os
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from l4cli.checkpoint import (
    RunFolder,
    load_training_state,
    read_state_json,
    save_training_state,
    write_manifest,
)
from l4cli.errors import L4Error

WORLD_TOO_LARGE = 2**80 + 1


def example() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {
        "step": 500,
        "options": {"lr": 3e-4, "preset": "nano", "resume": None, "flags": [True, False]},
        "rng": {"torch": generator.get_state(), "python": random.Random(5).getstate()},
        "numbers": {"huge": WORLD_TOO_LARGE, "inf": math.inf, "low": -math.inf, "third": 1 / 3},
        "optimizer": {
            "state": {
                0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(3, 5, generator=generator)},
                1: {"step": torch.tensor(2**60), "half": torch.randn(9).bfloat16()},
            },
            "param_groups": [{"betas": (0.9, 0.95), "params": [0, 1]}],
        },
        "odd": odd,
        "empty": {"tensor": torch.zeros(0, 4), "dict": {}, "list": [], "tuple": ()},
        "bytes": torch.arange(256, dtype=torch.uint8),
        "$dollar": "a key that looks like ours",
        "transposed": torch.arange(6).view(2, 3).T,
        "slice": torch.arange(100)[10:20],
        "twice": [odd, odd],
        "needs grad": torch.nn.Parameter(torch.ones(2)).data,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if not (isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape):
            return False
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(*raw)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    state = example()
    save_training_state(tmp_path, state)
    write_manifest(tmp_path)
    assert same(load_training_state(tmp_path), state)


def test_files_are_safetensors_and_json_only(tmp_path: Path) -> None:
    save_training_state(tmp_path, example())
    files = [path for path in (tmp_path / "l4").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_state_json_is_readable_without_tensors(tmp_path: Path) -> None:
    save_training_state(tmp_path, {"options": {"lr": 0.1}, "weights": torch.zeros(2)})
    state = read_state_json(tmp_path)
    assert state == {"options": {"lr": 0.1}, "weights": {"$tensor": "weights"}}


def test_state_without_tensors(tmp_path: Path) -> None:
    save_training_state(tmp_path, {"step": 1})
    assert load_training_state(tmp_path, verify=False) == {"step": 1}


def test_given_tensors_are_filled_in_place(tmp_path: Path) -> None:
    save_training_state(tmp_path, {"a": {"b": torch.arange(4.0)}, "c": torch.ones(2)})
    mine = torch.zeros(4)
    state = load_training_state(tmp_path, {"a.b": mine}, verify=False)
    assert state["a"]["b"] is mine
    assert torch.equal(mine, torch.arange(4.0))


def test_many_files_when_there_is_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4cli.checkpoint.training_state._FILE_BYTES", 1000)
    state = {str(i): torch.full((100,), float(i)) for i in range(12)}
    save_training_state(tmp_path, state)
    assert len(list((tmp_path / "l4/tensors").glob("*.safetensors"))) == 6
    assert same(load_training_state(tmp_path, verify=False), state)


def test_optimizer_and_random_state_go_on_as_if_nothing_happened(tmp_path: Path) -> None:
    def train(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    straight = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(straight.parameters(), fused=True)
    train(straight, optimizer, 3)
    tree = {
        "model": straight.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    save_training_state(tmp_path, tree)
    train(straight, optimizer, 3)

    torch.manual_seed(99)
    resumed = torch.nn.Linear(8, 8)
    second = torch.optim.AdamW(resumed.parameters(), fused=True)
    tree = load_training_state(tmp_path, verify=False)
    resumed.load_state_dict(tree["model"])
    second.load_state_dict(tree["optimizer"])
    torch.set_rng_state(tree["rng"])
    train(resumed, second, 3)
    assert same(resumed.state_dict()["weight"], straight.state_dict()["weight"])


def test_torn_files_are_found(tmp_path: Path) -> None:
    save_training_state(tmp_path, example())
    write_manifest(tmp_path)
    tensors = next((tmp_path / "l4/tensors").glob("*.safetensors"))
    whole = tensors.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content in (whole[:-5], b"", bytes(flipped)):
        tensors.write_bytes(content)
        with pytest.raises(L4Error) as caught:
            load_training_state(tmp_path)
        assert tensors.name in caught.value.why
        assert "remove" in caught.value.fix
    tensors.unlink()
    with pytest.raises(L4Error, match="is missing"):
        load_training_state(tmp_path)


def test_torn_files_without_hashing(tmp_path: Path) -> None:
    save_training_state(tmp_path, example())
    tensors = next((tmp_path / "l4/tensors").glob("*.safetensors"))
    os.truncate(tensors, tensors.stat().st_size // 2)
    with pytest.raises(L4Error, match="cannot be read"):
        load_training_state(tmp_path, verify=False)
    tensors.unlink()
    with pytest.raises(L4Error):
        load_training_state(tmp_path, verify=False)


def test_ctrl_c_while_saving_stays_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch wraps whatever happens inside a save, even this."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_training_state(tmp_path, {"a": torch.zeros(2)})


def test_bad_state_json(tmp_path: Path) -> None:
    with pytest.raises(L4Error, match="weights only"):
        read_state_json(tmp_path)
    save_training_state(tmp_path, {"step": 1})
    path = tmp_path / "l4/state.json"
    good = path.read_text()
    for content in ("", "[]", "{}", good[:-9]):
        path.write_text(content)
        with pytest.raises(L4Error, match="cannot be read"):
            read_state_json(tmp_path)
    path.write_text(good.replace('"version": 1', '"version": 2'))
    with pytest.raises(L4Error, match="version 2"):
        read_state_json(tmp_path)


def test_no_space_for_tensors_keeps_the_previous_step(tmp_path: Path) -> None:
    state = {"weights": torch.randn(50_000)}
    with RunFolder(tmp_path) as run:
        with run.writing(1) as folder:
            save_training_state(folder, state)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(L4Error) as caught, run.writing(2) as folder:
                save_training_state(folder, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "cannot save step 2" in caught.value.what
        assert same(load_training_state(run.latest() or tmp_path), state)
