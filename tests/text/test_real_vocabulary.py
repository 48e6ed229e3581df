"""Llama 4's vocabulary: ids equal tiktoken's with the published pattern, whatever the engine."""

from __future__ import annotations

import json
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from text_samples import LANGUAGES, RUNS, SHAPES

from l4cli.text import SPECIAL_TOKENS, load_tokenizer, tokenizer_from_files
from l4cli.text.splitting import MAX_RUN_CHARS, blocks, cut_long_runs

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# Characters at which the pattern's branches meet.
TRICKY = st.text(
    alphabet="aBz9 \t\n\r/'sST!-<|\u00e9\u017f\u0301\u4e2d\u3002\u00a0\u2028\u0661", max_size=60
)


def test_published_ids(real, real_fast):
    for tokenizer in (real, real_fast):
        assert tokenizer.vocab_size == 202048
        assert tokenizer.encode("Hello world!").tolist() == [19873, 3817, 13]
        assert tokenizer.encode("I'm 12345 tokens").tolist() == [23752, 220, 7235, 2127, 22274]
        assert tokenizer.encode("\n\n").tolist() == [368]
        assert tokenizer.encode("ipython").tolist() == [607, 6934]
        assert tokenizer.bos_id == 200000
        assert tokenizer.stop_ids == [200001, 200007, 200008]
        assert (tokenizer.patch_id, tokenizer.pad_id) == (200092, 200018)
        assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert (real.backend, real_fast.backend) == ("tokenizers", "tiktoken")


@pytest.mark.parametrize("name", [*LANGUAGES, *SHAPES, *RUNS])
def test_ids_equal_tiktoken(name, real, real_fast, oracle):
    for text in (group[name] for group in (LANGUAGES, SHAPES, RUNS) if name in group):
        expected = oracle.encode_ordinary(text)
        assert real.encode(text).tolist() == expected
        assert real_fast.encode(text).tolist() == expected
        assert real.decode_bytes(expected) == text.encode()
        assert real.decode(expected) == text


def test_ids_of_code_equal_tiktoken(real, real_fast, oracle):
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8") for path in sorted(folder.glob("a*.py"))]
    expected = oracle.encode_ordinary_batch(texts, num_threads=2)
    for tokenizer in (real, real_fast):
        for num_threads in (1, 2):
            found = tokenizer.encode_batch(texts, num_threads)
            assert [ids.tolist() for ids in found] == expected
            assert all(ids.dtype == np.uint32 for ids in found)


@pytest.mark.parametrize(
    "first", [0, 41, *(pytest.param(i, marks=pytest.mark.slow) for i in range(97))]
)
def test_characters_are_split_alike(first, real, real_fast):
    # Letter, mark, digit or blank: the two engines' Unicode tables have to agree on each. Every
    # 97th character touches all scripts; all of them take minutes.
    codes = [c for c in range(first, 0x110000, 97) if not 0xD800 <= c < 0xE000]
    text = "".join(f"x{chr(c)}Y {chr(c)}{chr(c)}1{chr(c)}\n" for c in codes)
    assert np.array_equal(real.encode(text), real_fast.encode(text))


@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(text=st.one_of(st.text(max_size=60), TRICKY))
def test_any_text_has_the_ids_of_tiktoken(text, real, real_fast, oracle):
    expected = oracle.encode_ordinary(text)
    assert real.encode(text).tolist() == expected
    assert real_fast.encode(text).tolist() == expected


@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.binary(max_size=80), text=st.text(max_size=20))
def test_any_bytes_survive(data, text, real, real_fast):
    mixed = data + text.encode() + data
    ids = real.encode_bytes(mixed)
    assert real.decode_bytes(ids) == mixed
    assert real_fast.encode_bytes(mixed).tolist() == ids.tolist()


@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(text=TRICKY, places=st.lists(st.integers(0, 60)), block_chars=st.integers(1, 9))
def test_blocks_have_the_ids_of_the_whole(text, places, block_chars, real_fast, oracle):
    ends = [0, *sorted(places), len(text)]
    parts = [text[a:b] for a, b in pairwise(ends)]
    cut = list(blocks(parts, block_chars=block_chars))
    assert "".join(cut) == text
    assert cut == list(blocks([text], block_chars=block_chars))
    ids = [i for block in cut for i in real_fast.encode(block).tolist()]
    assert ids == oracle.encode_ordinary(text)


def test_ordinary_text_is_cut_often():
    text = "a line of words, and a number 12\n" * 1000
    assert max(len(block) for block in blocks([text], block_chars=100)) < 150


def test_a_text_with_no_harmless_place_is_cut_all_the_same():
    text = "\u0e01" * 250
    cut = list(blocks([text[:90], text[90:]], block_chars=10, max_block_chars=100))
    assert [len(block) for block in cut] == [100, 100, 50]


def test_long_runs_are_cut_and_nothing_else():
    text = "ab, cd " * 20 + "x" * 25 + " " * 12 + "-" * 10 + "1" * 40
    assert cut_long_runs(text, 10) == [
        "ab, cd " * 20 + "x" * 10,
        "x" * 10,
        "x" * 5 + " " * 10,
        " " * 2 + "-" * 10 + "1" * 40,
    ]


@pytest.mark.parametrize("unit", [" ", "a", "!"])
def test_runs_that_no_engine_takes_have_one_answer(unit, real, real_fast):
    # tiktoken alone gives up at a million blanks.
    text = "start" + unit * (2 * MAX_RUN_CHARS + 1) + "x"
    ids = real_fast.encode(text)
    assert np.array_equal(real.encode(text), ids)
    assert real.decode_bytes(ids) == text.encode()


def test_a_long_text_in_parts_has_the_ids_of_the_whole(real_fast, oracle):
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text("utf-8") for path in sorted(folder.glob("[a-d]*.py")))
    assert len(text) > 600_000
    expected = oracle.encode_ordinary(text)
    parts = (text[i : i + 1000] for i in range(0, len(text), 1000))
    ids = [real_fast.encode(piece) for piece in real_fast.divide(parts)]
    assert np.concatenate(ids).tolist() == expected
    assert real_fast.encode(text).tolist() == expected
    assert real_fast.encode_batch(["a", text, "b"], 2)[1].tolist() == expected


def test_saved_and_loaded_again(tmp_path, real, real_fast, meta_file):
    assert real.fingerprint == real_fast.fingerprint
    real_fast.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == real.fingerprint
    assert again.backend == "tiktoken"
    assert again.special_tokens == real.special_tokens
    text = "".join([*LANGUAGES.values(), *SHAPES.values()])
    assert np.array_equal(again.encode(text), real.encode(text))
    assert again.files() == real_fast.files()


def test_published_hugging_face_form_is_the_same_tokenizer(real):
    # It registers the special tokens up to vision_reserved_special_token_1047 only.
    data = json.loads(real.files()["tokenizer.json"])
    data["added_tokens"] = data["added_tokens"][:1134]
    again = tokenizer_from_files({"tokenizer.json": json.dumps(data)})
    assert again.fingerprint == real.fingerprint
    assert again.vocab_size == 202048
