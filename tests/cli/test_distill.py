"""`l4 distill` on models of a few thousand parameters: several students, one run, its folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_pretrain import metrics_of, only_error, weights_of

from l4cli.cli import main
from l4cli.commands.distill_students import Defaults, parse_students


def distill(data: Path, out: Path, *more: str) -> int:
    few = ["--batch-size", "4", "--log-every", "2", "--schedule", "constant"]
    return main(["distill", str(data / "text"), *few, "-o", str(out), *more])


def tiny(data: Path, *pairs: str) -> list[str]:
    return ["--student", ",".join([str(data / "tiny.json"), *pairs])]


def test_students_of_several_shapes_in_one_run(data: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    students = [
        *tiny(data, "name=moe", "num_local_experts=2"),
        *tiny(data, "name=dense", "moe_layers=[]", "optim=adamw", "loss=soft", "lr=2e-3"),
    ]
    held = ["--eval-data", str(data / "held")]
    words = ["--teacher", str(teacher), *students, "--steps", "4", *held]
    assert distill(data, out, *words) == 0
    for name in ("moe", "dense"):
        events = metrics_of(out / name)
        steps = [event for event in events if event["event"] == "step"]
        assert [event["step"] for event in steps] == [2, 4]
        assert events[-1]["event"] == "eval"
        assert events[-1]["bits_per_byte"] > 0
        for figure in ("loss", "hard_loss", "soft_loss", "soft_weight", "teacher_loss"):
            assert figure in steps[0], figure
        assert ("balance_loss" in steps[0]) == (name == "moe")
        assert steps[0]["lr"] == {"moe": 3e-3 * 6**0.5, "dense": 2e-3}[name]
    config = json.loads((out / "dense" / "latest" / "config.json").read_text())
    assert config["moe_layers"] == []


def test_a_run_cut_off_between_two_saves_continues(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    """One student has saved step 4 and the other has not: both go back to step 2."""
    students = [*tiny(data, "name=a"), *tiny(data, "name=b", "moe_layers=[]")]
    words = ["--teacher", str(teacher), *students, "--save-every", "2", "--alpha", "token:0.9"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert distill(data, straight, *words, "--steps", "6") == 0
    assert distill(data, cut, *words, "--steps", "4") == 0
    shutil.rmtree(cut / "b" / "step-000004")
    assert distill(data, cut, *words, "--steps", "6") == 0
    for name in ("a", "b"):
        assert weights_of(cut / name) == weights_of(straight / name)
        assert metrics_of(cut / name) == metrics_of(straight / name)
    assert distill(data, cut, *words, "--steps", "6") == 0  # finished


def test_hard_targets_of_the_data_need_no_teacher(data: Path, tmp_path: Path) -> None:
    """And then it is pretraining, bit for bit."""
    shape = ["--steps", "3", "--lr", "0.01"]
    assert distill(data, tmp_path / "hard", *tiny(data), "--loss", "hard", *shape) == 0
    few = ["--config", str(data / "tiny.json"), "--batch-size", "4", "--schedule", "constant"]
    plain = ["pretrain", str(data / "text"), *few, *shape, "-o", str(tmp_path / "plain"), "-q"]
    assert main(plain) == 0
    assert weights_of(tmp_path / "hard") == weights_of(tmp_path / "plain")


def test_a_student_equal_to_its_teacher_stays_what_it_is(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    """No gradient at all, whether its weights are named or cut; nothing else moves them."""
    still = ["--loss", "soft", "--weight-decay", "0", "--balance", "none", "--steps", "2"]
    original = (teacher / "model.safetensors").read_bytes()
    for name, student in (("named", str(teacher)), ("cut", "teacher,name=same")):
        words = ["--teacher", str(teacher), "--student", student, *still]
        assert distill(data, tmp_path / name, *words) == 0
        assert (tmp_path / name / "latest" / "model.safetensors").read_bytes() == original
        assert metrics_of(tmp_path / name)[0]["grad_norm"] == 0


def test_a_student_cut_from_the_teacher_begins_ahead(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = "teacher,hidden_size=48,num_local_experts=2,name=narrow"
    again = ["--steps", "1", "--lr", "1e-9", "--eval-data", str(data / "held")]
    losses = []
    for name, init in (("random", f"{teacher / 'config.json'},hidden_size=48"), ("cut", student)):
        words = ["--teacher", str(teacher), "--student", init, *again]
        assert distill(data, tmp_path / name, *words) == 0
        losses.append(metrics_of(tmp_path / name)[-1]["eval_loss"])
    assert losses[1] < losses[0] - 1
    error = capsys.readouterr().err
    assert "experts 4 -> 2 " in error
    assert "narrowing along the teacher's states in 16 rows" in error
    wide = ["--teacher", str(teacher), "--student", "teacher,hidden_size=128,name=wide"]
    assert distill(data, tmp_path / "wide", *wide, "--steps", "1") == 2
    assert "the teacher has only 64" in only_error(capsys)


def test_experts_are_dropped_unless_merging_is_asked_for(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = "teacher,num_local_experts=2"
    for words, told in ((what, "dropped"), (f"{what},experts=merge", "merged")):
        out = tmp_path / told
        shape = ["--teacher", str(teacher), "--student", words, "--steps", "1"]
        assert distill(data, out, *shape) == 0
        assert f"experts 4 -> 2 {told}" in capsys.readouterr().err


def test_a_run_of_one_model_may_have_another_below_it(data: Path, tmp_path: Path) -> None:
    outer, words = tmp_path / "outer", [*tiny(data), "--loss", "hard"]
    assert distill(data, outer, *words, "--steps", "1") == 0
    assert distill(data, outer / "inner", *words, "--steps", "1") == 0
    assert distill(data, outer, *words, "--steps", "2") == 0


def test_pictures(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher and a student with vision learn from shards with pictures."""
    shards = str(data / "pictures")
    shape = ["--set", "num_hidden_layers=2", "--steps", "2", "--batch-size", "2", "-q"]
    out = str(tmp_path / "big")
    assert main(["pretrain", shards, "--preset", "nano", *shape, "-o", out]) == 0
    student = "preset:nano,hidden_size=64,num_hidden_layers=2"
    words = ["--teacher", out + "/latest", "--student", student, "--steps", "2"]
    run = ["distill", shards, *words, "--batch-size", "2", "-o", str(tmp_path / "small"), "-q"]
    assert main(run) == 0
    blind = [*run[:4], "--student", student + ",vision_config=null", *run[6:]]
    blind[blind.index(str(tmp_path / "small"))] = str(tmp_path / "blind")
    assert main(blind) == 2
    capsys.readouterr()
    words = ["--teacher", str(teacher), "--student", "preset:nano", "-o", str(tmp_path / "run")]
    assert main(["distill", shards, *words, "--steps", "2"]) == 2
    assert f"the teacher `{teacher}` has no vision" in only_error(capsys)


