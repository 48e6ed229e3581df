"""Explain any preset, file or folder the suite reads or writes.

TARGET is `preset:NAME`, a checkpoint (ours or any Hugging Face Llama 4 folder), a run folder, a
token stream (`-` for stdin), packed shards, a teacher's cache or its answers, a tokenizer, a
`config.json` or a safetensors file.
Of weights only headers are read.

examples:
  l4 info preset:scout
  l4 info runs/nano/latest --verify
  l4 info shards/ --samples 3
  l4 info tok/ books.tokens --json
  l4 info --ops
"""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4cli import terminal
from l4cli.commands.options import Json, Quiet
from l4cli.errors import L4Error, UsageError

if TYPE_CHECKING:
    from l4cli.checkpoint import RunFolder

_ACCEPTED = (
    "name `preset:NAME`, a checkpoint, a run folder, a `.tokens` stream, packed shards, "
    "a teacher's cache or answers, a tokenizer, a `config.json` or a `.safetensors` file"
)
_MAX_LISTED = 12  # of long lists, for people; `--json` has everything
Facts = dict[str, Any]


def info(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="TARGET...", help="what to explain")
    ] = None,
    ops: Annotated[
        bool, typer.Option("--ops", help="which version of each operation runs")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="compare every file with its recorded SHA-256")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", min=0, help="rows to decode")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    terminal.configure(json=json, quiet=quiet)
    if not targets and not ops:
        raise UsageError("nothing to explain", why="no TARGET was given", fix=_ACCEPTED)
    if ops:
        _show_ops()
    problems: list[str] = []
    for target in targets or []:
        kind, explain = _recognise(target)
        if samples and kind not in ("stream", "shards"):
            why = f"`{target}` is a {kind}, and only streams and shards hold rows"
            raise UsageError("cannot use `--samples` here", why=why, fix="leave it out")
        facts = {"target": target, "kind": kind, **explain(target, samples)}
        found = _verify(kind, target, facts) if verify else None
        if found is not None:
            facts["problems"] = found
            problems += [f"{problem} (in `{target}`)" for problem in found]
        terminal.emit(facts)
        terminal.result("\n".join(_lines(facts)))
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        fix = "write or fetch what differs again; it is listed above"
        what = f"{len(problems)} differences from what was recorded"
        raise L4Error(what, why=problems[0] + more, fix=fix)


def _show_ops() -> None:
    from dataclasses import asdict

    from l4cli.inference.native import decoder_choices
    from l4cli.ops import describe

    choices = [*decoder_choices(), *describe()]
    terminal.emit({"kind": "ops", "ops": [asdict(choice) for choice in choices]})
    rows: dict[tuple[str, ...], list[str]] = {}
    for c in choices:
        rows.setdefault((c.op, c.version, c.does, c.reason), []).append(c.dtype)
    names = ("op", "on", "version", "what it does", "why not a faster one")
    cells = [
        (op, f"{choices[0].device} {', '.join(dtypes)}", *rest)
        for (op, *rest), dtypes in rows.items()
    ]
    terminal.table("", names, cells)


# What a target is


def _recognise(target: str) -> tuple[str, Callable[[str, int], Facts]]:
    """Say what a target is, and who explains it. raises: L4Error listing what is accepted"""
    if target.startswith("preset:"):
        return "preset", _explain_preset
    path = Path(target)
    if target == "-":
        return "stream", _explain_stream
    if target == "bytes" and not path.exists():
        return "tokenizer", _explain_tokenizer
    if path.is_symlink() and not path.exists():
        return "checkpoint", _explain_checkpoint  # its error names where the link points
    if not path.exists():
        why = "there is no such file or folder"
        raise L4Error(f"cannot explain `{target}`", why=why, fix=_ACCEPTED)
    return _recognise_folder(path) if path.is_dir() else _recognise_file(path)


def _recognise_folder(path: Path) -> tuple[str, Callable[[str, int], Facts]]:
    names = {entry.name for entry in path.iterdir()}
    if "config.json" in names or any(name.endswith(".safetensors.index.json") for name in names):
        return "checkpoint", _explain_checkpoint
    if "index.json" in names:
        return _recognise_index(path / "index.json")
    if {"answers.jsonl", "settings.json"} <= names:
        return "answers", _explain_answers
    if "run.toml" in names or "latest" in names or any(n.startswith("step-") for n in names):
        return "run folder", _explain_run
    if names & {"tokenizer.json", "tokenizer.model"}:
        return "tokenizer", _explain_tokenizer
    if names & {"l4", "params.json", "model.safetensors"}:
        return "checkpoint", _explain_checkpoint  # its error says what is missing
    shown = ", ".join(f"`{name}`" for name in sorted(names)[:5])
    why = f"it holds {shown}" if names else "the folder is empty"
    raise L4Error(f"cannot explain `{path}`", why=why, fix=_ACCEPTED)


