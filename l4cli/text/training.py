"""Learn a byte-level BPE vocabulary from text.

in: texts, streamed; out: a `RankedVocabulary`: 256 bytes, then tokens in the order of merging
source: tokenizers' `BpeTrainer`; Llama 4's split pattern
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from l4cli.text.ranks import RankedVocabulary, unspell
from l4cli.text.special_tokens import NAMED_SPECIAL_TOKENS, SPECIAL_TOKENS, special_ids
from l4cli.text.splitting import LLAMA4_PATTERN, blocks, cut_long_runs

NUM_BYTES = 256
MIN_FREQUENCY = 2  # a pair seen once says nothing about other text
_CHUNK_CHARS = 1 << 12
_BATCH_CHUNKS = 256  # as many as the trainer takes at a time
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
    _train(library, trainer, _batches(texts))
    vocab = library.get_vocab()
    learned = unspell(sorted(vocab, key=vocab.__getitem__))
    # The trainer numbers bytes by their printable stand-ins, and merged tokens as it finds them.
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
    tokens += [token for token in learned if len(token) > 1]
    special = special_ids(len(tokens), all_special=all_special)
    return RankedVocabulary(tuple(tokens), special, LLAMA4_PATTERN)


def _train(library: Any, trainer: Any, batches: Iterable[list[str]]) -> None:
    """Read in this thread and train in another.

    The library pulls its texts from threads of its own while the caller waits inside it; were
    that the main thread, Ctrl-C and SIGTERM would wait for the end of the input.
    """
    feed: Queue[list[str] | None] = Queue(maxsize=4)
    stopped = Event()
    failures: list[BaseException] = []

    def texts() -> Iterator[str]:
        while (batch := feed.get()) is not None:
            yield from batch
        if stopped.is_set():
            raise InterruptedError

    def work() -> None:
        try:
            library.train_from_iterator(texts(), trainer)
        except BaseException as error:  # a panic of the library is not an `Exception`
            failures.append(error)

    # A daemon: merging cannot be stopped, and must not keep the process.
    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        for batch in chain(batches, [None]):
            if not _put(feed, batch, worker):
                break
        worker.join()
    except BaseException:
        stopped.set()
        while not feed.empty():  # the worker may take one too; either empties it
            with suppress(Empty):
                feed.get_nowait()
        feed.put(None)
        raise
    if failures:
        raise RuntimeError("`tokenizers` failed to train") from failures[0]


def _put(feed: Queue[list[str] | None], batch: list[str] | None, worker: Thread) -> bool:
    """Hand a batch over; False if the worker has ended and takes no more."""
    while worker.is_alive():
        with suppress(Full):
            feed.put(batch, timeout=1.0)
            return True
    return False


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group pieces of bounded size."""
    batch: list[str] = []
    for text in texts:
        for block in blocks([text], block_chars=_CHUNK_CHARS):
            batch += cut_long_runs(block, _MAX_RUN_CHARS)
            if len(batch) >= _BATCH_CHUNKS:
                yield batch
                batch = []
    yield batch