def test_codistilling_trains_both(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    big = f"{data / 'tiny.json'},hidden_size=64,num_attention_heads=4,lr=0.02"
    words = ["--codistill", "--teacher", big, *tiny(data, "name=small"), "--burn-in", "0.5"]
    assert distill(data, out, *words, "--steps", "4", "--lr", "0.01") == 0
    assert metrics_of(out / "teacher")[0]["lr"] == 0.02
    assert [event["soft_weight"] for event in metrics_of(out / "small")] == [0.0, 1.0]


def test_other_tokenizers_are_refused(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("other words, other tokens\n" * 50)
    assert main(["train-tokenizer", str(text), "--vocab-size", "300", "-o", f"{tmp_path}/tok"]) == 0
    stream = f"{tmp_path}/x.tokens"
    assert main(["tokenize", str(text), "--tokenizer", f"{tmp_path}/tok", "-o", stream, "-q"]) == 0
    assert main(["pack", stream, "--seq-len", "64", "-o", f"{tmp_path}/text", "-q"]) == 0
    capsys.readouterr()
    out = tmp_path / "run"
    assert distill(tmp_path, out, "--teacher", str(teacher), *tiny(data), "--steps", "2") == 2
    error = only_error(capsys)
    assert "another tokenizer" in error
    assert str(teacher) in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no student given"),
        (["--student", "preset:nano"], "no teacher is given"),
        (["--student", "preset:nono", "--teacher", "{teacher}"], "unknown preset `nono`"),
        (["--student", "nowhere/", "--teacher", "{teacher}"], "there is no such folder"),
        (["--student", "preset:nano", "--teacher", "nowhere/"], "nowhere"),
        (["--student", "preset:nano,lr", "--teacher", "{teacher}"], "`lr` has no `=`"),
        (["--student", "preset:nano,lr=x", "--teacher", "{teacher}"], "lr=x"),
        (
            ["--student", "preset:nano,hiden_size=8", "--teacher", "{teacher}"],
            "unknown key `hiden_size` in `--student preset:nano`",
        ),
        (
            ["--student", "{teacher},name=x,hidden_size=32", "--teacher", "{teacher}"],
            "leave out `hidden_size=32`",
        ),
        (["--student", "preset:nano,name=latest", "--teacher", "{teacher}"], "names a folder"),
        (["--student", "preset:nano", "--student", "preset:nano"], "two students are named"),
        (["--student", "preset:nano", "--alpha", "1.5"], "a share is from 0 to 1"),
        (["--student", "preset:nano", "--loss", "soft", "--alpha", "0.5"], "the loss is `soft`"),
        (["--student", "preset:nano", "--temperature", "0"], "logits are divided by it"),
        (["--student", "preset:nano", "--scaling-factor", "-1"], "soft targets count times this"),
        (["--student", "preset:nano", "--codistill"], "`--codistill` trains a teacher"),
        (["--student", "preset:nano", "--burn-in", "0.1"], "nothing to learn first"),
        (["--student", "preset:nano", "--teacher", "a", "--teacher-cache", "b"], "both say what"),
        (["--student", "preset:nano", "--write-cache", "c", "--teacher", "a"], "trains nothing"),
        (["--write-cache", "c"], "a cache holds what a teacher predicts"),
        (["--student", "teacher", "--loss", "hard"], "to be cut from a teacher"),
        (["--student", "preset:nano,match=1", "--teacher", "{teacher}"], "write pairs such as"),
        (["--student", "preset:nano,match=0:1", "--teacher", "{teacher}"], "how much that counts"),
        (
            [
                "--student=preset:nano,match=0:9,match_weight=1,vision_config=null",
                "--teacher={teacher}",
            ],
            "the teacher 2",
        ),
        (["--student", "preset:nano,lr=1,lr=2", "--teacher", "{teacher}"], "`lr` is given twice"),
        (["--student", "preset:nano,schedule=up", "--teacher", "{teacher}"], "`wsd`, `cosine`"),
        (["--student", "preset:nano,decay_frac=7", "--teacher", "{teacher}"], "not from 0 to 1"),
        (["--student", "preset:nano,name=step-4", "--teacher", "{teacher}"], "names a folder"),
        (["--student", "teacher,layers=0+9", "--teacher", "{teacher}"], "it has 2"),
        (
            ["--student", "preset:nano", "--codistill", "--teacher", "preset:nano,lr=x"],
            "cannot use `--teacher",
        ),
        (
            ["--student", "preset:nano", "--codistill", "--teacher", "preset:nano,lr=1,min_lr=2"],
            "`--lr 1` is below it",
        ),
        (["--student", "teacher,match=0:1", "--teacher", "{teacher}"], "add `match_weight=0.1`"),
        (
            ["--student", "teacher,match=0:9,match_weight=1", "--teacher", "{teacher}"],
            "cannot match layer 0 of `student` with layer 9",
        ),
        (["--student", "teacher,lr=x", "--teacher", "{teacher}"], "`lr=x`: it is not a number"),
        (["--student", "teacher,warmup=1.5", "--teacher", "{teacher}"], "not a whole number"),
        (["--student", "teacher,optim=sgd", "--teacher", "{teacher}"], "none of `muon`, `adamw`"),
        (
            ["--student", "teacher,hiden=8", "--teacher", "{teacher}"],
            "unknown key `hiden` in `--student teacher`",
        ),
        (
            ["--student", "teacher,hidden_size=x", "--teacher", "{teacher}"],
            "cannot use `hidden_size=x` in `--student teacher`",
        ),
        (
            ["--student", "teacher,hidden_size=2048", "--teacher", "{teacher}"],
            "begin with another shape than `teacher`",
        ),
        (
            ["--student", "teacher,num_hidden_layers=9", "--teacher", "{teacher}"],
            "cannot cut 9 layers from the teacher",
        ),
        (["--student", "preset:maverick", "--teacher", "{teacher}"], "`--student preset:small`"),
        (["--student", "teacher", "--codistill", "--teacher", "{teacher}"], "out `--codistill`"),
        (
            ["--student", "preset:nano", "--codistill", "--teacher", "preset:nano,lr=x"],
            "cannot use `--teacher preset:nano,lr=x`",
        ),
        (
            ["--student", "preset:nano", "--codistill", "--teacher", "preset:nano,alpha=1"],
            "`alpha` is a student's",
        ),
        (
            ["--student", "preset:nano", "--codistill", "--teacher", "preset:nano,foo=1"],
            "unknown key `foo` in `--teacher preset:nano`",
        ),
        (["--student", "teacher", "--teacher", "{teacher}", "--top-k", "3"], "what a cache keeps"),
        (["--student", "teacher,lr=1,lr=2", "--teacher", "{teacher}"], "`lr` is given twice"),
        (["--student", "teacher,steps=2", "--teacher", "{teacher}"], "use `--steps` for it"),
        (["--student", "", "--teacher", "{teacher}"], "there is no such folder"),
        (["--student", "teacher", "--teacher", "preset:nano"], "add `--codistill`"),
        (
            ["--student", "teacher", "--teacher", "{teacher}", "--match-weight", "inf"],
            "cannot use `--match-weight inf`",
        ),
    ],
)
def test_words_that_cannot_be_meant(
    words: list[str],
    why: str,
    data: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    words = [word.replace("{teacher}", str(teacher)) for word in words]
    assert distill(data, out, *words, "--steps", "2") in (1, 2)
    assert why in only_error(capsys)
    assert not out.exists()


def test_lists_and_objects_in_a_student() -> None:
    """A comma inside one, however deep, parts nothing."""
    words = 'preset:nano,moe_layers=[0,2],rope_scaling={"a":1,"b":{"c":[2,3]},"d":4},name=x'
    (student,) = parse_students([words], Defaults("hard", None, None, 1.0, "data", 0.0, 0.0, None))
    assert student.overrides == [
        "moe_layers=[0,2]",
        'rope_scaling={"a":1,"b":{"c":[2,3]},"d":4}',
    ]
    assert student.name == "x"


def test_models_too_large_together_are_refused(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher", str(teacher), "--steps", "2"]
    assert distill(data, tmp_path / "a", *words, "--student", "preset:scout") == 1
    assert "`scout` does not fit this machine" in only_error(capsys)
    # Each alone fits; forty of them do not, whatever this machine has.
    many = [f"--student=preset:small,name=s{i},vision_config=null" for i in range(400)]
    assert distill(data, tmp_path / "b", *words, *many[:40]) == 1
    error = only_error(capsys)
    assert "do not fit" in error


def test_another_set_of_students_is_another_run(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--teacher", str(teacher), "--steps", "2"]
    assert distill(data, out, *words, *tiny(data, "name=a"), *tiny(data, "name=b")) == 0
    capsys.readouterr()
    one = tmp_path / "one"
    assert distill(data, one, *words, *tiny(data, "name=a")) == 0
    capsys.readouterr()
    assert distill(data, one, *words, *tiny(data, "name=a"), *tiny(data, "name=b")) == 2
    assert "it trains one model" in only_error(capsys)
    of_two = ["--teacher", str(out), "--steps", "2", *tiny(data)]
    assert distill(data, tmp_path / "next", *of_two) == 1
    assert f"pass one of `{out / 'a'}`, `{out / 'b'}`" in only_error(capsys)
    assert distill(data, out, *words, *tiny(data, "name=a"), *tiny(data, "name=c")) == 2
    assert "it trains `a`, `b`" in only_error(capsys)
    assert distill(data, out, *words, *tiny(data, "name=a")) == 2
    assert "it trains `a`, `b`" in only_error(capsys)
    other = [*tiny(data, "name=a", "alpha=0.5"), *tiny(data, "name=b")]
    assert distill(data, out, *words, *other) == 2
    assert "`a.alpha` was not set, now 0.5,0.5" in only_error(capsys)


def test_a_dry_run_tells_the_students_apart(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher", str(teacher), "--steps", "2", "--dry-run", "--json"]
    out = tmp_path / "run"
    assert distill(data, out, *words, *tiny(data, "name=a"), *tiny(data, "name=b")) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["model"] for line in captured.out.splitlines()] == ["a", "b"]
    assert "all models together" in captured.err
    assert not out.exists()
