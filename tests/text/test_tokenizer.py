"""The built-in tokenizer, round trips, and what every tokenizer promises."""

from __future__ import annotations

import pytest

from l4cli.errors import L4Error
from l4cli.text import NAMED_SPECIAL_TOKENS, SPECIAL_TOKENS, load_tokenizer, tokenizer_from_files

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def test_special_tokens_stand_at_their_published_ids():
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 2048
    published = {
        0: "<|begin_of_text|>",
        8: "<|eot|>",
        15: "<|text_post_train_reserved_special_token_5|>",
        18: "<|finetune_right_pad|>",
        19: "<|text_post_train_reserved_special_token_8|>",
        79: "<|text_post_train_reserved_special_token_68|>",
        80: "<|image_start|>",
        85: "<|tile_y_separator|>",
        90: "<|image|>",
        92: "<|patch|>",
        93: "<|vision_reserved_special_token_7|>",
        1133: "<|vision_reserved_special_token_1047|>",
        1134: "<|reasoning_reserved_special_token_0|>",
        1142: "<|reasoning_thinking_start|>",
        1144: "<|reserved_special_token_0|>",
        2047: "<|reserved_special_token_903|>",
    }
    assert {i: SPECIAL_TOKENS[i] for i in published} == published
    assert len(NAMED_SPECIAL_TOKENS) == 21


def test_bytes_tokenizer_is_one_token_a_byte_then_the_named_special_tokens():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == 277
    assert tokenizer.backend == "bytes"
    assert tokenizer.encode("a\u00e9").tolist() == [97, 195, 169]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id) == (256, 257, 264)
    assert (tokenizer.image_id, tokenizer.patch_id) == (273, 274)
    assert tokenizer.stop_ids == [257, 263, 264]
    assert tokenizer.num_bytes().tolist() == [1] * 256 + [0] * 21
    assert tokenizer.decode([256, 104, 105, 264]) == "<|begin_of_text|>hi<|eot|>"
    assert tokenizer.decode_bytes([256, 104, 105, 264]) == b"hi"
    assert tokenizer.decode([0xFF]) == "\ufffd"
    assert tokenizer.encode("").size == 0


@hypothesis.given(data=st.binary(max_size=200))
def test_any_bytes_survive_the_bytes_tokenizer(data):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert tokenizer.encode_bytes(data).tolist() == list(data)


def test_bytes_tokenizer_comes_back_from_its_files(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "tok")
    assert sorted(p.name for p in (tmp_path / "tok").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for again in (load_tokenizer(tmp_path / "tok"), tokenizer_from_files(tokenizer.files())):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.backend == "bytes"
        assert again.special_tokens == tokenizer.special_tokens
        assert again.files() == tokenizer.files()


def test_text_that_spells_a_special_token_is_ordinary_text():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("<|eot|>").tolist() == list(b"<|eot|>")


def test_an_id_out_of_range_is_an_error():
    tokenizer = load_tokenizer("bytes")
    for ids in ([277], [5, -1]):
        with pytest.raises(L4Error, match="out of range"):
            tokenizer.decode(ids)
        with pytest.raises(L4Error, match="out of range"):
            tokenizer.decode_bytes(ids)


def test_half_a_surrogate_pair_is_an_error():
    with pytest.raises(L4Error, match="character 1 is half of a surrogate pair"):
        load_tokenizer("bytes").encode("a\ud83d")
