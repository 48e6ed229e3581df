"""Everything the stages read: streams packed again, documents made, questions written.

in: what is demanded, a checkpoint; out: the shares of every stage
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from l4cli.commands.extend_data import Share, StageData, check_streams, require_same_tokenizer
from l4cli.commands.extend_mix import Mix
from l4cli.commands.extend_questions import Questions, Writer, passage_tokens
from l4cli.commands.extend_synthetic import Synthetic
from l4cli.training.stages import Stage

if TYPE_CHECKING:
    from l4cli.text import Tokenizer


@dataclass(frozen=True)
class Demands:
    """What the stages are to read."""

    stages: Sequence[Stage]
    mixes: Sequence[Mix]  # one a stage
    long_fraction: float
    synthetic: Synthetic | None
    writer: Writer | None
    seed: int
    device: str

    @property
    def streams(self) -> list[Path]:
        """Every stream of any stage, once."""
        return list(dict.fromkeys(path for mix in self.mixes for path, _ in mix.streams))


class Supply:
    """Gives each stage its shares; `write_questions` comes first."""

    def __init__(self, demands: Demands, tokenizer: Tokenizer, folder: Path) -> None:
        self.demands, self.tokenizer, self.folder = demands, tokenizer, folder
        self._packed = StageData(folder, demands.seed)
        self._questions: Questions | None = None

    @classmethod
    def check(cls, demands: Demands, checkpoint: Path, folder: Path) -> Supply:
        """Refuse streams and rows that cannot be used, before anything is written."""
        from l4cli.text import load_tokenizer

        check_streams(demands.streams)
        require_same_tokenizer(demands.streams, checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        if demands.synthetic is not None:
            demands.synthetic.try_out(demands.stages, tokenizer)
        if demands.writer is not None:
            demands.writer.check()
            passage_tokens(demands.stages)
        return cls(demands, tokenizer, folder)

    def write_questions(self) -> None:
        """Have the questions written, if a model is to write some."""
        demands = self.demands
        if demands.writer is None:
            return
        self._questions = Questions.write(
            self.folder,
            demands.writer,
            demands.streams,
            [self._packed.digest(path) for path in demands.streams],
            demands.stages,
            self.tokenizer,
            device=demands.device,
            seed=demands.seed,
        )

    def shares(self, stage: Stage, mix: Mix) -> list[Share]:
        """Pack and make what a stage reads; the shares add up to 1."""
        demands, made = self.demands, mix.synthetic_fraction
        of_streams = self._packed.shares(stage, mix, demands.long_fraction)
        shares = [replace(share, share=share.share * (1 - made)) for share in of_streams]
        # Those who make something share alike.
        makers = [part for part in (demands.synthetic, self._questions) if part is not None]
        for maker in makers if made > 0 else ():
            each = made / len(makers)
            num_tokens = math.ceil(each * stage.num_tokens)
            if isinstance(maker, Synthetic):
                share = maker.make(self.folder, stage, num_tokens, self.tokenizer, demands.seed)
            else:
                share = maker.make(stage, num_tokens, self.tokenizer, demands.seed)
            shares.append(replace(share, share=each))
        return [share for share in shares if share.share > 0]
