"""Test a model on films and pictures: written, sampled, tiled and encoded as any others are.

in: a `ShownSample`; out: a reading. Tiles are made while the engine reads; the film lies in a
temporary folder, so memory grows with neither
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from l4cli.data.geometry import PictureGeometry
from l4cli.data.longcontext.sample import Sample
from l4cli.data.longcontext.video import ShownSample
from l4cli.data.tiles import Tiles
from l4cli.evals.needle.engine_subject import EngineSubject
from l4cli.evals.needle.subject import Reading
from l4cli.inference import Engine
from l4cli.text import Tokenizer, image_block


class ShownSubject(EngineSubject):
    """A model in this process that sees."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        geometry: PictureGeometry,
        *,
        is_chat: bool = False,
    ) -> None:
        super().__init__(engine, tokenizer, is_chat=is_chat)
        self.geometry = geometry
        self.block = image_block(tokenizer, 1, 1, geometry.tokens_per_tile)

    def read(self, sample: Sample) -> Reading:
        """Read the frames, then ask each question on a fork of what was read."""
        assert isinstance(sample, ShownSample)
        with self._tiles(sample) as tiles:
            context = np.concatenate([self.frame.before, np.tile(self.block, len(tiles))])
            cache = None
            if len(context):
                # Lazy, but used as a tensor is: its length, and slices of it.
                pixels = cast(Tensor, tiles) if len(tiles) else None
                cache = self.engine.prefill(context, pixels, on_progress=self.on_progress)
        asked = max(map(self.num_asked, sample.questions))
        answers = self.answers(cache, sample.questions)
        return Reading(answers, len(context) + asked, self._straddled(sample))

    @contextmanager
    def _tiles(self, sample: ShownSample) -> Iterator[Tiles]:
        if not sample.pieces:  # the questions alone
            yield Tiles()
            return
        assert sample.shown is not None
        with tempfile.TemporaryDirectory(prefix="l4-film-") as folder:
            place = Path(folder)
            yield Tiles([sample.shown.source(place, self.geometry, is_whole=sample.is_whole)])

    def _straddled(self, sample: ShownSample) -> list[bool | None]:
        """Whether the frame that is sought lies across a border of chunks, for each question."""
        assert sample.shown is not None
        size, width = self.chunk_size, len(self.block)
        if size is None or not sample.is_whole:
            return [False] * len(sample.questions)
        firsts = [len(self.frame.before) + place * width for place in sample.shown.places]
        return [first // size != (first + width - 1) // size for first in firsts]
