"""Documents of rows and streams as people read them: text, and `[picture RxC]` for pictures.

in: shards or a stream, how many; out: dicts ready for JSON
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from l4cli.data.frame import Frame
from l4cli.data.shards import ShardSet
from l4cli.data.stream import StreamReader
from l4cli.errors import L4Error
from l4cli.text import Tokenizer, tokenizer_from_files

MAX_TOKENS = 4096  # of a stream's document; a whole book would drown the rest

Sample = dict[str, Any]


def row_samples(shards: ShardSet, count: int) -> list[Sample]:
    """Decode rows spread evenly over the shards, one sample a document."""
    tokenizer = shards.tokenizer()
    numbers = np.linspace(0, shards.num_rows - 1, min(count, shards.num_rows)).round().astype(int)
    samples = []
    for number in numbers.tolist():
        row = shards.row(number)
        ends = np.flatnonzero(np.diff(row.document_ids, append=-1)) + 1
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            document = int(row.document_ids[start])
            if document == 0:
                continue
            sample = _sample(
                tokenizer,
                row.input_ids[start:end],
                None if row.loss_mask is None else row.loss_mask[start:end],
                row.media_positions - start,
                row.media_tiles,
            )
            labels = {name: values[document - 1] for name, values in row.labels.items()}
            samples.append({"row": number, "document": document, **sample, "labels": labels})
    return samples


def stream_samples(reader: StreamReader, count: int) -> tuple[list[Sample], str | None]:
    """Read a stream to its end and decode its first documents; say what is wrong with it, if so."""
    tokenizer = tokenizer_from_files(reader.header.tokenizer_files) if count else None
    samples: list[Sample] = []
    try:
        for frame in reader:
            for i in range(min(frame.num_documents, count - len(samples))):
                assert tokenizer is not None
                sample = _frame_sample(tokenizer, frame, i)
                samples.append({"document": len(samples) + 1, **sample})
    except L4Error as error:
        return samples, error.why
    return samples, None


def _frame_sample(tokenizer: Tokenizer, frame: Frame, i: int) -> Sample:
    start, end = frame.offsets[i : i + 2].tolist()
    shown = slice(start, min(end, start + MAX_TOKENS))
    mask = None if frame.loss_mask is None else frame.loss_mask[shown]
    positions = frame.media_positions - start
    sample = _sample(tokenizer, frame.tokens[shown], mask, positions, frame.media_tiles)
    if shown.stop < end or (frame.is_open and i == frame.num_documents - 1):
        sample["text"] += " [...]"
    sample["num_tokens"] = end - start
    labels = {
        name: values[codes[i]] if codes[i] >= 0 else None
        for name, (codes, values) in frame.labels.items()
    }
    return {**sample, "labels": labels}


def _sample(
    tokenizer: Tokenizer,
    ids: np.ndarray,
    mask: np.ndarray | None,
    positions: np.ndarray,
    tiles_M2: np.ndarray,
) -> Sample:
    """Decode one document; pictures that lie outside it are passed over."""
    words, at = [], 0
    for position, (rows, cols) in zip(positions.tolist(), tiles_M2.tolist(), strict=True):
        if not at <= position < len(ids):
            continue
        start, end = _block(tokenizer, ids, at, position)
        words += [tokenizer.decode(ids[at:start]), f"[picture {rows}x{cols}]"]
        at = end
    words.append(tokenizer.decode(ids[at:]))
    num_targets = len(ids) if mask is None else int(np.count_nonzero(mask))
    return {"num_tokens": len(ids), "num_targets": num_targets, "text": "".join(words)}


def _block(tokenizer: Tokenizer, ids: np.ndarray, low: int, position: int) -> tuple[int, int]:
    """Where the picture's own tokens, from image_start to image_end, begin and end."""
    starts = np.flatnonzero(ids[low : position + 1] == tokenizer.image_start_id)
    ends = np.flatnonzero(ids[position:] == tokenizer.image_end_id)
    start = low + int(starts[-1]) if len(starts) else position
    return start, position + int(ends[0]) + 1 if len(ends) else len(ids)
