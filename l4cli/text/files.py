"""A ranked vocabulary as Hugging Face files, and back.

in: `RankedVocabulary`; out: `tokenizer.json` and `tokenizer_config.json` in the published form
source: transformers/models/llama4/convert_llama4_weights_to_hf.py, convert_slow_tokenizer.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from l4cli.text.chat_template import CHAT_TEMPLATE
from l4cli.text.ranks import MAX_VOCAB_SIZE, RankedVocabulary, check_tokens, unspell
from l4cli.text.special_tokens import NUM_PUBLISHED_RANKS, SPECIAL_TOKENS
from l4cli.text.splitting import KNOWN_PATTERNS

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# What else a tokenizer folder may hold that belongs to the tokenizer.
EXTRA_FILES = ("special_tokens_map.json", "chat_template.jinja", "added_tokens.json")


class NotRanked(Exception):
    """Why a `tokenizer.json` is not defined by ranks; it goes through `tokenizers`."""


# Writing


def tokenizer_files(vocabulary: RankedVocabulary) -> dict[str, str]:
    """Write a vocabulary as the two files of a tokenizer folder."""
    return {
        TOKENIZER_FILE: _dump(_tokenizer_json(vocabulary)),
        CONFIG_FILE: config_file(vocabulary),
    }


def config_file(vocabulary: RankedVocabulary) -> str:
    """Write the settings that transformers reads, with the chat template."""
    roles = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad|>",
    }
    config = {role: name for role, name in roles.items() if name in vocabulary.special_tokens}
    return _dump(
        {
            **config,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    )


def _tokenizer_json(vocabulary: RankedVocabulary) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": vocabulary.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, name) for name, i in vocabulary.special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": _post_processor(vocabulary, {**byte_level, "use_regex": True}),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {word: i for i, word in enumerate(vocabulary.words)},
            "merges": list(map(" ".join, vocabulary.merge_words())),
        },
    }


def _added_token(token_id: int, name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, **flags, "special": True}


def _post_processor(vocabulary: RankedVocabulary, byte_level: dict[str, Any]) -> dict[str, Any]:
    """Put BOS before each text, as the published file does; no EOS."""
    bos = "<|begin_of_text|>"
    if bos not in vocabulary.special_tokens:
        return byte_level

    def begin(type_id: int, name: str) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    template = {
        "type": "TemplateProcessing",
        "single": begin(0, "A"),
        "pair": begin(0, "A") + begin(1, "B"),
        "special_tokens": {
            bos: {"id": bos, "ids": [vocabulary.special_tokens[bos]], "tokens": [bos]}
        },
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# Reading


def ranked_vocabulary(data: Mapping[str, Any]) -> RankedVocabulary:
    """Read a `tokenizer.json` whose ids are ranks.

    raises: NotRanked, with the reason in the user's words
    """
    pattern = _pattern(data)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise NotRanked("its model is not BPE")
    if not model.get("ignore_merges"):
        raise NotRanked("its model does not set `ignore_merges`")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise NotRanked(f"its model sets `{key}`")
    if data.get("normalizer") is not None:
        raise NotRanked("it normalises the text")
    special_tokens = _special_tokens(data)
    tokens = _ordinary_tokens(model.get("vocab"), special_tokens)
    ids = special_tokens.values()
    if len(set(ids)) != len(ids) or any(not len(tokens) <= i < MAX_VOCAB_SIZE for i in ids):
        raise NotRanked("its special tokens do not follow the ordinary ones")
    vocabulary = RankedVocabulary(tokens, _completed(len(tokens), special_tokens), pattern)
    _check_merges(vocabulary, model.get("merges"))
    return vocabulary


def _pattern(data: Mapping[str, Any]) -> str:
    """Find the split pattern of the published chain, Split then ByteLevel."""
    pre_tokenizer = data.get("pre_tokenizer")
    try:
        split, byte_level = pre_tokenizer["pretokenizers"]  # type: ignore[index]
        pattern = split["pattern"]["Regex"]
        is_published = (
            split["type"] == "Split"
            and split["behavior"] == "Isolated"
            and not split["invert"]
            and byte_level["type"] == "ByteLevel"
            and not byte_level["add_prefix_space"]
            and not byte_level["use_regex"]
        )
    except (KeyError, TypeError, ValueError):
        is_published = False
    if not is_published:
        raise NotRanked("it does not split text as Llama 4 does, by a pattern and then to bytes")
    if pattern not in KNOWN_PATTERNS:
        raise NotRanked("its split pattern is not one known to be equal in both libraries")
    return str(pattern)


def _special_tokens(data: Mapping[str, Any]) -> dict[str, int]:
    added = data.get("added_tokens") or []
    if not all(token.get("special") for token in added):
        raise NotRanked("some of its added tokens stand for ordinary text")
    pairs = sorted((token["id"], token["content"]) for token in added)
    return {name: i for i, name in pairs}


def _ordinary_tokens(vocab: Any, special_tokens: Mapping[str, int]) -> tuple[bytes, ...]:
    if not isinstance(vocab, dict):
        raise NotRanked("its vocabulary is not a table")
    ordinary = {word: i for word, i in vocab.items() if word not in special_tokens}
    if sorted(ordinary.values()) != list(range(len(ordinary))):
        raise NotRanked("its ordinary ids are not 0, 1, 2, ...")
    try:
        tokens = unspell(sorted(ordinary, key=ordinary.__getitem__))
        check_tokens(tokens)
    except ValueError as error:
        raise NotRanked(f"its vocabulary is not made of bytes: {error}") from None
    return tuple(tokens)


def _completed(num_ranks: int, special_tokens: dict[str, int]) -> dict[str, int]:
    """Give the published vocabulary all its special tokens; its Hugging Face form lacks 914."""
    published = {name: num_ranks + i for i, name in enumerate(SPECIAL_TOKENS)}
    is_published = num_ranks == NUM_PUBLISHED_RANKS and "<|begin_of_text|>" in special_tokens
    if is_published and special_tokens.items() <= published.items():
        return published
    return special_tokens


def _check_merges(vocabulary: RankedVocabulary, merges: Any) -> None:
    """Refuse merges that are not all the pairs the ids give, in the order of the ids."""
    if merges == list(map(" ".join, vocabulary.merge_words())):
        return
    ids = {word: i for i, word in enumerate(vocabulary.words)}
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or []]
        given = np.array([(ids[left], ids[right]) for left, right in pairs], dtype=np.int64)
    except (KeyError, TypeError, ValueError):
        raise NotRanked("its merges are not pairs of its tokens") from None
    expected = vocabulary.merges
    if len(given) != len(expected):
        raise NotRanked(f"its ids give {len(expected)} merges, it has {len(given)}")
    given = given.reshape(-1, 2)
    by_pair = np.lexsort(given.T), np.lexsort(expected[:, :2].T)
    if not np.array_equal(given[by_pair[0]], expected[by_pair[1], :2]):
        raise NotRanked("its merges are not those that its ids give")
    # Pairs that form the same token may stand in any order.
    formed = np.empty(len(given), dtype=np.int64)
    formed[by_pair[0]] = expected[by_pair[1], 2]
    if (np.diff(formed) < 0).any():
        raise NotRanked("its merges are not in the order of its ids")