def _recognise_index(path: Path) -> tuple[str, Callable[[str, int], Facts]]:
    try:
        index = json_format.loads(path.read_bytes())
    except (OSError, ValueError):
        return "shards", _explain_shards  # its error says what is wrong
    is_cache = isinstance(index, dict) and index.get("format") == "l4 teacher cache"
    return ("teacher cache", _explain_cache) if is_cache else ("shards", _explain_shards)


def _recognise_file(path: Path) -> tuple[str, Callable[[str, int], Facts]]:
    if path.suffix == ".tokens" or _first_metadata(path).get("format") == "l4-tokens":
        return "stream", _explain_stream
    if path.suffix == ".safetensors":
        return "weights file", _explain_weights_file
    if path.name == "tokenizer.model":
        return "tokenizer", _explain_tokenizer
    if path.suffix == ".json":
        keys = _read_json(path)
        if "model_type" in keys or "text_config" in keys:
            return "config", _explain_config
        if "model" in keys or path.name == "tokenizer.json":
            return "tokenizer", _explain_tokenizer
        if path.name == "index.json":
            kind, explain = _recognise_index(path)
            return kind, lambda target, n: explain(str(Path(target).parent), n)
    why = "its content is nothing the suite writes" if path.stat().st_size else "the file is empty"
    raise L4Error(f"cannot explain `{path}`", why=why, fix=_ACCEPTED)


