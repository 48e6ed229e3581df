"""Questions that a model writes about passages, kept when only the passage answers them.

in: passages, a model to ask; out: pairs in a JSONL file that is gone on with after a stop

Each pair is checked by the same model twice: with the passage it must give the answer, without
it must not. Answers are compared as words, without case, punctuation and articles.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from l4cli.data.longcontext.passages import Pair, Passage
from l4cli.errors import L4Error

GROUP = 16  # passages at a time; a stop loses no more than these
WRITE_TOKENS, ANSWER_TOKENS = 96, 32
KEPT, UNREADABLE, UNANSWERED, KNOWN = "kept", "unreadable", "not answered with it", "known without"
MAX_ANSWER_WORDS = 8


class Asker(Protocol):
    """A model that continues or answers prompts."""

    def ask(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Answer every prompt, in order."""


def write_questions(
    passages: Sequence[Passage],
    asker: Asker,
    file: Path,
    on_progress: Callable[[int, Counter[str]], None] = lambda done, counts: None,
) -> tuple[list[Pair], Counter[str]]:
    """Ask about every passage that the file does not tell of yet; give what is kept, and counts.

    raises: L4Error when the file belongs to other passages
    """
    records = _read(file)
    for record in records:
        number = record["passage"]
        if number >= len(passages) or record["text"] != passages[number].text:
            raise L4Error(
                f"cannot go on with `{file}`",
                why=f"its line {number + 1} is about another passage than this run's",
                fix="remove it, or choose another folder with `-o`",
            )
    missing = passages[len(records) :]
    counts = Counter(record["outcome"] for record in records)
    for start in range(0, len(missing), GROUP):
        group = missing[start : start + GROUP]
        found = _ask_about(group, asker)
        _append(file, found)
        records += found
        counts.update(record["outcome"] for record in found)
        on_progress(len(records), counts)
    pairs = [
        Pair(record["passage"], record["question"], record["answer"])
        for record in records
        if record["outcome"] == KEPT
    ]
    return pairs, counts


def _ask_about(passages: Sequence[Passage], asker: Asker) -> list[dict[str, Any]]:
    """Write one question a passage, then check those that can be read."""
    written = asker.ask([write_prompt(p.text) for p in passages], WRITE_TOKENS)
    records: list[dict[str, Any]] = []
    for passage, text in zip(passages, written, strict=True):
        record: dict[str, Any] = {
            "passage": passage.number,
            "outcome": UNREADABLE,
            "text": passage.text,
        }
        pair = parse_pair(text)
        if pair is None:
            record["written"] = text
        else:
            record["question"], record["answer"] = pair
        records.append(record)
    asked = [record for record in records if "question" in record]
    _check(asked, asker, "with", lambda r: answer_prompt(r["question"], r["text"]))
    for record in asked:
        is_right = same_answer(record["with"], record["answer"])
        record["outcome"] = KEPT if is_right else UNANSWERED
    right = [record for record in asked if record["outcome"] == KEPT]
    _check(right, asker, "without", lambda r: answer_prompt(r["question"], None))
    for record in right:
        if same_answer(record["without"], record["answer"]):
            record["outcome"] = KNOWN
    return records


def _check(
    records: Sequence[dict[str, Any]],
    asker: Asker,
    name: str,
    prompt: Callable[[dict[str, Any]], str],
) -> None:
    if records:
        answers = asker.ask([prompt(record) for record in records], ANSWER_TOKENS)
        for record, answer in zip(records, answers, strict=True):
            record[name] = first_line(answer)


def write_prompt(passage: str) -> str:
    """Ask for a question and its answer."""
    return (
        f"Passage:\n{passage}\n\n"
        "Write one question about a fact that only this passage tells, in words that make sense "
        "without it, and a short answer copied from it. Write two lines and nothing else.\n"
        "Question: ...\nAnswer: ...\n\nQuestion:"
    )


def answer_prompt(question: str, passage: str | None) -> str:
    """Ask for the answer, with the passage or without."""
    given = "" if passage is None else f"Passage:\n{passage}\n\n"
    return (
        f"{given}Answer in as few words as you can, and with nothing else.\n"
        f"Question: {question}\nAnswer:"
    )


def parse_pair(text: str) -> tuple[str, str] | None:
    """Read the two lines; a model that continues has its first word in the prompt already."""
    found = re.search(
        r"^\s*(?:Question:)?[ \t]*(\S[^\n]*)\n+\s*Answer:[ \t]*(\S[^\n]*)", text, re.IGNORECASE
    )
    if found is None:
        return None
    question, answer = found[1].strip(), found[2].strip()
    if not plain(answer) or not plain(question) or len(answer.split()) > MAX_ANSWER_WORDS:
        return None
    return question, answer


def first_line(text: str) -> str:
    """What was said first, without a repeated `Answer:`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^answer:\s*", "", lines[0], flags=re.IGNORECASE) if lines else ""


def plain(text: str) -> str:
    """Words alone: no case, punctuation, articles or spare blanks."""
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def same_answer(said: str, answer: str) -> bool:
    """Whether two answers are the same words."""
    return plain(said) == plain(answer) != ""


def _read(file: Path) -> list[dict[str, Any]]:
    """Read what is whole; a last line that was cut off is taken off the file."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
    try:
        records = [json.loads(line) for line in data[:whole].splitlines()]
        assert all(record["passage"] == i for i, record in enumerate(records))
    except (ValueError, KeyError, TypeError, AssertionError):
        fix = "remove it; its questions are written again"
        raise L4Error(f"cannot read `{file}`", why="a line is damaged", fix=fix) from None
    return records


def _append(file: Path, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
