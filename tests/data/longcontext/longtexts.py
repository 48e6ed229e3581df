"""Tokenizers and haystacks for tests of long texts, and checks every sample must pass."""

from __future__ import annotations

from functools import cache

import numpy as np

from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.sample import Sample
from l4cli.text import Tokenizer, load_tokenizer
from l4cli.text.loading import ranked_tokenizer
from l4cli.text.training import train_vocabulary

NAMES = ("bytes", "bpe")


@cache
def tokenizer_of(name: str) -> Tokenizer:
    """`bytes`, or a small vocabulary learned from generated filler."""
    if name == "bytes":
        return load_tokenizer("bytes")
    text = Haystack.generated(7).take(60_000, load_tokenizer("bytes"), np.random.default_rng(7))
    return ranked_tokenizer(train_vocabulary([text], 700), name="small")


def num_tokens(sample: Sample, tokenizer: Tokenizer) -> int:
    """Text and longest question, counted piece by piece and by hand."""
    text = sum(len(tokenizer.encode(piece)) for piece in sample.pieces)
    return text + max(
        len(tokenizer.encode(question.prompt)) + len(tokenizer.encode(question.target))
        for question in sample.questions
    )


def seeded(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