def _first_metadata(path: Path) -> Facts:
    """The metadata of a file that begins like safetensors, else nothing."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 64 << 20:
            return {}
        try:
            fields = json_format.loads(file.read(length))
        except ValueError:
            return {}
    metadata = fields.get("__metadata__") if isinstance(fields, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _read_json(path: Path) -> Facts:
    try:
        value = json_format.loads(path.read_bytes())
    except ValueError as error:
        why = f"it is not JSON: {error}"
        raise L4Error(f"cannot explain `{path}`", why=why, fix=_ACCEPTED) from error
    return value if isinstance(value, dict) else {}


# What there is to say about it


def _explain_preset(target: str, samples: int) -> Facts:
    from l4cli.model import load_preset
    from l4cli.planning import describe_config

    return describe_config(load_preset(target.removeprefix("preset:")))


def _explain_config(target: str, samples: int) -> Facts:
    from l4cli.model import Llama4Config
    from l4cli.planning import describe_config

    return describe_config(Llama4Config.from_file(Path(target)))


def _explain_checkpoint(target: str, samples: int) -> Facts:
    from l4cli.checkpoint import describe_checkpoint, load_config, resolve_checkpoint
    from l4cli.planning import describe_config

    folder = resolve_checkpoint(target)
    config = load_config(folder, allow_quantized=True)
    facts = {"folder": str(folder), **describe_config(config), **describe_checkpoint(folder)}
    has_tokenizer = any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model"))
    facts["tokenizer"] = _explain_tokenizer(str(folder), 0) if has_tokenizer else None
    return facts


def _explain_run(target: str, samples: int) -> Facts:
    from l4cli.checkpoint import RunFolder, describe_run

    run = RunFolder(target)
    facts = describe_run(run)
    if facts["latest"] is not None:
        facts |= _explain_checkpoint(str(run.path / facts["latest"]), 0)
    return facts


def _explain_answers(target: str, samples: int) -> Facts:
    from l4cli.posttraining.answer_journal import describe_answers

    return describe_answers(Path(target))


def _explain_weights_file(target: str, samples: int) -> Facts:
    from l4cli.checkpoint import describe_weights_file, read_header

    return describe_weights_file(read_header(Path(target)))


def _explain_tokenizer(target: str, samples: int) -> Facts:
    from l4cli.text import load_tokenizer

    tokenizer = load_tokenizer(target)
    roles = ("bos", "eos", "eot", "eom", "pad", "image_start", "image_end", "patch")
    return {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "num_special_tokens": len(tokenizer.special_tokens),
        "backend": tokenizer.backend,
        "backend_reason": tokenizer.backend_reason,
        "fingerprint": tokenizer.fingerprint,
        "ids": {role: getattr(tokenizer, f"{role}_id") for role in roles},
        "stop_ids": tokenizer.stop_ids,
    }


def _explain_stream(target: str, samples: int) -> Facts:
    """Read every frame: how much there is, and whether the producer came to its end."""
    from l4cli.data.samples import stream_samples
    from l4cli.data.standard_input import standard_input
    from l4cli.data.stream import StreamReader

    name = "stdin" if target == "-" else target
    with nullcontext(standard_input()) if target == "-" else open(target, "rb") as file:
        reader = StreamReader(file, name)
        decoded, problem = stream_samples(reader, samples)
    totals, header = reader.totals, reader.header
    facts: Facts = {
        "is_complete": problem is None,
        "num_documents": totals.documents,
        "num_tokens": totals.tokens,
        "num_media": totals.media,
        "num_frames": totals.frames,
        "vocab_size": header.vocab_size,
        "fingerprint": header.fingerprint,
        "geometry": header.geometry.to_dict(),
    }
    if problem is not None:
        facts["problem"] = problem
    return {**facts, "samples": decoded} if samples else facts


def _explain_shards(target: str, samples: int) -> Facts:
    from l4cli.data.samples import row_samples
    from l4cli.data.shards import ShardSet

    shards = ShardSet.open(target)
    index = shards.index
    keys = ("num_rows", "num_tokens", "num_documents", "num_media", "seq_len", "fill", "vocab_size")
    facts: Facts = {key: index.get(key) for key in keys}
    facts["size_bytes"] = sum(shard["bytes"] for shard in index["shards"])
    facts |= {key: index[key] for key in ("fingerprint", "geometry", "packing")}
    facts["labels"] = {name: len(values) for name, values in index["labels"].items()}
    facts["tokenizer"] = _explain_tokenizer(str(shards.folder / "tokenizer"), 0)
    facts["shards"] = index["shards"]
    if samples:
        facts["samples"] = row_samples(shards, samples)
    return facts


def _explain_cache(target: str, samples: int) -> Facts:
    from l4cli.data.teacher_cache import TeacherCache

    return TeacherCache.open(target).describe()


# Whether it is still what was written


def _verify(kind: str, target: str, facts: Facts) -> list[str] | None:
    """List what differs from what was recorded; None for what records nothing."""
    if kind == "shards":
        from l4cli.data.shards import ShardSet

        path = Path(target)
        return ShardSet.open(path if path.is_dir() else path.parent).verify()
    if kind == "teacher cache":
        from l4cli.data.teacher_cache import TeacherCache

        path = Path(target)
        return TeacherCache.open(path if path.is_dir() else path.parent).verify()
    if kind == "stream":
        return [] if facts["is_complete"] else [facts["problem"]]
    if kind in ("checkpoint", "run folder"):
        from l4cli.checkpoint import RunFolder, resolve_checkpoint, verify_manifest

        if kind == "checkpoint":
            return [str(problem) for problem in verify_manifest(resolve_checkpoint(target))]
        return list(_run_problems(RunFolder(target)))
    terminal.say(f"`{target}`: a {kind} records no hashes, nothing to verify")
    return None


def _run_problems(run: RunFolder) -> Iterator[str]:
    from l4cli.checkpoint import verify_manifest

    for step in run.steps():
        folder = run.step_folder(step)
        yield from (f"`{folder.name}`: {problem}" for problem in verify_manifest(folder))


# For people


def _lines(facts: Facts, indent: str = "") -> Iterator[str]:
    """Names and values, one a line, nested ones indented; samples last, as text."""
    shown = {name: value for name, value in facts.items() if name != "samples"}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}"
            yield from _lines(_shortened(value), indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{name}"
            yield from _listed(value, indent + "  ")
        else:
            yield f"{indent}{name:<{width}}  {_value_text(name, value)}".rstrip()
    for sample in facts.get("samples", ()):
        yield ""
        yield from _sample_lines(sample)


def _shortened(value: Facts) -> Facts:
    if len(value) <= 2 * _MAX_LISTED:
        return value
    first = dict(list(value.items())[:_MAX_LISTED])
    return {**first, "...": f"{len(value) - _MAX_LISTED} more, with `--json`"}


def _listed(items: list[Facts], indent: str) -> Iterator[str]:
    for item in items[:_MAX_LISTED]:
        yield indent + "  ".join(f"{name} {_value_text(name, v)}" for name, v in item.items())
    if len(items) > _MAX_LISTED:
        yield f"{indent}... {len(items) - _MAX_LISTED} more, with `--json`"


def _value_text(name: str, value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in name.split("_"):
        return f"{terminal.bytes_text(value)} ({value:,})" if value >= 1024 else f"{value} B"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,} ({terminal.count_text(value)})" if value >= 10**6 else f"{value:,}"
    if isinstance(value, float):
        return terminal.count_text(value) if value >= 1e6 else f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return _printable(str(value)) or "none"


def _sample_lines(sample: Facts) -> Iterator[str]:
    place = f"document {sample['document']}, {sample['num_tokens']} tokens"
    if "row" in sample:
        place = f"row {sample['row']}, {place}"
    if sample["num_targets"] != sample["num_tokens"]:
        place += f", {sample['num_targets']} of them targets"
    labels = "".join(f", {name} {value}" for name, value in sample["labels"].items())
    yield f"--- {place}{labels} ---"
    yield _printable(sample["text"])


def _printable(text: str) -> str:
    """Data must not steer the terminal: control characters other than line breaks are spelled."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
