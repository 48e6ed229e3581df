"""Files of tokenizers: foreign ones, damaged ones, and what transformers reads in ours."""

from __future__ import annotations

import base64
import contextlib
import json
import os

import numpy as np
import pytest
from text_samples import LANGUAGES, SHAPES

from l4cli.errors import L4Error
from l4cli.text import load_tokenizer, tokenizer_from_files
from l4cli.text.files import tokenizer_files
from l4cli.text.ranks import RankedVocabulary
from l4cli.text.special_tokens import special_ids
from l4cli.text.splitting import KNOWN_PATTERNS, LLAMA3_PATTERN, LLAMA4_PATTERN, blocks

BYTES = [bytes([byte]) for byte in range(256)]
WORDS = [b"he", b"ll", b"hell", b"hello", b" w", b" wo", b"rl", b"rld", b" world", b"\n\n", b"  "]


def ranked_files(words=WORDS, pattern=LLAMA4_PATTERN) -> dict[str, str]:
    tokens = (*BYTES, *words)
    return tokenizer_files(RankedVocabulary(tokens, special_ids(len(tokens)), pattern))


def changed(change) -> dict[str, str]:
    """Give a ranked tokenizer's files after `change` has edited the parsed `tokenizer.json`."""
    files = ranked_files()
    data = json.loads(files["tokenizer.json"])
    change(data)
    return {**files, "tokenizer.json": json.dumps(data)}


@pytest.mark.parametrize("backend", ["tiktoken", "tokenizers"])
def test_a_folder_keeps_ids_and_fingerprint(tmp_path, backend):
    if backend == "tiktoken":
        pytest.importorskip("tiktoken")
    tokenizer = tokenizer_from_files(ranked_files(), backend=backend)
    tokenizer.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a", backend=backend)
    assert again.name == "a"
    assert (again.backend, again.fingerprint) == (backend, tokenizer.fingerprint)
    assert again.encode("hello world\n\n  hell").tolist() == [259, 264, 265, 32, 32, 258]
    assert again.token_bytes(264) == b" world"
    assert again.files() == tokenizer.files() == ranked_files()
    # The same from the file itself, and from the places where shards and checkpoints keep it.
    assert load_tokenizer(tmp_path / "a" / "tokenizer.json").fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path / "shards" / "tokenizer")
    assert load_tokenizer(str(tmp_path / "shards")).fingerprint == tokenizer.fingerprint


def test_fingerprints_tell_vocabularies_apart():
    files = [
        ranked_files(),
        ranked_files(WORDS[:-1]),
        ranked_files([*WORDS[:-2], WORDS[-1], WORDS[-2]]),
        ranked_files(pattern=LLAMA3_PATTERN),
        changed(lambda data: data["added_tokens"].pop()),
    ]
    assert len({tokenizer_from_files(each).fingerprint for each in files}) == len(files)


def test_any_ranks_merge_alike_in_both_engines():
    pytest.importorskip("tiktoken")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        words: list[bytes] = [b"a", b"b"]
        for _ in range(20):
            word = words[rng.integers(len(words))] + words[rng.integers(len(words))]
            if word not in words and len(word) < 20:
                words.append(word)
        files = ranked_files(words[2:])
        fast, plain = (
            tokenizer_from_files(files, backend=name) for name in ("tiktoken", "tokenizers")
        )
        for _ in range(20):
            text = "".join(rng.choice(["a", "b"], size=rng.integers(1, 60)))
            assert fast.encode(text).tolist() == plain.encode(text).tolist()


def test_merges_may_be_pairs_and_ties_in_any_order():
    files = ranked_files([b"ab", b"bc", b"abc"])
    data = json.loads(files["tokenizer.json"])
    assert data["model"]["merges"] == ["a b", "b c", "a bc", "ab c"]
    data["model"]["merges"] = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]
    again = tokenizer_from_files({"tokenizer.json": json.dumps(data)})
    assert again.fingerprint == tokenizer_from_files(files).fingerprint


def _repeat(data):
    data["model"]["merges"][1] = data["model"]["merges"][0]


def _pattern(data):
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|\W+"}


NOT_RANKED = {
    "its ids give": lambda data: data["model"]["merges"].pop(),
    "not those that its ids give": _repeat,
    "not in the order": lambda data: data["model"]["merges"].reverse(),
    "ignore_merges": lambda data: data["model"].update(ignore_merges=False),
    "dropout": lambda data: data["model"].update(dropout=0.1),
    "normalises": lambda data: data.update(normalizer={"type": "NFC"}),
    "known to be equal": _pattern,
    "as Llama 4 does": lambda data: data["pre_tokenizer"]["pretokenizers"].pop(0),
    "stand for ordinary text": lambda data: data["added_tokens"][9].update(special=False),
}


