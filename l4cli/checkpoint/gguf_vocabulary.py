"""A byte-level tokenizer as llama.cpp reads it: words, their kinds, merges, roles, chat template.

in: a `Tokenizer` and the model's vocabulary size; out: the keys of a GGUF file
source: llama.cpp, `llama_vocab::impl::load`: which splitting a name stands for
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from l4cli.errors import L4Error
from l4cli.text import Tokenizer
from l4cli.text.files import CONFIG_FILE, TOKENIZER_FILE, NotRanked, ranked_vocabulary
from l4cli.text.splitting import LLAMA3_PATTERN, LLAMA4_PATTERN, QWEN2_PATTERN

# How llama.cpp calls the ways to split text that are known here.
SPLITS = {LLAMA4_PATTERN: "llama4", LLAMA3_PATTERN: "llama-bpe", QWEN2_PATTERN: "qwen2"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # the kinds of tokens, as the format numbers them
# llama.cpp opens no file without merges; a pair that forms no token is read as its two bytes.
_NO_MERGE = "\u0100 \u0100"


@dataclass(frozen=True)
class GgufVocabulary:
    """What a file says of its tokenizer."""

    split: str
    words: list[str]
    kinds: list[int]
    merges: list[str]
    roles: dict[str, int]  # `bos`, `eos`, ...
    chat_template: str | None


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    """Spell a vocabulary, filled up to the model's size with tokens that mean nothing.

    raises: L4Error for a tokenizer of another family, or one that the model has no room for
    """
    what = f"cannot write the tokenizer `{tokenizer.name}` into a GGUF file"
    files = tokenizer.files()
    try:
        vocabulary = ranked_vocabulary(json.loads(files[TOKENIZER_FILE]))
    except NotRanked as reason:
        fix = "use a checkpoint with a byte-level BPE tokenizer, as Llama 4's"
        raise L4Error(what, why=str(reason), fix=fix) from None
    if tokenizer.vocab_size > vocab_size:
        why = f"it has {tokenizer.vocab_size} tokens, and the model knows {vocab_size}"
        fix = "put the tokenizer it was trained with into the folder"
        raise L4Error(what, why=why, fix=fix)
    words = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    num_ordinary = len(vocabulary.tokens)
    words[:num_ordinary] = vocabulary.words
    kinds[:num_ordinary] = [NORMAL] * num_ordinary
    for name, i in vocabulary.special_tokens.items():
        words[i], kinds[i] = name, CONTROL
    _require_distinct(words, what)
    return GgufVocabulary(
        split=SPLITS[vocabulary.pattern],
        words=words,
        kinds=kinds,
        merges=[" ".join(pair) for pair in vocabulary.merge_words()] or [_NO_MERGE],
        roles=_roles(tokenizer),
        chat_template=_chat_template(files),
    )


def _require_distinct(words: list[str], what: str) -> None:
    counts = Counter(words)
    twice = next((word for word, count in counts.items() if count > 1), None)
    if twice is not None:
        fix = "use a tokenizer whose tokens differ"
        raise L4Error(what, why=f"`{twice}` stands in it twice", fix=fix)


def _roles(tokenizer: Tokenizer) -> dict[str, int]:
    """Special ids by role. Chats end with `<|eot|>`, which llama.cpp looks for beside the end."""
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": tokenizer.eot_id,
        "eom": tokenizer.eom_id,
        "pad": tokenizer.pad_id,
    }
    return {role: i for role, i in ids.items() if i is not None}


def _chat_template(files: dict[str, str]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    template = json.loads(files.get(CONFIG_FILE, "{}")).get("chat_template")
    return template if isinstance(template, str) else None
