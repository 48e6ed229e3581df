"""Answers as packed shards, and what their teacher showed of its probabilities as a cache of them.

in: rows that were kept, the teacher's tokens; out: `shards/` as `l4 tokenize | l4 pack` writes
them, `cache/` for `l4 distill --teacher-cache`

A target whose probabilities are not known (an answer that our tokenizer cuts otherwise, the end of
a turn that a server does not report) is certain of its token: it is learned as from data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l4cli.data.documents import RawRow
from l4cli.data.encoding import DocumentEncoder, FrameBuilder, Part
from l4cli.data.frame import Frame
from l4cli.data.geometry import PictureGeometry
from l4cli.data.loader import BatchMaker
from l4cli.data.shards import ShardSet
from l4cli.data.stream import StreamHeader
from l4cli.data.stream_packer import PackingOptions, pack_frames
from l4cli.data.teacher_cache_writer import CacheOptions, TeacherCacheWriter
from l4cli.data.teacher_entries import encode_entries
from l4cli.errors import L4Error
from l4cli.posttraining.sample_selection import Kept
from l4cli.posttraining.soft_targets import SoftTargets, TokenMatcher, entropies
from l4cli.text import ChatTokens, Tokenizer
from l4cli.text.token_logprobs import TokenLogprobs

SHARDS, CACHE = "shards", "cache"


@dataclass
class SoftCounts:
    """How much of what was said became soft targets."""

    num_rows: int = 0
    num_with_logprobs: int = 0  # rows whose server gave them
    num_matched: int = 0  # of these, rows that our tokenizer cuts alike
    num_targets: int = 0
    num_soft: int = 0
    shown: float = 0.0  # summed over the soft targets

    def report(self) -> dict[str, Any]:
        """For the summary."""
        return {
            "num_rows_with_logprobs": self.num_with_logprobs,
            "num_rows_matched": self.num_matched,
            "num_targets": self.num_targets,
            "num_soft_targets": self.num_soft,
            "soft_share": self.num_soft / max(1, self.num_targets),
            "mean_shown_probability": self.shown / self.num_soft if self.num_soft else None,
        }


class SampleShards:
    """Gathers rows in memory, then writes both folders."""

    def __init__(self, tokenizer: Tokenizer, top_logprobs: int) -> None:
        self.tokenizer, self.num_columns = tokenizer, top_logprobs + 1
        self.counts = SoftCounts()
        self.geometry = PictureGeometry()
        self._encoder = DocumentEncoder(tokenizer, self.geometry)
        self._matcher: TokenMatcher | None = None
        self._builder = FrameBuilder()
        self._frames: list[Frame] = []
        self._soft: list[SoftTargets] = []
        self._soft_firsts: list[int] = []  # of each, where its document begins
        self._num_tokens = 0

    def add(self, kept: Kept) -> None:
        """Take one row. raises: L4Error when it cannot be tokenized"""
        row, record = kept.row, kept.record
        place = f"the answer to prompt `{row['id']}`"
        raw = RawRow(json.dumps(row).encode(), place, Path(), is_json=True)
        part = self._encoder.encode(raw)  # as `l4 tokenize samples.jsonl` does
        self.counts.num_rows += 1
        if record.get("logprobs") is not None:
            self.counts.num_with_logprobs += 1
            soft = self._match(part, record)
            if soft is not None:
                self.counts.num_matched += 1
                self.counts.shown += float(soft.shown_M.sum())
                self._soft.append(soft)
                self._soft_firsts.append(self._num_tokens)
        self._num_tokens += len(part.tokens)
        self._frames += self._builder.add(part)

    def write(
        self, out: Path, seq_len: int, packing: PackingOptions, teacher: str, identity: str
    ) -> dict[str, Any]:
        """Write `shards/`, and `cache/` if anything is known softly; give the shards' index."""
        self._frames += self._builder.flush()
        header = StreamHeader(
            self.tokenizer.files(),
            self.tokenizer.fingerprint,
            self.tokenizer.vocab_size,
            self.geometry,
        )
        index, places_RT = pack_frames(self._frames, header, out / SHARDS, seq_len, packing)
        if self._soft:
            options = CacheOptions(
                teacher, identity, num_exact=self.num_columns, num_drawn=0, seed=packing.seed
            )
            self._write_cache(out, places_RT, options)
        return index

    def _match(self, part: Part, record: Mapping[str, Any]) -> SoftTargets | None:
        assert part.loss_mask is not None
        try:
            said = TokenLogprobs.from_json(record["logprobs"])
        except (KeyError, TypeError, ValueError) as error:
            what = f"cannot use the log-probabilities of the answer to prompt `{record['id']}`"
            fix = "restore `answers.jsonl`, or begin anew in another folder with `-o`"
            raise L4Error(what, why=str(error).lower(), fix=fix) from None
        # The document ends after the chat.
        end = len(part.tokens) - (self.tokenizer.eos_id is not None)
        chat = ChatTokens(part.tokens[:end], part.loss_mask[:end], np.zeros(0, np.int64))
        if self._matcher is None:
            self._matcher = TokenMatcher(self.tokenizer, self.num_columns)
        return self._matcher.match(chat, record["content"], said)

    def _write_cache(self, out: Path, places_RT: np.ndarray, options: CacheOptions) -> None:
        shards = ShardSet.open(out / SHARDS)
        maker = BatchMaker(shards.geometry, None, None)
        table = _SoftTable(self._soft, self._soft_firsts, self._num_tokens)
        with TeacherCacheWriter(out / CACHE, options, [shards]) as writer:
            for number in range(shards.num_rows):
                batch = maker.batch([shards.row(number)], [f"row {number}"])
                is_target_T = batch.loss_weight[0].numpy() != 0
                labels_n = batch.labels[0].numpy()[is_target_T]
                # What is foretold at a position is the token after it.
                places_n = places_RT[number, 1:][is_target_T[:-1]]
                ids_nK, p_nK, is_soft_n = table.rows(places_n, labels_n)
                self.counts.num_targets += len(labels_n)
                self.counts.num_soft += int(is_soft_n.sum())
                rounding_n = writer.uniforms(0, number, len(labels_n))[:, 1]
                entries_nK = encode_entries(ids_nK, p_nK, None, rounding_n)
                writer.add(0, number, entries_nK, entropies(p_nK).astype(np.float32))
            writer.finish()