@pytest.mark.parametrize("reason", NOT_RANKED)
def test_what_is_not_defined_by_ranks_goes_through_tokenizers(reason):
    files = changed(NOT_RANKED[reason])
    tokenizer = tokenizer_from_files(files)
    assert tokenizer.backend == "tokenizers"
    assert reason in tokenizer.backend_reason
    if reason not in ("dropout", "normalises"):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(b"hell \xff\n")) == b"hell \xff\n"
    assert tokenizer.files() == files
    assert tokenizer_from_files(files).fingerprint == tokenizer.fingerprint
    with pytest.raises(L4Error, match="with `tiktoken`"):
        tokenizer_from_files(files, backend="tiktoken")


def test_a_pattern_that_the_library_gives_up_on():
    def change(data):
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(l+)+$"}

    tokenizer = tokenizer_from_files(changed(change))
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(L4Error, match="cannot encode the text"):
        tokenizer.encode("l" * 60 + "!")


@pytest.mark.parametrize("pattern", sorted(KNOWN_PATTERNS))
def test_known_patterns_split_alike_and_allow_the_cuts(pattern):
    pytest.importorskip("tiktoken")
    # Every pair of these is a token, so that the ids show where the text was split.
    letters = "aB9 \n/'s!\u00e9\u0301\u4e2d"
    words = [first + second for first in letters for second in letters]
    tokens = dict.fromkeys(word.encode()[:end] for word in words for end in range(2, 7))
    files = ranked_files([token for token in sorted(tokens, key=len) if len(token) > 1], pattern)
    fast, plain = (tokenizer_from_files(files, backend=name) for name in ("tiktoken", "tokenizers"))
    rng = np.random.default_rng(0)
    for _ in range(400):
        text = "".join(rng.choice(list(letters), size=rng.integers(1, 40)))
        ids = fast.encode(text).tolist()
        assert plain.encode(text).tolist() == ids
        pieces = [fast.encode(piece) for piece in blocks([text], block_chars=3)]
        assert np.concatenate(pieces).tolist() == ids


def library_file(tokenizer) -> dict[str, str]:
    return {"tokenizer.json": tokenizer.to_str()}


def test_sentencepiece_vocabulary():
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*special, *fallback, "\u2581", "a", "\u2581a"]
    vocab = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    library = Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens([AddedToken(word, special=True) for word in special])
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    files = {**library_file(library), "tokenizer_config.json": json.dumps(config)}
    tokenizer = tokenizer_from_files(files)
    assert tokenizer.backend == "tokenizers"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.stop_ids == [2]
    assert tokenizer.encode("a a").tolist() == [261, 261]
    assert tokenizer.token_bytes(261) == b" a"
    assert tokenizer.token_bytes(3 + 0xE9) == b"\xe9"
    assert tokenizer.token_bytes(1) == b""
    assert tokenizer.decode_bytes(tokenizer.encode("a \u00e9<s>")) == "a \u00e9<s>".encode()
    assert 1 not in tokenizer.encode("<s>")
    assert tokenizer.decode([1, 261, 2]) == "<s>a</s>"


def test_lower_casing_vocabulary():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = ["[UNK]", "[CLS]", "hello", "wor", "##ld"]
    library = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.enable_padding(length=9)
    library.enable_truncation(1)
    tokenizer = tokenizer_from_files(library_file(library))
    assert tokenizer.encode("Hello World").tolist() == [2, 3, 4]
    assert tokenizer.decode([2, 3, 4]) == "hello world"
    assert (tokenizer.bos_id, tokenizer.eot_id, tokenizer.stop_ids) == (None, None, [])
    with pytest.raises(L4Error, match="lacks tokens for single bytes"):
        tokenizer.encode_bytes(b"\xff")


def test_llama3_names_serve_the_chat_format():
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id")
    tokens = (*BYTES, *WORDS)
    special = {f"<|{name}|>": len(tokens) + i for i, name in enumerate(names)}
    files = tokenizer_files(RankedVocabulary(tokens, special, LLAMA3_PATTERN))
    tokenizer = tokenizer_from_files(files)
    first = len(tokens)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (first, first + 1)
    assert (tokenizer.header_start_id, tokenizer.header_end_id) == (first + 2, first + 3)
    assert tokenizer.stop_ids == [first + 1, first + 5, first + 4]


