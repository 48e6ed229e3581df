"""Gather the tests of `long_context.sh`: tables, curves and the figures others read.

in: the folder that holds tests/NAME/; out: tables.md, easy.png, hard.png, summary.json in it

Needles that lie across a border of chunks are counted apart, but for the model with two layers
that see everything, which can read them. Means over seeds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from l4cli.evals.curves import Axes, Curve, draw_curves
from l4cli.evals.intervals import wilson

EASY, HARD = "single", "multi-key-full"
TRAIN_SEQ_LEN = 512
LEARNED = 0.9  # of the control, at the length it was trained on
# Key in the summary -> beginning of the tests' names (a seed may follow), and what was asked.
FIGURES = {
    "irope": ("irope-*", EASY),
    "irope_two_nope": ("two-nope", EASY),
    "irope_ssmax": ("ssmax", EASY),
    "irope_hard": ("irope-*", HARD),
    "irope_hard_temperature": ("irope-*-temperature-0.3", HARD),
    "irope_extended": ("irope-*-extended", EASY),
    "irope_hard_extended": ("irope-*-extended-temperature-0.3", HARD),
    "irope_hard_extended_no_temperature": ("irope-*-extended", HARD),
    "irope_two_nope_hard": ("two-nope", HARD),
    "irope_two_nope_extended": ("two-nope-extended", EASY),
    "irope_two_nope_hard_extended": ("two-nope-extended", HARD),
    "irope_ssmax_hard": ("ssmax", HARD),
    "irope_ssmax_hard_extended": ("ssmax-extended", HARD),
    "control": ("control", EASY),
    "control_pi": ("control-pi", EASY),
    "control_ntk": ("control-ntk", EASY),
    "control_yarn": ("control-yarn", EASY),
    "control_hard": ("control", HARD),
    "control_yarn_extended": ("control-yarn-extended", EASY),
    "control_yarn_hard_extended": ("control-yarn-extended", HARD),
    "irope_extended_far": ("far", EASY),
    "irope_extended_far_temperature": ("far-temperature-0.3", EASY),
    "irope_hard_extended_far": ("far", HARD),
    "irope_hard_extended_far_temperature": ("far-temperature-0.3", HARD),
}
CURVES = {
    "easy.png": {
        "iRoPE": "irope",
        "iRoPE, two NoPE layers": "irope_two_nope",
        "RoPE everywhere": "control",
        "RoPE, PI": "control_pi",
        "RoPE, NTK": "control_ntk",
        "RoPE, YaRN": "control_yarn",
    },
    "hard.png": {
        "iRoPE": "irope_hard",
        "iRoPE, temperature 0.3": "irope_hard_temperature",
        "iRoPE extended": "irope_hard_extended_no_temperature",
        "iRoPE extended, temperature 0.3": "irope_hard_extended",
        "Scalable-Softmax extended": "irope_ssmax_hard_extended",
        "RoPE with YaRN extended": "control_yarn_hard_extended",
    },
}


@dataclass
class Count:
    """Answers right, of how many."""

    num_correct: int = 0
    num_samples: int = 0

    def add(self, is_correct: bool) -> None:
        self.num_correct += is_correct
        self.num_samples += 1

    @property
    def share(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.num_correct, self.num_samples)


@dataclass
class Answers:
    """Answers by length: of needles within a chunk, and of those across a border."""

    whole: dict[int, Count]
    straddled: dict[int, Count]

    def counted(self, with_straddled: bool) -> dict[int, Count]:
        """What the figures are of."""
        if not with_straddled:
            return self.whole
        joined = {n: Count(c.num_correct, c.num_samples) for n, c in self.whole.items()}
        for length, count in self.straddled.items():
            joined[length].num_correct += count.num_correct
            joined[length].num_samples += count.num_samples
        return joined


def read(folder: Path, task: str) -> Answers:
    """Count the answers of one test."""
    found = Answers(defaultdict(Count), defaultdict(Count))
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("role") != "test" or record["task"] != task:
            continue
        for answer in record["answers"]:
            counts = found.straddled if answer["straddled"] else found.whole
            counts[record["length"]].add(answer["score"] == 1.0)
    return found


def tests_of(folder: Path, pattern: str) -> list[Path]:
    """The folders of a test, one a seed: `*` stands for the seed's number alone."""
    before, star, after = pattern.partition("*")
    if not star:
        return [folder / pattern] if (folder / pattern).is_dir() else []
    names = re.compile(re.escape(before) + r"\d+" + re.escape(after))
    return [path for path in sorted(folder.iterdir()) if names.fullmatch(path.name)]


