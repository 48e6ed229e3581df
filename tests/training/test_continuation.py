"""What tells one checkpoint from another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from l4cli.training.continuation import fingerprint


def checkpoint(folder: Path, weights: np.ndarray) -> Path:
    """A foreign one: a config and weights, no manifest."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": weights}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("size", [10, 1_000, 1_000_000])
def test_equal_shapes_of_other_weights_are_others(size: int, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal(size, np.float32)
    first = fingerprint(checkpoint(tmp_path / "a", weights))
    assert fingerprint(checkpoint(tmp_path / "b", weights)) == first
    assert fingerprint(checkpoint(tmp_path / "c", weights * 1.01)) != first