def test_transformers_reads_our_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_from_files(ranked_files())
    tokenizer.save(tmp_path)
    for model_type in (None, "llama4", "llama4_text"):
        if model_type is not None:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert len(theirs) == tokenizer.vocab_size
        roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert roles == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        for text in [*LANGUAGES.values(), *SHAPES.values()]:
            if "<|" in text:
                continue
            ids = tokenizer.encode(text).tolist()
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs(text)["input_ids"] == [tokenizer.bos_id, *ids]
            assert theirs.decode(ids) == text


def test_damaged_tokenizer_json(tmp_path):
    text = ranked_files()["tokenizer.json"]
    path = tmp_path / "tokenizer.json"
    damaged = ["", "  \n", "[]", "null", "{}", '"x"', "\x00\x01", "{" * 100_000, text + "x"]
    damaged += [text[: len(text) * i // 40] for i in range(40)]
    for content in damaged:
        path.write_text(content)
        with pytest.raises(L4Error, match="cannot read the tokenizer") as caught:
            load_tokenizer(path)
        assert caught.value.why
        assert str(path) in caught.value.what
    path.write_bytes(text.encode().replace(b"hell", b"he\xffl", 1))
    with pytest.raises(L4Error, match="is not UTF-8"):
        load_tokenizer(path)


@pytest.mark.parametrize("junk", [None, 5, -1, 1 << 31, "x", [], [1], {}, {"a": 1}, True])
def test_junk_anywhere_is_loaded_or_refused_in_words(junk):
    places = [(key,) for key in json.loads(ranked_files()["tokenizer.json"])]
    places += [("model", key) for key in ("type", "vocab", "merges", "ignore_merges", "dropout")]
    places += [("added_tokens", 3), ("added_tokens", 3, "id"), ("added_tokens", 3, "content")]
    places += [("pre_tokenizer", "pretokenizers"), ("pre_tokenizer", "pretokenizers", 0)]
    places += [("pre_tokenizer", "pretokenizers", 0, "pattern"), ("model", "vocab", "he")]
    places += [("model", "merges", 0), ("decoder", "type")]
    for place in places:

        def put(data, place=place):
            for key in place[:-1]:
                data = data[key]
            data[place[-1]] = junk

        try:
            tokenizer = tokenizer_from_files(changed(put))
        except L4Error:
            continue
        assert tokenizer.decode(tokenizer.encode("hell")) == "hell"
    with contextlib.suppress(L4Error):
        tokenizer_from_files({**ranked_files(), "tokenizer_config.json": json.dumps(junk)})


def meta_lines(tokens) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]


def test_damaged_tokenizer_model(tmp_path):
    lines = meta_lines([*BYTES, *WORDS])
    damaged = {
        "empty": [],
        "has 200000": lines,
        "line 3 is not": [*lines[:2], b"!!!! 2", *lines[3:]],
        "line 4 is not": [*lines[:3], b"YQ== x", *lines[4:]],
        "line 267 is not": [*lines[:-1], lines[-1][:-4]],
        "rank 7, expected 8": [*lines[:8], lines[7], *lines[8:]],
        "rank 9, expected 8": [*lines[:8], *lines[9:]],
        "twice": [*lines[:-1], base64.b64encode(b"a") + b" 266"],
        "1 of the 256 single bytes": meta_lines([*BYTES[1:], *WORDS]),
        "empty token": [*lines, b" 267"],
        "line 2 is not": [b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"],
    }
    path = tmp_path / "tokenizer.model"
    for why, content in damaged.items():
        path.write_bytes(b"\n".join(content))
        with pytest.raises(L4Error, match="cannot read the tokenizer") as caught:
            load_tokenizer(path)
        assert why in caught.value.why


def test_what_is_not_there(tmp_path):
    with pytest.raises(L4Error, match="there is no such file"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(L4Error, match=r"no tokenizer in .*`weights.bin`"):
        load_tokenizer(tmp_path)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(L4Error, match="it holds nothing"):
        load_tokenizer(tmp_path / "folder.json")
    with pytest.raises(L4Error, match=r"`tokenizer.json` is missing among `config.json`"):
        tokenizer_from_files({"config.json": "{}"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(L4Error, match="permission denied"):
        load_tokenizer(path)
