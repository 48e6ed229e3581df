"""Gather the runs of `distill.sh`: the table, the curves and the figures others read.

in: the folder that holds seed-N/STUDENT-WAY/; out: table.md, STUDENT.png, weights.png, summary.json

Bits per byte on held-out text, at equal tokens. A spread is the largest seed less the smallest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from l4cli.evals.curves import Axes, Curve, draw_curves

STUDENTS = ("moe", "dense")
# Way -> what the table says of it.
WAYS = {
    "hard": "hard targets from the data",
    "hard-teacher": "hard targets from the teacher",
    "soft": "constant share of soft targets",
    "schedule": "hard first, soft later",
    "dynamic": "share by token, by the teacher's lead",
}
MAIN = ("hard", "soft", "dynamic")  # run with all seeds


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in a run's metrics."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def final(run: Path) -> float:
    """Held-out bits per byte at the end."""
    return float(events(run, "eval")[-1]["bits_per_byte"])


def gather(work: Path) -> dict[str, dict[str, list[float]]]:
    """Student -> way -> bits per byte, one a seed."""
    seeds = sorted(work.glob("seed-*"))
    return {
        student: {
            way: [final(seed / f"{student}-{way}") for seed in seeds if holds(seed, student, way)]
            for way in WAYS
        }
        for student in STUDENTS
    }


def holds(seed: Path, student: str, way: str) -> bool:
    """Whether a way was run with this seed."""
    return (seed / f"{student}-{way}" / "metrics.jsonl").exists()


def table(found: dict[str, dict[str, list[float]]], teacher: float) -> list[str]:
    """Markdown: a row a way, means over seeds and spreads."""
    lines = ["| targets | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for way, words in WAYS.items():
        cells = []
        for ways in found.values():
            values = ways[way]
            spread = f" (spread {max(values) - min(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.4f}{spread}")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return [*lines, "", f"Held-out bits per byte; the teacher's own are {teacher:.4f}."]


def verdicts(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """What the figures say of the two claims, whichever way they fall."""
    lines = []
    for student, ways in found.items():
        hard, soft, dynamic = (ways[way] for way in MAIN)
        for name, values in (("constant soft", soft), ("dynamic", dynamic)):
            gain = 1 - mean(values) / mean(hard)
            beyond = "seeds overlap"
            if max(values) < min(hard):
                beyond = "every seed better than the best hard one"
            lines.append(
                f"{student}: {name} targets give {gain:+.2%} fewer bits than hard ones, {beyond}"
            )
        difference = mean(dynamic) - mean(soft)
        spread = max(max(v) - min(v) for v in (soft, dynamic))
        verdict = "within" if difference <= spread else "worse than"
        lines.append(
            f"{student}: dynamic is {difference:+.4f} bits beside constant, "
            f"{verdict} the spread of {len(soft)} seeds ({spread:.4f})"
        )
    return lines


def costs(work: Path) -> list[str]:
    """Seconds a step of one student and of two in a run, from the middle of short runs."""
    names = ("moe", "dense", "both")
    seconds = {}
    for name in names:
        run = work / "cost" / name
        first = run if (run / "metrics.jsonl").exists() else run / "moe"
        steps = events(first, "step")[1:]
        tokens = steps[-1]["num_tokens"] / steps[-1]["step"]
        seconds[name] = tokens / sorted(s["tok_per_sec"] for s in steps)[len(steps) // 2]
    apart = seconds["moe"] + seconds["dense"]
    return [
        f"a step of one student and the teacher: moe {seconds['moe']:.3f} s, dense "
        f"{seconds['dense']:.3f} s; of both in one run {seconds['both']:.3f} s, "
        f"{1 - seconds['both'] / apart:.0%} less than apart"
    ]


def draw(work: Path, teacher: float) -> None:
    """Held-out bits per byte by tokens, a picture a student; the shares of soft targets."""
    seed = work / "seed-0"
    for student in STUDENTS:
        curves = []
        for way, words in WAYS.items():
            run = seed / f"{student}-{way}"
            measured = events(run, "eval")
            tokens = {e["step"]: e["num_tokens"] for e in events(run, "step")}
            points = [(tokens[e["step"]], e["bits_per_byte"]) for e in measured]
            curves.append(Curve(words, *zip(*points, strict=True)))
        draw_curves(
            curves,
            work / f"{student}.png",
            title=f"{student} student: held-out bits per byte",
            caption=f"seed 0, equal tokens; the teacher's own bits per byte: {teacher:.3f}",
            axes=Axes(y_title="bits per byte", x_title="tokens", is_share=False),
        )
    shares = []
    for student in STUDENTS:
        for way in ("soft", "schedule", "dynamic"):
            steps = events(seed / f"{student}-{way}", "step")
            points = [(e["num_tokens"], e["soft_weight"]) for e in steps]
            shares.append(Curve(f"{student}, {WAYS[way]}", *zip(*points, strict=True)))
    draw_curves(
        shares,
        work / "weights.png",
        title="share of the soft targets in the loss",
        caption="seed 0; means over the tokens of the steps between two lines",
        axes=Axes(y_title="share (%)", x_title="tokens"),
    )


def main() -> None:
    """Write everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the runs")
    work = parser.parse_args().work
    teacher = final(work / "teacher")
    found = gather(work)
    lines = [*table(found, teacher), "", *verdicts(found), *costs(work)]
    (work / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(work, teacher)
    summary = {s: {way: ways[way] for way in MAIN} for s, ways in found.items()}
    (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
