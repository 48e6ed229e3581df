"""What a run is: the options that make it that run and no other, and the record of how it began.

in: resolved options; out: `run.toml`, and a refusal when the same folder is given other options
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

import l4cli
from l4cli import terminal
from l4cli.checkpoint import read_state_json
from l4cli.checkpoint.kept_settings import differing, names_in
from l4cli.errors import UsageError

FILE = "run.toml"


@cache
def code_version() -> str:
    """The version, and a hash of the sources so that edited code is told from the released one."""
    digest = hashlib.sha256()
    root = Path(l4cli.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{l4cli.__version__}+{digest.hexdigest()[:12]}"


def environment(device: torch.device) -> dict[str, Any]:
    """What bit-identity depends on beside the options."""
    where = f"cpu with {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {
        "device": where,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "code": code_version(),
    }


def write_record(
    folder: Path, command: str, options: Mapping[str, Any], around: Mapping[str, Any]
) -> None:
    """Write `run.toml`: the command line, the resolved options, the environment."""
    lines = [
        "# Written by `l4` when the run began or continued; nothing reads it back.",
        f"command = {_toml(command)}",
        f"command_line = {_toml(shlex.join(['l4', *sys.argv[1:]]))}",
    ]
    for title, table in (("options", options), ("environment", around)):
        lines += ["", f"[{title}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]
    temporary = folder / f".{FILE}.tmp"
    text = "\n".join(lines) + "\n"
    # The bytes of a file name need not be UTF-8.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(folder / FILE)


def _toml(value: Any) -> str:
    """One TOML value: JSON writes strings, numbers and lists of them alike."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def require_usable(folder: Path, *, fresh: bool) -> None:
    """Refuse a folder that holds something else, or with `--fresh` anything at all.

    Hidden files are locks and leftovers of killed runs, which `RunFolder` clears away.
    """
    if not folder.is_dir():
        return
    names = names_in(folder, fresh=fresh)
    if names and FILE not in names and not any(name.startswith("step-") for name in names):
        raise UsageError(
            f"cannot use `{folder}` as a run folder",
            why=f"it holds `{names[0]}` and no `{FILE}`: it belongs to something else",
            fix="choose a new folder with `-o`",
        )


def require_same_run(
    checkpoint: Path, options: Mapping[str, Any], num_steps: int, around: Mapping[str, Any]
) -> int:
    """Refuse to continue a run with other options; return the steps it has done.

    More steps are welcome. Another machine, thread count or code is told, not refused.
    """
    state = read_state_json(checkpoint)
    identity = state["identity"]
    recorded: dict[str, Any] = identity["options"]
    # The options may have been through JSON once; compare them on equal terms.
    current = json.loads(json.dumps(dict(options)))
    changed = differing(recorded, current)
    done, planned = int(state["step"]), int(identity["num_steps"])
    if num_steps < planned:
        changed.append(f"`steps` was {planned}, now {num_steps}")
    if changed:
        raise UsageError(
            f"`{checkpoint.parent}` holds a run with other options",
            why="; ".join(changed),
            fix="give the same options to continue it (more steps are fine), "
            "or choose another folder with `-o`",
        )
    _tell_environment(identity["environment"], around)
    return done


def _tell_environment(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for name, value in current.items():
        if recorded.get(name) != value:
            terminal.warn(
                f"`{name}` was {_shown(recorded.get(name))} and is now {_shown(value)}: "
                "the run continues, but the last bits of its losses may differ"
            )


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