def joined(parts: list[dict[int, Count]]) -> dict[int, Count]:
    """The answers of all seeds together; every seed was asked as often, so this is their mean."""
    total: dict[int, Count] = defaultdict(Count)
    for part in parts:
        for length, count in part.items():
            total[length].num_correct += count.num_correct
            total[length].num_samples += count.num_samples
    return dict(sorted(total.items()))


def table(title: str, rows: dict[str, dict[int, Count]]) -> str:
    """A Markdown table of shares with 95% intervals."""
    lengths = sorted({length for row in rows.values() for length in row})
    lines = [f"## {title}", "", "| | " + " | ".join(f"{n:,}" for n in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name, row in rows.items():
        cells = []
        for length in lengths:
            count = row.get(length)
            if count is None:
                cells.append("")
                continue
            low, high = count.interval
            cells.append(f"{count.share:.2f} [{low:.2f}, {high:.2f}] of {count.num_samples}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write what the tests found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    figures: dict[str, dict[int, Count]] = {}
    straddled: dict[str, dict[int, Count]] = {}
    for key, (pattern, task) in FIGURES.items():
        answers = [read(test, task) for test in tests_of(folder / "tests", pattern)]
        if answers:
            is_two_nope = pattern.startswith("two-nope")
            figures[key] = joined([part.counted(is_two_nope) for part in answers])
            straddled[key] = joined([part.straddled for part in answers])
    summary: dict[str, object] = {"train_seq_len": TRAIN_SEQ_LEN}
    for key, counts in figures.items():
        summary[key] = {str(n): round(count.share, 4) for n, count in counts.items()}
    summary["control_learned"] = figures["control"][TRAIN_SEQ_LEN].share >= LEARNED
    summary["intervals"] = {
        key: {str(n): [round(x, 4) for x in count.interval] for n, count in counts.items()}
        for key, counts in figures.items()
    }
    summary["straddled"] = {
        key: {str(n): [count.num_correct, count.num_samples] for n, count in counts.items()}
        for key, counts in straddled.items()
    }
    strengths = {}
    for test in sorted((folder / "tests").glob("irope-0-extended*")):
        strength = test.name.rpartition("temperature-")[2] if "temperature" in test.name else "0"
        strengths[strength] = {
            name: {str(n): round(c.share, 4) for n, c in read(test, task).whole.items()}
            for name, task in (("easy", EASY), ("hard", HARD))
        }
    summary["temperature_of_seed_0"] = strengths
    text = json.dumps(summary, indent=1) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    easy = {key: counts for key, counts in figures.items() if FIGURES[key][1] == EASY}
    hard = {key: counts for key, counts in figures.items() if FIGURES[key][1] == HARD}
    apart = {key: counts for key, counts in straddled.items() if counts and key in easy}
    tables = [
        table("Easy: needles in text", easy),
        table("Hard: the whole text confusable needles", hard),
        table("Easy needles across a border of chunks, counted apart", apart),
    ]
    (folder / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    print("\n".join(tables))
    for name, series in CURVES.items():
        curves = [
            Curve(
                label,
                tuple(figures[key]),
                tuple(count.share for count in figures[key].values()),
                tuple(count.interval for count in figures[key].values()),
            )
            for label, key in series.items()
            if key in figures
        ]
        kind = "in text" if name == "easy.png" else "among confusable needles"
        title = f"Needles {kind}: trained on {TRAIN_SEQ_LEN} tokens"
        caption = "Share of exact answers with 95% Wilson intervals. `sh examples/long_context.sh`"
        draw_curves(
            curves,
            folder / name,
            title=title,
            caption=caption,
            axes=Axes(train_length=TRAIN_SEQ_LEN),
        )


if __name__ == "__main__":
    main()
