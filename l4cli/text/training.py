"""Learn a byte-level BPE vocabulary from text.

in: texts, streamed; out: a `RankedVocabulary`: 256 bytes, then tokens in the order of merging
source: tokenizers' `BpeTrainer`; Llama 4's split pattern
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from l4cli.text.ranks import RankedVocabulary, unspell
from l4cli.text.special_tokens import NAMED_SPECIAL_TOKENS, SPECIAL_TOKENS, special_ids
from l4cli.text.splitting import LLAMA4_PATTERN, blocks, cut_long_runs

NUM_BYTES = 256
MIN_FREQUENCY = 2  # a pair seen once says nothing about other text
_CHUNK_CHARS = 1 << 12  # the trainer holds 256 texts at a time
_MAX_RUN_CHARS = 1 << 13  # merging within one piece takes the square of its length


def min_vocab_size(all_special: bool) -> int:
    """The smallest vocabulary: every byte and the special tokens."""
    return NUM_BYTES + len(SPECIAL_TOKENS if all_special else NAMED_SPECIAL_TOKENS)


def train_vocabulary(
    texts: Iterable[str], vocab_size: int, *, all_special: bool = False
) -> RankedVocabulary:
    """Learn up to `vocab_size` tokens, special ones included; less text may give fewer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    num_ordinary = vocab_size - min_vocab_size(all_special) + NUM_BYTES
    assert num_ordinary >= NUM_BYTES, vocab_size
    library = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA4_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    library.train_from_iterator(_chunks(texts), trainer)
    vocab = library.get_vocab()
    learned = unspell(sorted(vocab, key=vocab.__getitem__))
    # The trainer numbers bytes by their printable stand-ins, and merged tokens as it finds them.
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
    tokens += [token for token in learned if len(token) > 1]
    special = special_ids(len(tokens), all_special=all_special)
    return RankedVocabulary(tuple(tokens), special, LLAMA4_PATTERN)


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for block in blocks([text], block_chars=_CHUNK_CHARS):
            yield from cut_long_runs(block, _MAX_RUN_CHARS)
