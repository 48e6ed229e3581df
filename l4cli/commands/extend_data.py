"""The data of every stage: token streams packed again to its length, and what is made for it.

in: the mixture of a stage; out: shards below `OUT/data`, and how much of each the stage reads

What was packed is kept under a key of everything it depends on, so that the same command finds
it again; a set of shards is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from l4cli import terminal
from l4cli.commands.extend_mix import Mix
from l4cli.commands.options import default_window
from l4cli.errors import L4Error, UsageError
from l4cli.training.stages import Stage

VERSION = 1  # of the way streams become shards; another one packs again
Weighted = tuple[float, dict[str, "Share"]]  # a weight, and the sets by `long` and `short`


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
        return f"{self.folder}:{self.share / self.fill:.9g}"


def check_streams(streams: Iterable[Path]) -> None:
    """Refuse what cannot be read again and again."""
    from l4cli.data.stream_packer import check_names

    for path in streams:
        check_names([str(path)])
        if str(path) == "-" or not path.is_file():
            fix = "write it to a file: `l4 tokenize FILES -o OUT.tokens`"
            why = "every stage reads it again, so it has to be a file"
            raise UsageError(f"cannot use `{path}`", why=why, fix=fix)


def require_same_tokenizer(streams: Iterable[Path], checkpoint: Path) -> None:
    """Refuse streams whose token ids mean something else to the checkpoint."""
    from l4cli.data.stream import read_stream
    from l4cli.text import load_tokenizer

    theirs = load_tokenizer(checkpoint).fingerprint
    for path in streams:
        with path.open("rb") as file:
            fingerprint = read_stream(file, str(path)).header.fingerprint
        if fingerprint != theirs:
            raise UsageError(
                f"`{path}` does not fit `{checkpoint}`",
                why="it was tokenized with another tokenizer than the checkpoint was trained with",
                fix=f"tokenize with `--tokenizer {checkpoint}`",
            )


class StageData:
    """Packs below one folder; each stream's digest is read once, however many stages there are."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._digests: dict[Path, str] = {}

    def shares(self, stage: Stage, mix: Mix, long_fraction: float) -> list[Share]:
        """Pack the streams for a stage; say which set gives how much of what they give.

        raises: L4Error when nothing is long, something long was asked for and nothing is made
        """
        packed = [
            (weight, self._pack(stage.seq_len, [str(path) for path in paths]))
            for weight, paths in _groups(mix)
        ]
        if not any("long" in sets for _, sets in packed) and long_fraction > 0:
            _tell_nothing_long(stage, packed, is_fatal=mix.synthetic_fraction == 0)
            long_fraction = 0.0
        found = _long_and_short(packed, long_fraction)
        realized = sum(share.share for share in found if share.folder.name == "long")
        if abs(realized - long_fraction) > 1e-6:
            which = "long" if realized < long_fraction else "short"
            terminal.warn(
                f"stage {stage.number}: {realized:.0%} of its streams' tokens are of documents of "
                f"{stage.long_len} tokens or more, not {long_fraction:.0%}: data sets without "
                f"{which} documents keep their weight"
            )
        return [share for share in found if share.share > 0]

    def _pack(self, seq_len: int, names: Sequence[str]) -> dict[str, Share]:
        from l4cli.data.stream_packer import PackingOptions, pack_by_length

        options = PackingOptions("best-fit", default_window(seq_len), True, self.seed)
        digests = [self.digest(Path(name)) for name in names]
        key = key_of(seq_len=seq_len, streams=digests, seed=self.seed, window=options.window)
        folder = self.folder / f"{seq_len}-{key}"
        if not folder.exists():
            terminal.say(f"packing {len(names)} streams into rows of {seq_len}: `{folder}`")
            pack_by_length(names, folder, seq_len, options)
        return {path.name: opened(path) for path in sorted(folder.iterdir()) if path.is_dir()}

    def digest(self, path: Path) -> str:
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


def _groups(mix: Mix) -> list[tuple[float, list[Path]]]:
    """Streams with weights are packed apart, others together; weights add up to 1."""
    if not mix.streams:
        return []
    if mix.streams[0][1] is None:
        return [(1.0, [path for path, _ in mix.streams])]
    total = sum(weight or 0.0 for _, weight in mix.streams)
    return [((weight or 0.0) / total, [path]) for path, weight in mix.streams]


def _long_and_short(packed: Sequence[Weighted], long_fraction: float) -> list[Share]:
    """Give every data set its weight, and long documents their fraction as far as that goes."""
    only_long = sum(weight for weight, sets in packed if "short" not in sets)
    both = sum(weight for weight, sets in packed if len(sets) == 2)
    # What is of one kind cannot be anything else; the rest makes up for it.
    of_both = min(max(long_fraction - only_long, 0.0), both) / both if both else 0.0
    found = []
    for weight, sets in packed:
        is_long = of_both if len(sets) == 2 else float("long" in sets)
        parts = {"long": weight * is_long, "short": weight * (1 - is_long)}
        found += [replace(share, share=parts[name]) for name, share in sets.items()]
    return found


def _tell_nothing_long(stage: Stage, packed: Sequence[Weighted], *, is_fatal: bool) -> None:
    longest = num_documents = 0
    for _, sets in packed:
        for share in sets.values():
            index = json.loads((share.folder / "index.json").read_text(encoding="utf-8"))
            longest = max(longest, index["packing"]["longest_short"])
            num_documents += index["num_documents"]
    if not num_documents:  # made documents alone
        return
    what = f"stage {stage.number} has no long documents"
    why = (
        f"none of {num_documents} documents has {stage.long_len} tokens, half a row "
        f"of {stage.seq_len}; the longest has {longest}"
    )
    if is_fatal:
        fix = "bring longer documents, a shorter stage, `--synthetic`, or `--long-fraction 0` to "
        raise L4Error(what, why=why, fix=fix + "train on short ones all the same")
    terminal.warn(f"{what}: {why}; what is made is long")
