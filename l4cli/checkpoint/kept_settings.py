"""Settings that stay with what was made by them: the same command goes on, another is refused.

in: a folder, the settings of a call; out: `settings.json`, refusals to mix two of a kind
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4cli.checkpoint.atomic import write_text
from l4cli.errors import L4Error, UsageError

SETTINGS = "settings.json"
_SHOWN = 200  # characters of a value in a message


def names_in(folder: Path, *, fresh: bool) -> list[str]:
    """What lies in a folder, hidden files apart. raises: UsageError with `--fresh` if anything"""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if fresh and names:
        raise UsageError(
            f"`--fresh` needs a new or empty folder, not `{folder}`",
            why=f"it holds `{names[0]}`" + (f" and {len(names) - 1} more" if names[1:] else ""),
            fix="choose another folder with `-o`, or remove this one",
        )
    return names


def require_usable(folder: Path, format: str, *, fresh: bool, needs: str) -> None:
    """Refuse a folder of something else, or with `--fresh` any that is not empty.

    `needs`: what goes into it, as in `results need`
    """
    if not folder.exists():
        return
    what, fix = f"cannot write to `{folder}`", "choose another folder with `-o`"
    if not folder.is_dir():
        raise UsageError(what, why=f"it is a file, and {needs} a folder", fix=fix)
    names = names_in(folder, fresh=fresh)
    if names and read_settings(folder, format) is None:
        why = f"it holds `{names[0]}` and no `{SETTINGS}`: it belongs to something else"
        raise UsageError(what, why=why, fix=fix)


def read_settings(folder: Path, format: str) -> dict[str, Any] | None:
    """The settings kept in a folder, None without any. raises: L4Error if damaged"""
    path = folder / SETTINGS
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, f"it is not JSON: {error}") from None
    if not isinstance(kept, dict) or kept.get("format") != format:
        raise damaged(path, f"it is not marked as `{format}`")
    settings: dict[str, Any] = kept["settings"]
    return settings


def write_settings(folder: Path, format: str, settings: Mapping[str, Any]) -> None:
    """Keep settings, in a folder that is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"format": format, "settings": dict(settings)}
    write_text(folder / SETTINGS, json.dumps(kept, indent=2) + "\n")


def differing(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Every setting that is another now, in words. Both have been through JSON."""
    return [
        f"`{name}` was {_shown(recorded.get(name))}, now {_shown(current.get(name))}"
        for name in sorted(recorded.keys() | current.keys())
        if recorded.get(name) != current.get(name)
    ]


def damaged(path: Path, why: str) -> L4Error:
    """A kept file that cannot be read."""
    fix = "restore the file, or begin anew in another folder with `-o`"
    return L4Error(f"cannot use `{path}`", why=why, fix=fix)


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:_SHOWN]