class _SoftTable:
    """What is known of each token of all documents, by its place."""

    def __init__(self, soft: list[SoftTargets], firsts: list[int], num_tokens: int) -> None:
        self.ids_MK = np.concatenate([item.ids_MK for item in soft])
        self.p_MK = np.concatenate([item.probabilities_MK for item in soft])
        self._row_N = np.full(num_tokens, -1, np.int64)
        places = [item.positions_M + first for item, first in zip(soft, firsts, strict=True)]
        self._row_N[np.concatenate(places)] = np.arange(len(self.ids_MK))

    def rows(
        self, places_n: np.ndarray, labels_n: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and probabilities [n, K], and which of them are more than the label."""
        row_n = self._row_N[places_n]
        is_soft_n = row_n >= 0
        ids_nK = np.zeros((len(labels_n), self.ids_MK.shape[1]), np.int64)
        p_nK = np.zeros(ids_nK.shape)
        ids_nK[:, 0], p_nK[:, 0] = labels_n, 1.0
        ids_nK[is_soft_n], p_nK[is_soft_n] = (
            self.ids_MK[row_n[is_soft_n]],
            self.p_MK[row_n[is_soft_n]],
        )
        assert np.array_equal(ids_nK[:, 0], labels_n)
        return ids_nK, p_nK, is_soft_n


def remove_old(out: Path) -> None:
    """Take away what an earlier choice of rows was packed into."""
    for name in (SHARDS, CACHE):
        shutil.rmtree(out / name, ignore_errors=True)
