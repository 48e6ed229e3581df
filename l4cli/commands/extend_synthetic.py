"""Long documents with questions, made on the spot for one stage and packed like others.

in: kinds, a format of needles, a haystack, a seed; out: shards of made documents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands.extend_data import Share, key_of, opened
from l4cli.commands.longcontext_options import haystack_digest, haystack_of, needle_format
from l4cli.commands.options import default_window
from l4cli.training.stages import Stage

if TYPE_CHECKING:
    from l4cli.text import Tokenizer


@dataclass(frozen=True)
class Needles:
    """What needles look like and what they are hidden in, as it was typed."""

    haystack: Sequence[str] = ()
    needle: str | None = None
    question: str | None = None
    keys: str | None = None
    values: str | None = None

    def format(self) -> Any:
        """raises: UsageError for a needle and a question that do not fit"""
        return needle_format(self.needle, self.question, self.keys, self.values)

    def open_haystack(self, seed: int) -> Any:
        """raises: L4Error if it holds no text"""
        return haystack_of(list(self.haystack) or None, seed=seed, repeat=True)


@dataclass(frozen=True)
class Synthetic:
    """What is to be made."""

    kinds: str
    needles: Needles
    hard: float = 0.0  # share of retrieval documents that are full of needles

    def check(self) -> None:
        """Refuse unknown kinds and formats, before anything is made."""
        from l4cli.data.longcontext.teaching import parse_kinds

        parse_kinds(self.kinds)
        self.needles.format()

    def try_out(self, stages: Sequence[Stage], tokenizer: Tokenizer) -> None:
        """Make one document a stage: a row too short for a question shows before any work."""
        for stage in stages:
            next(self._documents(stage, tokenizer, 0))

    def make(
        self, folder: Path, stage: Stage, num_tokens: int, tokenizer: Tokenizer, seed: int
    ) -> Share:
        """Make `num_tokens` in documents as long as the stage's rows, and pack them."""
        from l4cli.data.geometry import PictureGeometry
        from l4cli.data.longcontext.teaching import teaching_frames
        from l4cli.data.stream import StreamWriter
        from l4cli.data.stream_packer import PackingOptions, pack_streams

        window = default_window(stage.seq_len)
        key = key_of(
            **asdict(self),
            stage=stage.number,
            seq_len=stage.seq_len,
            num_tokens=num_tokens,
            seed=seed,
            window=window,
            tokenizer=tokenizer.fingerprint,
            haystack_digest=haystack_digest(self.needles.haystack),
        )
        packed = folder / f"synthetic-{stage.seq_len}-{key}"
        if packed.exists():
            return opened(packed)
        terminal.say(
            f"making {terminal.count_text(num_tokens)} tokens of `{self.kinds}`: `{packed}`"
        )
        folder.mkdir(parents=True, exist_ok=True)
        stream = folder / f".{packed.name}.tokens"
        try:
            with stream.open("wb") as file:
                writer = StreamWriter(file, tokenizer, PictureGeometry())
                # Another stage of the same length reads other documents.
                documents = self._documents(stage, tokenizer, int(key, 16))
                with terminal.progress("make", num_tokens) as bar:
                    for frame in teaching_frames(documents, num_tokens):
                        writer.write(frame)
                        bar.update(min(writer.totals.tokens, num_tokens))
                writer.close()
            options = PackingOptions("best-fit", window, True, seed)
            pack_streams([str(stream)], packed, stage.seq_len, options)
        finally:
            stream.unlink(missing_ok=True)
        return opened(packed)

    def _documents(self, stage: Stage, tokenizer: Tokenizer, seed: int) -> Any:
        from l4cli.data.longcontext.teaching import parse_kinds, teaching_documents

        return teaching_documents(
            parse_kinds(self.kinds),
            length=stage.seq_len,
            tokenizer=tokenizer,
            haystack=self.needles.open_haystack(seed),
            fmt=self.needles.format(),
            seed=seed,
            hard_share=self.hard,
        )
