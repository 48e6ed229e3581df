"""What tells right answers from wrong ones."""

from __future__ import annotations

import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest

from l4cli.errors import L4Error, UsageError
from l4cli.posttraining.checkers import CommandChecker, last_number, make_checker
from l4cli.posttraining.prompts import Prompt


def prompt(answer: object) -> Prompt:
    messages = [{"role": "user", "content": "?"}]
    return Prompt(1, messages, "?", answer, {"answer": answer}, "`p.jsonl` line 1")


@pytest.mark.parametrize(
    ("kind", "answer", "completion", "passes"),
    [
        ("exact", "Paris", " Paris\n", True),
        ("exact", "Paris", "Paris.", False),
        ("contains", "Paris", "It is Paris, of course.", True),
        ("contains", "Paris", "It is paris.", False),
        ("number", 72, "So 48 + 24 = 72.", True),
        ("number", "48+24=72\n#### 72", "It is \\boxed{72}, not 73.", True),
        ("number", "72", "It is \\boxed{7} or 72, no: \\boxed{\\text{about } 73}", False),
        ("number", "1,250.50", "$1250.5", True),
        ("number", "-3", "x = \u22123", True),
        ("number", "3", "10-3 makes 7", False),
        ("number", "1e3", "1000", True),
        ("number", "5", "none at all", False),
        ("regex", r"^\s*(yes|yep)\b", "yep, it is", True),
        ("regex", r"^\s*(yes|yep)\b", "oh yes", False),
    ],
)
def test_answers_are_compared(kind: str, answer: object, completion: str, passes: bool) -> None:
    row = prompt(answer)
    checker = make_checker(kind, [row])
    assert checker is not None
    assert checker.check(row, completion, {}) is passes


def test_the_last_box_counts_and_braces_may_nest() -> None:
    assert last_number("\\boxed{1} then \\boxed{ \\frac{3}{4} = 0.75 } and 9") == Decimal("0.75")
    assert last_number("1,000,000 and 2.") == Decimal(2)
    assert last_number("") is None


@pytest.mark.parametrize(
    ("kind", "answer", "told"),
    [
        ("exact", None, "has no `answer`"),
        ("contains", " ", "is empty"),
        ("number", "many", "no number"),
        ("regex", "(", "no pattern"),
        ("exact", ["a"], "type list"),
    ],
)
def test_rows_without_what_a_checker_needs_are_named(kind: str, answer: object, told: str) -> None:
    with pytest.raises(L4Error) as caught:
        make_checker(kind, [prompt("1"), prompt(answer)])
    assert "`p.jsonl` line 1" in caught.value.what
    assert told in caught.value.why


def test_unknown_checkers_list_what_exists() -> None:
    with pytest.raises(UsageError) as caught:
        make_checker("exactly", [])
    assert "`contains`" in caught.value.fix
    assert make_checker("none", []) is None


def test_a_program_judges_by_its_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "import json, sys\n"
        "row = json.load(sys.stdin)\n"
        "print('noise'); sys.exit(0 if row['completion'] == row['answer'][::-1] else 3)\n"
    )
    checker = make_checker(f"command:{sys.executable} '{script}'", [])
    assert checker is not None
    assert checker.check(prompt("abc"), "cba", {"answer": "abc"})
    assert not checker.check(prompt("abc"), "abc", {"answer": "abc"})


def test_a_program_that_is_slow_fails_and_is_counted(tmp_path: Path) -> None:
    checker = CommandChecker(f"{sys.executable} -c 'import time; time.sleep(20)'", 0.2)
    began = time.monotonic()
    assert not checker.check(prompt("a"), "a", {})
    assert time.monotonic() - began < 5
    assert checker.num_timeouts == 1


def test_a_program_that_is_absent_is_refused_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        make_checker("command:no-such-program --fast", [])
    assert "no-such-program" in caught.value.why
    with pytest.raises(UsageError):
        make_checker("command:", [])
