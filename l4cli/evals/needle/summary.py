"""What a grid proves: means by task and length, effective lengths, controls, straddled needles.

in: records, options; out: `summary.json`'s object, and whether it is good enough
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from l4cli.evals import effective_length
from l4cli.evals.needle.cells import (
    Outcome,
    collect_cells,
    mean_score,
    outcomes_of,
    score_figures,
)
from l4cli.evals.needle.grid import GridOptions, Role

Key = TypeVar("Key", bound=Hashable)
CONTROLS = (Role.no_needle, Role.closed_book, Role.distractors)


def summarize(
    records: Sequence[dict[str, Any]],
    options: GridOptions,
    hard_variants: dict[str, str],
    *,
    ruler_threshold: float = effective_length.RULER_THRESHOLD,
) -> dict[str, Any]:
    """Everything that follows from the records alone."""
    outcomes = outcomes_of(records)
    tested = [outcome for outcome in outcomes if outcome.role == Role.test]
    by_length = means_by_length(tested)
    summary: dict[str, Any] = {
        "effective_length": _effective(by_length, ruler_threshold),
        "effective_length_by_task": {
            task: _effective(means_by_length(group), ruler_threshold)
            for task, group in grouped(tested, lambda o: o.task).items()
        },
        "means_by_task": {
            task: round(mean_score(group), 6)
            for task, group in grouped(tested, lambda o: o.task).items()
        },
        "means_by_length": {str(length): round(by_length[length], 6) for length in by_length},
        "by_task_and_length": {
            task: {str(n): figures(part) for n, part in grouped(group, lambda o: o.length).items()}
            for task, group in grouped(tested, lambda o: o.task).items()
        },
        "straddled": straddled_figures(tested),
        "cells": [cell.as_event() for cell in collect_cells(tested)],
        "controls": controls(outcomes, options, hard_variants),
    }
    if recall := sparse_recall(records):
        summary["sparse_recall"] = recall
    if by_length:
        rising, falling = effective_length.weighted_averages(by_length)
        summary["weighted_average"] = {
            "increasing": round(rising, 6),
            "decreasing": round(falling, 6),
        }
    return summary


def sparse_recall(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By length, the mean share of exact attention that sparse reading held, and the least."""
    found: dict[str, list[float]] = {}
    for record in records:
        if "sparse_recall" in record and record["role"] == Role.test:
            found.setdefault(str(record["length"]), []).extend(record["sparse_recall"].values())
    return {n: {"mean": sum(v) / len(v), "least": min(v)} for n, v in found.items()}


def means_by_length(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """The mean over tasks of each task's mean, by length: every task counts the same."""
    means = {}
    for length, group in sorted(grouped(outcomes, lambda o: o.length).items()):
        tasks = [mean_score(part) for part in grouped(group, lambda o: o.task).values()]
        means[length] = sum(tasks) / len(tasks)
    return means


def controls(
    outcomes: Sequence[Outcome], options: GridOptions, hard_variants: dict[str, str]
) -> dict[str, Any]:
    """What was scored where nothing, or something else, was to be found; by length."""
    found: dict[str, Any] = {}
    for role in CONTROLS:
        own = [outcome for outcome in outcomes if outcome.role == role]
        group = list(own)
        if role is Role.distractors:  # those that were tested as a task of their own count too
            hard = {hard_variants[task] for task in options.tasks if task in hard_variants}
            group += [o for o in outcomes if o.role == Role.test and o.task in hard]
        if not group:
            continue
        lengths = grouped(group, lambda o: o.length)
        found[role.value] = {
            **figures(group),
            "by_length": {str(n): figures(part) for n, part in sorted(lengths.items())},
        }
        if role is Role.distractors:
            found[role.value]["tasks"] = sorted({outcome.task for outcome in group})
            found[role.value]["cells"] = [cell.as_event() for cell in collect_cells(own)]
        if role is Role.closed_book:  # no text, no length
            del found[role.value]["by_length"]
    return found


def straddled_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Needles that lie across a border of chunks, apart from those that do not."""
    apart = [outcome for outcome in outcomes if outcome.is_straddled]
    whole = [outcome for outcome in outcomes if outcome.is_straddled is False]
    return {
        "num_straddled": len(apart),
        "num_straddled_correct": sum(outcome.is_correct for outcome in apart),
        "num_whole": len(whole),
        "num_whole_correct": sum(outcome.is_correct for outcome in whole),
    }


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, mean score and its interval."""
    return {
        "num_correct": sum(outcome.is_correct for outcome in outcomes),
        "num_samples": len(outcomes),
        **score_figures(outcomes),
    }


def grouped(outcomes: Iterable[Outcome], key: Callable[[Outcome], Key]) -> dict[Key, list[Outcome]]:
    """Outcomes by a key, in order of appearance."""
    groups: dict[Key, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    return groups


def _effective(by_length: dict[int, float], ruler_threshold: float) -> dict[str, Any]:
    if not by_length:
        return {}
    found = effective_length.nolima(by_length)
    return {
        "ruler": effective_length.ruler_effective_length(by_length, ruler_threshold),
        "ruler_threshold": ruler_threshold,
        "nolima": found.effective_length,
        "nolima_base_score": round(found.base_score, 6),
        "nolima_threshold": round(found.threshold, 6),
    }
