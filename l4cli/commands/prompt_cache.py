"""A prompt's cache in a file: the same long text is read once, whatever is asked about it.

in: a file and a prompt's ids; out: a cache that has read as much of the prompt as the file tells
"""

from __future__ import annotations

from pathlib import Path

from l4cli import terminal
from l4cli.inference import Cache, Engine


class PromptCache:
    """Used where it begins as the prompt does; written where it told less than half of it."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path, self.engine = path, engine
        self.num_found = 0

    def begin(self, ids: list[int]) -> Cache:
        """What of the prompt has been read before. raises: L4Error for another model's file"""
        self.num_found = 0
        if not self.path.exists():
            return self.engine.new_cache()
        cache = self.engine.load_cache(self.path)
        self.num_found = cache.keep_common(ids)
        terminal.say(f"{self.num_found} of {len(ids)} tokens are in `{self.path}`")
        return cache if self.num_found else self.engine.new_cache()

    def finish(self, cache: Cache) -> None:
        """Keep a prompt that was mostly new."""
        if 2 * self.num_found < cache.num_tokens:
            cache.save(self.path)
            terminal.say(f"{cache.num_tokens} tokens kept in `{self.path}`")
