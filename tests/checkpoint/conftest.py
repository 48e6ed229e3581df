"""Checkpoints that transformers wrote, once for all tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))  # for `oracle`


@pytest.fixture(scope="session")
def hf_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only checkpoint in one file, dense and sparse layers mixed; treat as read-only."""
    import oracle

    folder = tmp_path_factory.mktemp("hf") / "text"
    oracle.text_oracle(interleave_moe_layer_step=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint in several shards; treat as read-only."""
    import oracle

    folder = tmp_path_factory.mktemp("hf") / "pictures"
    oracle.picture_oracle().save_pretrained(folder, max_shard_size="1MB")
    return folder
