"""`l4 distill --write-cache` and `--teacher-cache`: written once, as good as the teacher itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_distill import distill, tiny
from tiny_pretrain import metrics_of, only_error, pack_shards, weights_of

from l4cli.cli import main


@pytest.fixture(scope="session")
def cache(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the teacher predicts on `text/`, in few entries a token."""
    folder = tmp_path_factory.mktemp("cached") / "cache"
    words = ["--teacher", str(teacher), "--top-k", "7", "--tail-samples", "8", "-q"]
    assert main(["distill", str(data / "text"), *words, "--write-cache", str(folder)]) == 0
    return folder


def test_a_student_of_the_cache_ends_where_one_of_the_teacher_does(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    """Within 0.01 nats on held-out text, at equal tokens; by token and with temperature 1."""
    found = []
    for name, source in (("online", ["--teacher", str(teacher)]), ("cached", [])):
        words = source or ["--teacher-cache", str(cache)]
        for share in ("1", "token:0.9"):
            out = tmp_path / f"{name}-{share}"
            rest = ["--steps", "60", "--lr", "0.01", "--eval-data", str(data / "held"), "-q"]
            assert distill(data, out, *words, *tiny(data, f"alpha={share}"), *rest) == 0
            found.append(metrics_of(out)[-1]["eval_loss"])
    assert found[0] < 2.5  # it learned something: log 320 is 5.8
    assert found[2] == pytest.approx(found[0], abs=0.01)
    assert found[3] == pytest.approx(found[1], abs=0.01)
    # Not by chance of both being the same road.
    assert weights_of(tmp_path / "online-1") != weights_of(tmp_path / "cached-1")


def test_any_layout_reads_the_same(data: Path, cache: Path, tmp_path: Path) -> None:
    """Keyed by row and token: micro-batches and other shards beside them change nothing."""
    words = ["--teacher-cache", str(cache), *tiny(data, "alpha=0.9"), "--steps", "3", "-q"]
    losses = []
    for size in ("1", "4"):
        out = tmp_path / size
        assert distill(data, out, *words, "--micro-batch-size", size, "--log-every", "1") == 0
        losses.append([event["soft_loss"] for event in metrics_of(out) if "soft_loss" in event])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_hard_targets_from_the_cache_are_the_teachers(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    """The likeliest token of a cache is the teacher's, so the first steps' losses agree."""
    words = [*tiny(data, "hard_targets=teacher", "loss=hard"), "--steps", "2", "--log-every", "1"]
    online, cached = tmp_path / "online", tmp_path / "cached"
    assert distill(data, online, "--teacher", str(teacher), *words) == 0
    assert distill(data, cached, "--teacher-cache", str(cache), *words) == 0
    assert weights_of(online) == weights_of(cached)


def test_written_again_it_is_finished_and_others_are_refused(
    data: Path, teacher: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(data / "text")
    words = ["distill", shards, "--teacher", str(teacher), "--write-cache", str(cache)]
    assert main([*words, "--top-k", "7", "--tail-samples", "8"]) == 0
    assert "has all rows" in capsys.readouterr().err
    for option, then, now in (("--top-k", "7", "3"), ("--dtype", "fp32", "bf16")):
        same = ["--top-k", "7", "--tail-samples", "8"]
        assert main([*words, *same, option, now]) == 2
        assert f"`{option}` was {then}, now it is {now}" in only_error(capsys)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--lr", "0.1"], "cannot use `--lr` here"),
        (["--student", "preset:nano"], "cannot use `--student` here"),
        (["--fresh"], "name a new folder"),
        (["--top-k", "320"], "beside the true token there are 319 others"),
        (["--top-k", "0", "--tail-samples", "0"], "nothing of the teacher would be kept"),
    ],
)
def test_words_that_write_no_cache(
    words: list[str],
    what: str,
    data: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "cache"
    run = ["distill", str(data / "text"), "--teacher", str(teacher), *words, "-q"]
    assert main([*run, "--write-cache", str(folder)]) == 2
    assert what in only_error(capsys)
    assert not folder.exists()


def test_without_likely_tokens_no_hard_target_is_the_teachers(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    few = ["--top-k", "0", "--tail-samples", "4", "--write-cache", str(folder), "-q"]
    assert main(["distill", str(data / "text"), "--teacher", str(teacher), *few]) == 0
    capsys.readouterr()
    words = ["--teacher-cache", str(folder), *tiny(data, "hard_targets=teacher"), "--steps", "2"]
    assert distill(data, tmp_path / "run", *words) == 2
    assert "cannot take hard targets from" in only_error(capsys)


def test_what_is_wrong_with_a_cache_is_said(
    data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *more: str, code: int = 1) -> str:
        out = tmp_path / "run"
        words = ["--teacher-cache", str(folder), *tiny(data), "--steps", "2", *more]
        capsys.readouterr()
        assert distill(data, out, *words) == code
        assert not out.exists()
        return only_error(capsys)

    assert "nowhere" in refused(tmp_path / "nowhere")
    torn = tmp_path / "torn"
    shutil.copytree(cache, torn)
    part = next(torn.glob("part-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-5])
    assert part.name in refused(torn)
    part.unlink()
    assert part.name in refused(torn)
    assert "was written at 1" in refused(cache, "--temperature", "2", code=2)
    pack_shards(tmp_path, "other", _text(tmp_path), "--format", "lines")
    shutil.copytree(tmp_path / "other", tmp_path / "text")
    out = tmp_path / "run"
    words = ["--teacher-cache", str(cache), *tiny(data), "--steps", "2"]
    capsys.readouterr()
    assert distill(tmp_path, out, *words) == 2
    assert "written for other shards" in only_error(capsys)


def _text(folder: Path) -> str:
    (folder / "other.txt").write_text("other lines\n" * 50)
    return "other.txt"


def test_a_teacher_larger_than_memory_writes_no_cache(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(teacher.resolve(), huge)
    config = json.loads((huge / "config.json").read_text())
    config |= {"num_local_experts": 10**6, "hidden_size": 2**13}
    (huge / "config.json").write_text(json.dumps(config))
    words = ["distill", str(data / "text"), "--teacher", str(huge)]
    assert main([*words, "--write-cache", str(tmp_path / "cache")]) == 1
    assert "does not fit this machine" in only_error(capsys)
    assert not (tmp_path / "cache").exists()


def test_matching_needs_a_teacher_that_runs(
    data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher-cache", str(cache), *tiny(data, "match_weight=0.1"), "--steps", "2"]
    assert distill(data, tmp_path / "run", *words) == 2
    assert "a cache has none" in only_error(capsys)


def test_a_student_cut_from_the_teacher_learns_from_its_cache(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First weights from the one, targets from the other; better from the first step on."""
    losses = {}
    rest = ["--student", "teacher,num_local_experts=2", "--steps", "1", "--log-every", "1"]
    for name, words in {"cached": ["--teacher-cache", str(cache)], "online": []}.items():
        out = tmp_path / name
        assert distill(data, out, "--teacher", str(teacher), *words, *rest) == 0
        losses[name] = metrics_of(out)[0]["data_loss"]
    assert losses["cached"] == pytest.approx(losses["online"], rel=1e-5)
    assert losses["cached"] < 4  # a random start has log 320, 5.8
    capsys.readouterr()
    both = ["--teacher", str(teacher), "--teacher-cache", str(cache)]
    assert distill(data, tmp_path / "x", *both, *rest, "--match-weight", "0.1") == 2
    assert "a cache has none" in only_error(capsys)


def test_info_and_json(
    data: Path, teacher: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--top-k", "7", "--tail-samples", "8", "--json", "--write-cache", str(cache)]
    assert main(["distill", str(data / "text"), "--teacher", str(teacher), *words]) == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert event["cache"] == str(cache)
    assert event["bytes_per_token"] <= 16 * 4 + 2
    assert main(["info", str(cache), "--json", "--verify"]) == 0
