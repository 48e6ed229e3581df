"""The quickstart's parts in miniature: the same pictures again, and marks worked out by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import ask
import corpus
import draw
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_same_seed_draws_the_same_picture() -> None:
    first, again = (draw.draw_scene(random.Random(3), draw.pairs_of("all")) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.description() == again.description()


def test_training_never_shows_the_pairs_of_the_exam(tmp_path: Path) -> None:
    draw.write_pictures(tmp_path / "seen", 40, draw.pairs_of("seen"), seed=1)
    truths = [json.loads(x) for x in (tmp_path / "seen" / "truth.jsonl").read_text().splitlines()]
    assert len(truths) == 40
    assert not any(truth["is_unseen_pair"] for truth in truths)
    assert {draw.pairs_of("unseen")[0]} <= set(draw.UNSEEN)
    assert len(draw.pairs_of("seen")) + len(draw.UNSEEN) == len(draw.pairs_of("all"))


def test_boxes_hold_the_shape_and_nothing_else() -> None:
    """A plain background: what differs from it is the shape."""
    for seed in range(20):
        scene = draw.draw_scene(random.Random(seed), draw.pairs_of("all"))
        left, top, right, bottom = scene.box
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 100
        column = min(2, (left + right) // 2 * 3 // 100)
        row = min(2, (top + bottom) // 2 * 3 // 100)
        # A triangle's box is not centred on the shape's centre; a neighbour may be meant.
        names = {draw.place_name(r, column) for r in (row, max(0, row - 1), min(2, row + 1))}
        assert scene.place in names


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("[0 0 50 50]", 1.0),
        ("[25 0 75 50]", 1 / 3),
        ("[50 50 100 100]", 0.0),
        ("The box is [0 0 50 100].", 0.5),
        ("no box", 0.0),
        ("[50 50 0 0]", 0.0),
    ],
)
def test_overlap_by_hand(answer: str, wanted: float) -> None:
    assert ask.overlap(answer, "[0 0 50 50]") == pytest.approx(wanted)


def test_questions_share_their_beginning() -> None:
    prompts = [ask.np.array(x) for x in ([1, 2, 3, 9], [1, 2, 4], [1, 2, 3])]
    assert ask._common_length(prompts) == 2
    assert ask._common_length([prompts[0], prompts[0]]) == 4


def test_held_out_documents_are_chosen_by_name_alone() -> None:
    names = [f"module{i}.py" for i in range(2000)]
    share = sum(corpus.is_held_out(name) for name in names) / len(names)
    assert 0.01 < share < 0.05


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda p: p.name)
def test_examples_are_valid_shell(path: Path) -> None:
    subprocess.run(["sh", "-n", str(path)], check=True)


def test_the_report_of_distilling_says_what_the_runs_say(tmp_path: Path) -> None:
    """Figures made up: dynamic best for the MoE, and no gain at all for the dense student."""
    gains = {"hard": 0.0, "hard-teacher": -0.2, "soft": 0.1, "schedule": 0.05, "dynamic": 0.12}
    for seed in range(3):
        for student, scale in (("moe", 1.0), ("dense", 0.0)):
            for way, gain in gains.items():
                if seed == 0 or way in ("hard", "soft", "dynamic"):
                    bits = 1.9 - scale * gain + 0.001 * seed
                    made_up_run(tmp_path / f"seed-{seed}" / f"{student}-{way}", bits)
    made_up_run(tmp_path / "teacher", 1.25)
    for run, speed in (("moe", 1000.0), ("dense", 1000.0), ("both/moe", 800.0)):
        made_up_run(tmp_path / "cost" / run, 1.9, speed)
    command = [sys.executable, str(EXAMPLES / "distill" / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"moe", "dense"}
    assert set(summary["moe"]) == {"hard", "soft", "dynamic"}
    assert summary["moe"]["dynamic"] == pytest.approx([1.78, 1.781, 1.782])
    assert "moe: dynamic targets give +6.31% fewer bits than hard ones, every seed" in done.stdout
    assert "dense: dynamic targets give +0.00% fewer bits than hard ones, seeds overlap" in (
        done.stdout
    )
    assert "dynamic is -0.0200 bits beside constant, within the spread of 3 seeds" in done.stdout
    assert "both in one run 0.256 s, 38% less than apart" in done.stdout
    for name in ("moe.png", "dense.png", "weights.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def made_up_run(folder: Path, bits: float, speed: float = 1000.0) -> None:
    folder.mkdir(parents=True)
    lines = []
    for step in (10, 20, 30):
        figures = {"num_tokens": step * 2048 // 10, "tok_per_sec": speed, "soft_weight": 0.5}
        lines.append({"event": "step", "step": step, **figures})
        lines.append({"event": "eval", "step": step, "bits_per_byte": bits + 0.03 - step / 1000})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
