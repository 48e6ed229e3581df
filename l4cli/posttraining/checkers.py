"""Tell right completions from wrong ones: by the row's answer, by a pattern, or by a program.

in: a prompt and a completion; out: passed or not
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from l4cli.errors import L4Error, UsageError
from l4cli.posttraining.prompts import Prompt

COMMAND = "command:"
KINDS = ("none", "exact", "contains", "number", "regex", f"{COMMAND}PROGRAM")
_BOXED = re.compile(r"\\boxed\s*\{")
_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


class Checker(Protocol):
    """Judges completions; several threads may ask at once."""

    def check(self, prompt: Prompt, completion: str, row: dict[str, Any]) -> bool: ...


def make_checker(
    words: str, prompts: Sequence[Prompt], *, timeout_s: float = 30.0
) -> Checker | None:
    """What `--checker` names, None for `none`; every row is seen to have what it needs.

    raises: UsageError for unknown words, L4Error for a row or a program that will not do
    """
    if words == "none":
        return None
    if words.startswith(COMMAND):
        return CommandChecker(words.removeprefix(COMMAND), timeout_s)
    if words not in _COMPARISONS:
        fix = "choose from " + ", ".join(f"`{kind}`" for kind in KINDS)
        raise UsageError(f"cannot check with `{words}`", why="there is no such checker", fix=fix)
    return AnswerChecker(words, prompts)


class AnswerChecker:
    """Compares a completion with the `answer` of its row."""

    def __init__(self, kind: str, prompts: Sequence[Prompt]) -> None:
        self._compare = _COMPARISONS[kind]
        for prompt in prompts:
            why = _problem(kind, prompt.answer)
            if why is not None:
                what = f"cannot check the answers to {prompt.place} with `--checker {kind}`"
                fix = "give the row an `answer` of this kind, or use another checker"
                raise L4Error(what, why=why, fix=fix)

    def check(self, prompt: Prompt, completion: str, row: dict[str, Any]) -> bool:
        del row
        return self._compare(completion, str(prompt.answer))


class CommandChecker:
    """Runs a program for each completion, the row as JSON on its stdin; exit code 0 passes."""

    def __init__(self, command: str, timeout_s: float) -> None:
        what = f"cannot check with `{COMMAND}{command}`"
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            why = str(error).lower()
            raise UsageError(what, why=why, fix="close the quotes") from error
        if not self.words or shutil.which(self.words[0]) is None:
            why = f"there is no program `{self.words[0] if self.words else ''}` that can be run"
            fix = f"name one like `--checker '{COMMAND}python3 check.py'`"
            raise UsageError(what, why=why, fix=fix)
        self.timeout_s = timeout_s
        self.num_timeouts = 0
        self._lock = threading.Lock()

    def check(self, prompt: Prompt, completion: str, row: dict[str, Any]) -> bool:
        """raises: L4Error when the program cannot be run at all"""
        del prompt
        text = json.dumps({**row, "completion": completion}, ensure_ascii=False)
        try:
            done = subprocess.run(
                self.words,
                input=text.encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=self.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            with self._lock:
                self.num_timeouts += 1
            return False
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            what = f"cannot run the checker `{self.words[0]}`"
            raise L4Error(what, why=why, fix="make it a program that can be run") from error
        return done.returncode == 0


def last_number(text: str) -> Decimal | None:
    """The number in the last `\\boxed{}`, else the last one in the text."""
    boxes = [_inside(text, match.end()) for match in _BOXED.finditer(text)]
    for part in [*boxes[-1:], text]:
        found = _NUMBER.findall(part)
        if found:
            try:
                return Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
            except InvalidOperation:
                return None
    return None


def _inside(text: str, start: int) -> str:
    """What stands between a brace that opens before `start` and the one that closes it."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text[start:]


def _problem(kind: str, answer: Any) -> str | None:
    """Why an answer will not do."""
    if answer is None:
        return "the row has no `answer`"
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return f"its `answer` is of type {type(answer).__name__}, not a text or a number"
    if not str(answer).strip():
        return "its `answer` is empty"
    if kind == "number" and last_number(str(answer)) is None:
        return f"there is no number in its `answer` `{str(answer)[:60]}`"
    if kind == "regex":
        try:
            re.compile(str(answer))
        except re.error as error:
            return f"its `answer` is no pattern: {error}"
    return None


def _same_number(completion: str, answer: str) -> bool:
    return last_number(completion) == last_number(answer)


_COMPARISONS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda completion, answer: completion.strip() == answer.strip(),
    "contains": lambda completion, answer: answer.strip() in completion,
    "number": _same_number,
    "regex": lambda completion, answer: re.search(answer, completion) is not None,
}
