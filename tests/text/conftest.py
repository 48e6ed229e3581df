"""Llama 4's own vocabulary, where the fixtures are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from l4cli.text import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def meta_file() -> Path:
    default = Path(__file__).parents[2].parent / "shared" / "fixtures"
    path = Path(os.environ.get("L4_FIXTURES", default)) / "llama4-tokenizer" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("the fixture `llama4-tokenizer/tokenizer.model` is not here")
    return path


@pytest.fixture(scope="session")
def real(meta_file: Path) -> Tokenizer:
    """The published vocabulary through the base install's library."""
    return load_tokenizer(meta_file, backend="tokenizers")


@pytest.fixture(scope="session")
def real_fast(meta_file: Path) -> Tokenizer:
    """The published vocabulary through the extra `[fast]`."""
    pytest.importorskip("tiktoken")
    return load_tokenizer(meta_file, backend="tiktoken")


@pytest.fixture(scope="session")
def oracle(meta_file: Path):
    """tiktoken itself, built from the file without any of our code."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    marks = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    pattern = "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?[{marks[0]}]*[{marks[1]}]+{contraction}",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{marks[0]}]+[{marks[1]}]*{contraction}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
    ranks = load_tiktoken_bpe(str(meta_file))
    return tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
