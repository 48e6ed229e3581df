"""The data of every stage: token streams packed again to its length, long documents and short.

in: names of token streams, perhaps weighted, a stage; out: shards below `OUT/data`, and weights

What was packed is kept under a key of everything it depends on, so that the same command finds
it again; a set of shards is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4cli import terminal
from l4cli.commands.options import default_window
from l4cli.errors import L4Error, UsageError
from l4cli.training.stages import Stage

if TYPE_CHECKING:
    from l4cli.data.mixing import Part

VERSION = 1  # of the way streams become shards; another one packs again


@dataclass(frozen=True)
class Share:
    """One set of shards and how much of a stage's tokens comes from it."""

    folder: Path
    share: float
    num_tokens: int
    fill: float

    @property
    def spec(self) -> str:
        """The set as a mixture names it; rows that hold more padding are drawn more often."""
        return f"{self.folder}:{self.share / self.fill:.6f}"


def open_streams(specs: Sequence[str]) -> list[Part]:
    """Read `PATH` or `PATH:WEIGHT` and refuse what cannot be read again and again."""
    from l4cli.data.mixing import parse_mixture
    from l4cli.data.stream_packer import check_names

    parts = parse_mixture(specs)
    for part in parts:
        name = str(part.path)
        check_names([name])
        if name == "-" or not part.path.is_file():
            fix = "write it to a file: `l4 tokenize FILES -o OUT.tokens`"
            why = "every stage reads it again, so it has to be a file"
            raise UsageError(f"cannot use `{name}`", why=why, fix=fix)
    return parts


def require_same_tokenizer(parts: Sequence[Part], checkpoint: Path) -> None:
    """Refuse streams whose token ids mean something else to the checkpoint."""
    from l4cli.data.stream import read_stream
    from l4cli.text import load_tokenizer

    theirs = load_tokenizer(checkpoint).fingerprint
    for part in parts:
        with part.path.open("rb") as file:
            fingerprint = read_stream(file, str(part.path)).header.fingerprint
        if fingerprint != theirs:
            raise UsageError(
                f"`{part.path}` does not fit `{checkpoint}`",
                why="it was tokenized with another tokenizer than the checkpoint was trained with",
                fix=f"tokenize with `--tokenizer {checkpoint}`",
            )


class StageData:
    """Packs below one folder; `digest` reads each stream once, however many stages there are."""

    def __init__(self, folder: Path, parts: Sequence[Part], seed: int) -> None:
        self.folder, self.parts, self.seed = folder, parts, seed
        self._digests: dict[Path, str] = {}

    def shares(self, stage: Stage, long_fraction: float) -> list[Share]:
        """Pack the streams for a stage; say which set gives how much.

        raises: L4Error when there is nothing long and something long was asked for
        """
        groups = self._groups()
        found: dict[str, list[tuple[float, Share]]] = {"long": [], "short": []}
        longest = 0
        num_documents = 0
        for weight, names in groups:
            for name, share in self._pack(stage.seq_len, names).items():
                found[name].append((weight, share))
                index = json.loads((share.folder / "index.json").read_text(encoding="utf-8"))
                longest = max(longest, index["packing"]["longest_short"])
                num_documents += index["num_documents"]
        fractions = {"long": long_fraction, "short": 1 - long_fraction}
        if long_fraction > 0 and not found["long"]:
            raise _nothing_long(stage, longest, num_documents)
        if long_fraction < 1 and not found["short"]:
            terminal.warn(
                f"stage {stage.number} has no short documents: all {num_documents} have "
                f"{stage.long_len} tokens or more, so its tokens are all long"
            )
            fractions = {"long": 1.0, "short": 0.0}
        return [
            Share(share.folder, part, share.num_tokens, share.fill)
            for name, parts in found.items()
            for weight, share in parts
            if (part := fractions[name] * weight / sum(w for w, _ in parts)) > 0
        ]

    def _groups(self) -> list[tuple[float, list[str]]]:
        """Streams with weights are packed apart, others together."""
        if self.parts and self.parts[0].weight is not None:
            return [(float(part.weight or 0), [str(part.path)]) for part in self.parts]
        return [(1.0, [str(part.path) for part in self.parts])]

    def _pack(self, seq_len: int, names: Sequence[str]) -> dict[str, Share]:
        from l4cli.data.stream_packer import PackingOptions, pack_by_length

        options = PackingOptions("best-fit", default_window(seq_len), True, self.seed)
        digests = [self._digest(Path(name)) for name in names]
        key = key_of(seq_len=seq_len, streams=digests, seed=self.seed, window=options.window)
        folder = self.folder / f"{seq_len}-{key}"
        if not folder.exists():
            terminal.say(f"packing {len(names)} streams into rows of {seq_len}: `{folder}`")
            pack_by_length(names, folder, seq_len, options)
        return {path.name: opened(path) for path in sorted(folder.iterdir()) if path.is_dir()}

    def _digest(self, path: Path) -> str:
        """The SHA-256 of a stream, kept beside the shards as long as the file is the same."""
        if path in self._digests:
            return self._digests[path]
        from l4cli.checkpoint.atomic import write_text
        from l4cli.data.shards import hash_file

        facts, stat = self.folder / "streams.json", os.stat(path)
        known = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
        name = str(path.resolve())
        is_now = [stat.st_size, stat.st_mtime_ns]
        if known.get(name, {}).get("is") != is_now:
            known[name] = {"is": is_now, "sha256": hash_file(path)}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(facts, json.dumps(known, indent=1) + "\n")
        self._digests[path] = known[name]["sha256"]
        return self._digests[path]


def key_of(**facts: Any) -> str:
    """A short name for everything a set of shards depends on."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def opened(folder: Path) -> Share:
    """A packed set, checked, with no share yet."""
    from l4cli.data.shards import ShardSet

    shards = ShardSet.open(folder)
    return Share(folder, 0.0, shards.num_tokens, shards.index["fill"])


def _nothing_long(stage: Stage, longest: int, num_documents: int) -> L4Error:
    return L4Error(
        f"stage {stage.number} has no long documents",
        why=f"none of {num_documents} documents has {stage.long_len} tokens, half a row "
        f"of {stage.seq_len}; the longest has {longest}",
        fix="bring longer documents, a shorter stage, `--synthetic`, or `--long-fraction 0` to "
        "train on short ones all the same",
    )
