"""Answers of a teacher without logits, over real HTTP and from a checkpoint, to rows and shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evals.openai_server import KEY, broken, running, says
from sums_teacher import add, ask, prompts, rows_of, summary_of
from tiny_chat import save_checkpoint

from l4cli.cli import main
from l4cli.commands.distill_samples import run_samples
from l4cli.commands.needle_options import Api
from l4cli.commands.options import Device
from l4cli.data.shards import ShardSet
from l4cli.errors import L4Error, UsageError
from l4cli.posttraining.sample_choices import Keep, Reasoning
from l4cli.text import load_tokenizer, render_chat

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_answers_become_chats_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    prompts(tmp_path, 8)
    with running(speak=add, delay_s=0.01) as (url, behaviour):
        request = ask(tmp_path, url, jobs=8, checker="number")
        run_samples(request)
    rows = rows_of(request.out)
    assert [row["id"] for row in rows] == [f"sum-{i}" for i in range(8)]
    assert rows[3] == {
        "id": "sum-3",
        "sample": 0,
        "messages": [
            {"role": "user", "content": "3 + 3?"},
            {"role": "assistant", "content": "It is 6."},
        ],
        "finish": "stop",
        "num_tokens": 2,
        "checked": True,
        "teacher": "reader",
        "answer": 6,
    }
    assert {seen.body["temperature"] for seen in behaviour.seen} == {0}
    assert not any("logprobs" in seen.body for seen in behaviour.seen)
    assert not (request.out / "shards").exists()


def test_a_run_that_broke_off_asks_only_for_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(tmp_path)
    with running(speak=add) as (url, behaviour):
        request = ask(tmp_path, url, jobs=1)
        behaviour.failures = [lambda handler: handler.answer()] * 2 + [broken(500)]
        with pytest.raises(L4Error) as caught:
            run_samples(request)
        assert "gave up asking" in caught.value.what
        assert "2 of 5 answers are kept" in capsys.readouterr().err
        journal = request.out / "answers.jsonl"
        with journal.open("ab") as file:
            file.write(b'{"id": "sum-2", "sam')  # a power cut in the middle of a line
        run_samples(request)
        asked = [seen.body["messages"][0]["content"] for seen in behaviour.seen]
        assert asked == [f"{i} + {i}?" for i in (0, 1, 2, 2, 3, 4)]
        assert len(rows_of(request.out)) == 5
        before = journal.read_bytes()
        run_samples(request)
        assert "holds all 5 answers already" in capsys.readouterr().err
        assert len(behaviour.seen) == 6
        assert journal.read_bytes() == before


def test_other_questions_are_refused_by_name_and_other_rows_are_free(tmp_path: Path) -> None:
    path = prompts(tmp_path)
    with running(speak=add) as (url, behaviour):
        request = ask(tmp_path, url, samples_per_prompt=2)
        run_samples(request)
        for name, value, told in (
            ("max_new_tokens", 7, "max_new_tokens"),
            ("temperature", 0.5, "sampling_temperature"),
            ("seed", 4, "seed"),
        ):
            with pytest.raises(UsageError) as caught:
                run_samples(ask(tmp_path, url, **({"samples_per_prompt": 2} | {name: value})))
            assert f"`{told}` was" in caught.value.why
        assert len(behaviour.seen) == 10
        # A checker chooses among what was paid for; more samples are added to it.
        run_samples(ask(tmp_path, url, samples_per_prompt=2, checker="number"))
        assert len(behaviour.seen) == 10
        assert len(rows_of(request.out)) == 5  # of two that are alike one is kept
        run_samples(ask(tmp_path, url, samples_per_prompt=4, checker="number"))
        assert sorted(seen.body["seed"] for seen in behaviour.seen[10:]) == [2] * 5 + [3] * 5
        path.write_text(path.read_text() + '{"prompt": "9 + 9?"}\n')
        with pytest.raises(UsageError) as caught:
            run_samples(request)
        assert "`prompts` was" in caught.value.why


def test_checked_samples_tell_how_hard_a_prompt_is(tmp_path: Path) -> None:
    prompts(tmp_path, 4)
    with running(speak=add) as (url, behaviour):
        request = ask(tmp_path, url, samples_per_prompt=4, checker="number")
        run_samples(request)
        assert {seen.body["temperature"] for seen in behaviour.seen} == {1.0}
        assert sorted({seen.body["seed"] for seen in behaviour.seen}) == [0, 1, 2, 3]
        summary = summary_of(request.out)
        assert summary["pass_rates"] == {"sum-0": 1.0, "sum-1": 0.5, "sum-2": 1.0, "sum-3": 0.5}
        assert summary["num_asked"] == summary["num_answered"] == 16
        assert summary["num_passed"] == 12
        # Of the right answers to a prompt, all alike, one is kept.
        assert summary["num_kept"] == 4
        assert summary["num_duplicates"] == 8
        run_samples(ask(tmp_path, url, samples_per_prompt=4, checker="number", keep=Keep.all))
    checked = [(row["id"], row["checked"]) for row in rows_of(request.out)]
    assert checked == [
        ("sum-0", True),
        ("sum-1", True),
        ("sum-1", False),
        ("sum-2", True),
        ("sum-3", True),
        ("sum-3", False),
    ]


def test_what_is_cut_or_empty_is_paid_for_and_not_kept(tmp_path: Path) -> None:
    prompts(tmp_path, 4)

    def speak(body: dict[str, Any]) -> str:
        return "" if body["messages"][0]["content"].startswith("1") else add(body)

    with running(speak=speak, finish=lambda t: "length" if "4" in t else "stop") as (url, _):
        request = ask(tmp_path, url)
        run_samples(request)
        assert [row["id"] for row in rows_of(request.out)] == ["sum-0", "sum-3"]
        assert summary_of(request.out)["num_cut"] == 1
        assert summary_of(request.out)["num_empty"] == 1
        run_samples(ask(tmp_path, url, keep=Keep.all))
    assert [row["finish"] for row in rows_of(request.out)] == ["stop", "length", "stop"]


def test_thoughts_are_dropped_or_kept_before_the_answer(tmp_path: Path) -> None:
    prompts(tmp_path, 2)
    with running(speak=add, reasoning="twice that") as (url, behaviour):
        request = ask(tmp_path, url)
        run_samples(request)
        row = rows_of(request.out)[1]
        assert row["messages"][-1]["content"] == "It is 2."
        assert row["reasoning"] == "twice that"
        run_samples(ask(tmp_path, url, reasoning=Reasoning.keep))
        said = rows_of(request.out)[1]["messages"][-1]["content"]
        assert said == "<think>\ntwice that\n</think>\n\nIt is 2."
        assert len(behaviour.seen) == 2


def test_a_prompt_the_server_refuses_is_passed_over_once_others_are_answered(
    tmp_path: Path,
) -> None:
    prompts(tmp_path)
    with running(speak=add) as (url, behaviour):
        too_long = says(b'{"error": {"message": "too long", "code": 400}}', status=400)
        behaviour.failures = [too_long]
        request = ask(tmp_path, url, jobs=1)
        with pytest.raises(L4Error) as caught:
            run_samples(request)
        assert "too long" in caught.value.why
        assert "`--teacher-model`" in caught.value.fix
        assert len(behaviour.seen) == 1  # nothing says yet that others would be taken
        behaviour.failures = [lambda handler: handler.answer(), too_long]
        run_samples(request)
    assert summary_of(request.out)["num_refused"] == 1
    assert [row["id"] for row in rows_of(request.out)] == ["sum-0", "sum-2", "sum-3", "sum-4"]


def test_shards_hold_what_tokenizing_the_rows_gives(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]
    path.write_text(json.dumps({"messages": messages, "source": "sums"}) + "\n")
    with running(speak=add) as (url, behaviour):
        request = ask(tmp_path, url, tokenizer="bytes", seq_len=128)
        run_samples(request)
        assert behaviour.seen[0].body["messages"] == messages
    (row,) = rows_of(request.out)
    chat = render_chat(TOKENIZER, row["messages"], add_generation_prompt=False)
    shard = ShardSet.open(request.out / "shards").row(0)
    n = len(chat.ids)
    assert shard.input_ids[:n].tolist() == chat.ids.tolist()
    assert shard.input_ids[n] == TOKENIZER.eos_id
    assert shard.loss_mask is not None
    assert shard.loss_mask[:n].tolist() == chat.loss_mask.tolist()
    assert shard.document_ids.tolist() == [1] * (n + 1) + [0] * (127 - n)
    assert shard.labels == {"source": ["sums"]}


def test_rows_are_what_the_tokenizing_command_reads(tmp_path: Path) -> None:
    prompts(tmp_path, 9)
    with running(speak=add, reasoning="easy") as (url, _):
        request = ask(tmp_path, url, tokenizer="bytes", seq_len=64, checker="number")
        run_samples(request)
    rows, tokens, packed = (tmp_path / name for name in ("answers/samples.jsonl", "t", "packed"))
    assert main(["tokenize", str(rows), "--tokenizer", "bytes", "-o", str(tokens)]) == 0
    assert main(["pack", str(tokens), "--seq-len", "64", "-o", str(packed)]) == 0
    wanted, found = ShardSet.open(packed), ShardSet.open(request.out / "shards")
    assert wanted.digest == found.digest


def test_half_a_character_is_no_answer(tmp_path: Path) -> None:
    prompts(tmp_path, 2)
    with running(speak=lambda body: "\ud83d" if "0" in str(body["messages"]) else "Two.") as (
        url,
        _,
    ):
        request = ask(tmp_path, url, tokenizer="bytes", checker="command:true")
        run_samples(request)
    assert [row["id"] for row in rows_of(request.out)] == ["sum-1"]
    assert summary_of(request.out)["num_empty"] == 1


def test_a_budget_stops_before_it_is_exceeded(tmp_path: Path) -> None:
    prompts(tmp_path)
    with running(speak=add, counts_tokens=False) as (url, behaviour):
        # What is not counted is taken to be what was set aside: 2 x 17 for a prompt and 40.
        request = ask(tmp_path, url, jobs=1, max_new_tokens=40, max_tokens=160)
        with pytest.raises(L4Error) as caught:
            run_samples(request)
        assert "`--max-tokens 160`" in caught.value.what
        assert len(behaviour.seen) == 2
        run_samples(ask(tmp_path, url, jobs=1, max_new_tokens=40))
        assert len(behaviour.seen) == 5


def test_a_checkpoint_answers_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(tmp_path)
    folder = save_checkpoint(tmp_path / "teacher", "Say.it-loud", sees=False)
    request = ask(
        tmp_path,
        "",
        endpoint=None,
        model=None,
        checkpoint=folder,
        device=Device.cpu,
        timeout=300.0,
        max_new_tokens=20,
        seq_len=64,
    )
    run_samples(request)
    assert "--teacher" in capsys.readouterr().err
    journal = request.out / "answers.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    (request.out / "summary.json").unlink()
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:9])
    run_samples(request)
    assert sorted(journal.read_bytes().splitlines(keepends=True)) == sorted(lines)
    rows = rows_of(request.out)
    assert [row["messages"][-1]["content"] for row in rows] == ["Say.it-loud"] * 5
    assert rows[0]["num_tokens"] == 11
    assert rows[0]["finish"] == "stop"
    shards = ShardSet.open(request.out / "shards")
    assert shards.index["num_documents"] == 5
    assert shards.fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"endpoint": None}, "there is no teacher"),
        ({"checkpoint": Path("x")}, "two teachers"),
        ({"model": None}, "`--teacher-model NAME`"),
        ({"top_logprobs": 21}, "`--top-logprobs 21`"),
        ({"top_p": 0.9}, "`--sampling-top-p 0.9`"),
        ({"samples_per_prompt": 2, "temperature": 0.0}, "`--samples-per-prompt 2`"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"endpoint": "ftp://x"}, "`--teacher-endpoint http"),
        ({"checker": "guess"}, "`contains`"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    prompts(tmp_path)
    with pytest.raises(UsageError) as caught:
        run_samples(ask(tmp_path, "http://127.0.0.1:9", **changes))
    assert told in " ".join((caught.value.what, caught.value.why, caught.value.fix))
    assert not (tmp_path / "answers").exists()


def test_chats_cannot_be_completed(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError) as caught:
        run_samples(ask(tmp_path, "http://127.0.0.1:9", api=Api.completions))
    assert "line 1" in caught.value.what


def test_a_dry_run_asks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts(tmp_path)
    request = ask(tmp_path, "http://127.0.0.1:9", dry_run=True, samples_per_prompt=3)
    run_samples(request)
    assert "15 answers" in capsys.readouterr().err
    assert not request.out.exists()
    with running(speak=add) as (url, behaviour):
        run_samples(ask(tmp_path, url, seed=3))
        run_samples(ask(tmp_path, url, seed=3, dry_run=True))
        assert len(behaviour.seen) == 5
    assert " 0 answers" in capsys.readouterr().err


def test_the_command_asks_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = prompts(tmp_path, 3)
    out = tmp_path / "out"
    words = ["--teacher-model", "reader", "--tokenizer", "bytes", "--seq-len", "64", "-o", str(out)]
    with running(speak=add) as (url, _):
        ask_it = ["distill", str(path), "--teacher-endpoint", url, *words, "--checker", "number"]
        wrong = ["reedr" if word == "reader" else word for word in ask_it]
        assert main(wrong) == 1
        capsys.readouterr()
        assert main(ask_it) == 0  # in the folder of the slip
        assert capsys.readouterr().out == f"{out}\n"
    assert main(["info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["num_answers"], facts["num_kept"]) == ("answers", 3, 3)
    assert facts["settings"]["teacher"] == "reader"
    assert len(rows_of(out)) == 3
    assert ShardSet.open(out / "shards").seq_len == 64


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--teacher-endpoint", "http://127.0.0.1:9/v1"], "--teacher-model"),
        (["--from-samples"], "there is no teacher"),
        (["--from-samples", "--teacher", "x", "--student", "preset:nano"], "first the teacher"),
        (["--from-samples", "--teacher", "x", "--steps", "3"], "first the teacher"),
        (["--checker", "number", "--student", "preset:nano"], "answers prompts"),
        (["other.jsonl", "--from-samples", "--teacher", "x"], "one file of prompts"),
        (["--from-samples", "--teacher", "x", "--temperature", "0.7"], "--sampling-temperature"),
        (["--from-samples", "--teacher", "x", "--lr", "0.7"], "cannot use `--lr` here"),
        (["--from-samples", "--teacher", "x", "--max-tokens", "9"], "only servers are asked"),
    ],
)
def test_words_that_cannot_be_meant(
    words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompts(tmp_path, 1)
    assert main(["distill", str(path), *words, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("error:") == 1
    assert not (tmp_path / "out").exists()
