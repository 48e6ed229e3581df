"""From paid answers to rows to learn from: reasoning kept or dropped, checked, deduplicated.

in: prompts and records of answers; out: rows in the order of the prompts, and counts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from l4cli.posttraining.checkers import Checker
from l4cli.posttraining.prompts import Prompt
from l4cli.posttraining.sample_choices import Keep, Reasoning

# Why a server stops before an answer is whole; what it calls anything else is its own affair.
_CUT = ("length", "context", "content_filter", "tool_calls", "function_call")
_PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class Selection:
    """How rows are chosen from answers, and written."""

    keep: Keep = Keep.passed
    reasoning: Reasoning = Reasoning.drop
    num_samples: int = 1  # of a prompt
    teacher: str = ""


@dataclass
class Counts:
    """What became of all answers."""

    num_prompts: int = 0
    num_asked: int = 0
    num_refused: int = 0  # by the server, or too long for the model
    num_answered: int = 0
    num_empty: int = 0  # or no valid text
    num_cut: int = 0
    num_checked: int = 0
    num_passed: int = 0
    num_duplicates: int = 0
    num_kept: int = 0
    pass_rates: dict[str, float] = field(default_factory=dict)  # by prompt id


@dataclass(frozen=True)
class Kept:
    """A row that is kept, and the record it comes from."""

    row: dict[str, Any]
    record: dict[str, Any]


def select(
    answers: Iterable[tuple[Prompt, list[dict[str, Any]]]],
    checker: Checker | None,
    selection: Selection,
    counts: Counts,
    num_jobs: int = 1,
) -> Iterator[Kept]:
    """Give the rows of all prompts in order; `counts` are filled on the way."""
    with ThreadPoolExecutor(num_jobs) as pool:
        for group in _grouped(answers):
            work = [
                (prompt, row_of(prompt, record, selection), record)
                for prompt, records in group
                for record in records
                if "error" not in record
            ]

            def judge(item: tuple[Prompt, dict[str, Any], dict[str, Any]]) -> bool | None:
                prompt, row, record = item
                return _checked(prompt, row, record, checker)

            verdicts = iter(pool.map(judge, work))
            rows = iter(work)
            for prompt, records in group:
                counts.num_prompts += 1
                counts.num_asked += selection.num_samples
                counts.num_refused += sum("error" in record for record in records)
                mine = [next(rows)[1:] for record in records if "error" not in record]
                judged = [(row, record, next(verdicts)) for row, record in mine]
                yield from _of_prompt(prompt, judged, selection, counts)


def _of_prompt(
    prompt: Prompt,
    judged: list[tuple[dict[str, Any], dict[str, Any], bool | None]],
    selection: Selection,
    counts: Counts,
) -> Iterator[Kept]:
    seen: set[str] = set()
    num_passed = num_checked = 0
    for row, record, checked in judged:
        counts.num_answered += 1
        row["checked"] = checked
        num_checked += checked is not None
        num_passed += checked is True
        is_empty, is_cut = _is_empty(record), record["finish"] in _CUT
        counts.num_empty += is_empty
        counts.num_cut += is_cut
        if is_empty or (selection.keep is Keep.passed and (is_cut or checked is False)):
            continue
        text = row["messages"][-1]["content"]
        if text in seen:
            counts.num_duplicates += 1
            continue
        seen.add(text)
        counts.num_kept += 1
        yield Kept(row, record)
    counts.num_checked += num_checked
    counts.num_passed += num_passed
    if num_checked:
        counts.pass_rates[str(prompt.id)] = num_passed / num_checked


def row_of(prompt: Prompt, record: Mapping[str, Any], selection: Selection) -> dict[str, Any]:
    """An answer as a row: a chat that `l4 tokenize` and `l4 sft` read."""
    content, reasoning = record["content"], record.get("reasoning")
    if reasoning and selection.reasoning is Reasoning.keep:
        content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    row = {
        "id": prompt.id,
        "sample": record["sample"],
        "messages": [*prompt.messages, {"role": "assistant", "content": content}],
        "finish": record["finish"],
        "num_tokens": record["num_tokens"],
        "checked": None,
        "teacher": selection.teacher,
    }
    return {**row, **({"reasoning": reasoning} if reasoning else {}), **prompt.carried}


def _checked(
    prompt: Prompt, row: dict[str, Any], record: Mapping[str, Any], checker: Checker | None
) -> bool | None:
    """Whether an answer passed; what is cut off or empty did not, whatever it says."""
    if checker is None:
        return None
    if record["finish"] in _CUT or _is_empty(record):
        return False
    return checker.check(prompt, record["content"], row)


def _is_empty(record: Mapping[str, Any]) -> bool:
    """Whether there is nothing to learn: no answer, or half a character that is no text."""
    try:
        (record["content"] + (record.get("reasoning") or "")).encode()
    except UnicodeEncodeError:
        return True
    return not record["content"].strip()


def _grouped(
    answers: Iterable[tuple[Prompt, list[dict[str, Any]]]],
) -> Iterator[list[tuple[Prompt, list[dict[str, Any]]]]]:
    group = []
    for item in answers:
        group.append(item)
        if len(group) == _PROMPTS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
