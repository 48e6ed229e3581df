"""Haystacks: exact lengths from every source, and what is refused."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data.shard_samples import make_shards
from longtexts import NAMES, seeded, tokenizer_of

from l4cli.data.frame import Frame
from l4cli.data.longcontext.haystack import Haystack
from l4cli.data.longcontext.sources import BORDER, NOISE
from l4cli.errors import L4Error

GREEK = "Ο ουρανός είναι γαλάζιος. Η θάλασσα είναι βαθιά!\nΤο 日本 ψάρι — κολυμπά.\n"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    lines = [f"Line {i} speaks of {i * 7919 % 1000}. It ends here.\n" for i in range(400)]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 64, 1000, 5003])
def test_generated_filler_has_exactly_the_tokens_asked_for(name: str, size: int):
    tokenizer = tokenizer_of(name)
    for seed in range(3):
        text = Haystack.generated().take(size, tokenizer, seeded(seed))
        assert len(tokenizer.encode(text)) == size


@pytest.mark.parametrize("name", NAMES)
def test_any_text_can_be_cut_to_the_token(name: str, tmp_path: Path):
    tokenizer, path = tokenizer_of(name), tmp_path / "greek.txt"
    path.write_text(GREEK * 30)
    for size in range(1, 60):
        text = Haystack.from_files([path]).take(size, tokenizer, seeded(size))
        assert len(tokenizer.encode(text)) == size
        assert "\ufffd" not in text
        assert text.rstrip(" a.x!the\n")[:-1] in GREEK * 30


def test_reading_begins_anywhere_and_goes_once_around(book: Path):
    whole, tokenizer = book.read_text(), tokenizer_of("bytes")
    starts = set()
    for seed in range(20):
        text = Haystack.from_files([book]).take(len(whole) - 1, tokenizer, seeded(seed))
        assert text in whole + whole
        assert text.startswith("Line") or text.startswith("It")
        starts.add(text[:40])
    assert len(starts) > 15


def test_files_of_a_folder_follow_each_other_without_running_together(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first ends")
    (tmp_path / "b.txt").write_text("second ends\r\nfor good")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    wanted = "first ends\nsecond ends\nfor good\n"
    haystack = Haystack.from_files([tmp_path])
    text = haystack.take(len(wanted), tokenizer_of("bytes"), seeded(3))
    assert text in wanted + wanted
    with pytest.raises(L4Error, match="32 tokens, and 33 are needed"):
        haystack.take(33, tokenizer_of("bytes"), seeded(3))


@pytest.mark.parametrize("name", NAMES)
def test_a_short_source_is_refused_with_both_numbers_unless_it_may_repeat(name: str, book: Path):
    tokenizer = tokenizer_of(name)
    size = 50_000
    with pytest.raises(L4Error) as caught:
        Haystack.from_files([book]).take(size, tokenizer, seeded(0))
    held = int(caught.value.why.split()[2])
    assert abs(held - len(tokenizer.encode(book.read_text()))) <= 4
    assert str(size) in caught.value.why
    assert "--haystack" in caught.value.fix
    text = Haystack.from_files([book], repeat=True).take(size, tokenizer, seeded(0))
    assert len(tokenizer.encode(text)) == size


def test_a_source_of_blanks_is_refused_even_if_it_may_repeat(tmp_path: Path):
    (tmp_path / "blank.txt").write_text(" \n" * 100)
    haystack = Haystack.from_files([tmp_path / "blank.txt"], repeat=True)
    with pytest.raises(L4Error, match="0 tokens"):
        haystack.take(5, tokenizer_of("bytes"), seeded(0))


def test_what_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad.txt").write_bytes(b"good so far \xff\xfe and on")
    (tmp_path / "packed.gz").write_bytes(b"\x1f\x8b\0\0")
    (tmp_path / "empty.txt").write_text("")
    tokenizer = tokenizer_of("bytes")
    for name, why in (
        ("rows.jsonl", "not plain text"),
        ("packed.gz", "gzip"),
        ("empty.txt", "no text"),
    ):
        with pytest.raises(L4Error) as caught:
            Haystack.from_files([tmp_path / name])
        assert why in caught.value.why
    with pytest.raises(L4Error, match="0xFF"):
        Haystack.from_files([tmp_path / "bad.txt"]).take(20, tokenizer, seeded(0))
    with pytest.raises(L4Error, match="no such file"):
        Haystack.from_files([tmp_path / "absent.txt"])


def test_a_huge_file_is_read_only_as_far_as_needed(tmp_path: Path):
    path = tmp_path / "huge.txt"
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(b"All work and no play makes a dull day. " * 26_000)
    tokenizer, haystack = tokenizer_of("bytes"), Haystack.from_files([path])
    tracemalloc.start()
    try:
        for seed in range(3):
            assert len(haystack.take(100_000, tokenizer, seeded(seed))) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_units_end_with_sentences(book: Path):
    tokenizer = tokenizer_of("bytes")
    filler = Haystack.from_files([book]).filler(10_000, tokenizer, seeded(1))
    for size in (500, 333, 41, 2000):
        text, count = filler.take_units(size)
        assert count == len(text) <= size < count + 60
        assert text.endswith((".", "\n"))
    assert filler.take_units(5)[0] in ("Line", "It", " It", "It en", " It e", "\n")


def test_shards_are_a_haystack_of_their_own_tokenizer(tmp_path: Path):
    tokenizer = tokenizer_of("bytes")
    texts = [f"Document {i} has a number, {i * 31 % 97}." for i in range(40)]
    parts = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    make_shards(
        tmp_path / "s", Frame(np.concatenate(parts).astype(np.uint32), offsets), seq_len=128
    )
    haystack = Haystack.from_files([tmp_path / "s"])
    text = haystack.take(400, tokenizer_of("bpe"), seeded(2))
    assert len(tokenizer_of("bpe").encode(text)) == 400
    found = [line for line in text.split("\n")[1:-1] if line in texts]
    assert len(found) > 10
    assert "<|" not in text


def test_the_grammar_repeats_no_paragraph_and_needs_no_seed_twice():
    tokenizer = tokenizer_of("bytes")
    text = Haystack.generated().take(400_000, tokenizer, seeded(0))
    assert text.isascii()
    sentences = [part for part in BORDER.split(text) if part]
    pairs = list(itertools.pairwise(sentences))
    assert len(set(pairs)) == len(pairs)
    words = set(text.lower().replace(".", " ").split())
    assert len(words) > 600
    assert Haystack.generated().take(90, tokenizer, seeded(0)) == text[:90]
    assert Haystack.generated(1).take(90, tokenizer, seeded(0)) != text[:90]


def test_noise_is_one_paragraph():
    text = Haystack.noise().take(1000, tokenizer_of("bytes"), seeded(0))
    assert text == (NOISE * 20).lstrip()[:1000]
