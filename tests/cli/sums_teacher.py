"""A teacher of sums behind a server, and what it is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from l4cli.commands.distill_samples import SamplesRequest


def prompts(folder: Path, num: int = 5) -> Path:
    """Sums, with their answers."""
    path = folder / "prompts.jsonl"
    rows = [{"id": f"sum-{i}", "prompt": f"{i} + {i}?", "answer": 2 * i} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add(body: dict[str, Any]) -> str:
    """Right, but for odd numbers at odd seeds."""
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    number = int(re.findall(r"\d+", text)[0])
    wrong = number % 2 and body["seed"] % 2
    return f"It is {2 * number + (1 if wrong else 0)}."


def ask(folder: Path, url: str, **changes: Any) -> SamplesRequest:
    settings: dict[str, Any] = {
        "prompts": folder / "prompts.jsonl",
        "out": folder / "answers",
        "endpoint": url,
        "model": "reader",
        "max_tries": 1,
        "timeout": 10.0,
    }
    return SamplesRequest(**(settings | changes))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").open()]


def summary_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def cut_bytes(text: str) -> list[bytes]:
    """A server with our own vocabulary: every byte is a token."""
    return [bytes([byte]) for byte in text.encode()]
