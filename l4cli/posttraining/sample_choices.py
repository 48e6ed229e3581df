"""Words for what becomes of a teacher's answers; light, for command lines."""

from __future__ import annotations

from enum import StrEnum


class Keep(StrEnum):
    """Which answers become rows; `passed`: those that are whole and no checker refuses."""

    passed = "passed"
    all = "all"


class Reasoning(StrEnum):
    """What becomes of the thoughts that a server keeps apart from the answer."""

    drop = "drop"
    keep = "keep"
