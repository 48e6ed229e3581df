"""Answers of a teacher without logits, over real HTTP and from a checkpoint, to rows and shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals.openai_server import KEY, broken, refuses, running, says
from tiny_chat import save_checkpoint

from l4cli.cli import main
from l4cli.commands.distill_samples import SamplesRequest, run_samples
from l4cli.commands.needle_options import Api
from l4cli.commands.options import Device
from l4cli.data.shards import ShardSet
from l4cli.data.teacher_cache import TeacherCache
from l4cli.errors import L4Error, UsageError
from l4cli.posttraining.sample_choices import Keep, Reasoning
from l4cli.text import load_tokenizer, render_chat

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def prompts(folder: Path, num: int = 5) -> Path:
    """Sums, with their answers."""
    path = folder / "prompts.jsonl"
    rows = [{"id": f"sum-{i}", "prompt": f"{i} + {i}?", "answer": 2 * i} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add(body: dict[str, Any]) -> str:
    """Right, but for odd numbers at odd seeds."""
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    number = int(re.findall(r"\d+", text)[0])
    wrong = number % 2 and body["seed"] % 2
    return f"It is {2 * number + (1 if wrong else 0)}."


def ask(folder: Path, url: str, **changes: Any) -> SamplesRequest:
    settings: dict[str, Any] = {
        "prompts": folder / "prompts.jsonl",
        "out": folder / "answers",
        "endpoint": url,
        "model": "reader",
        "max_tries": 1,
        "timeout": 10.0,
    }
    return SamplesRequest(**(settings | changes))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").open()]


def summary_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def cut_bytes(text: str) -> list[bytes]:
    """A server with our own vocabulary: every byte is a token."""
    return [bytes([byte]) for byte in text.encode()]


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
        for name, value in (("max_new_tokens", 7), ("temperature", 0.5), ("seed", 4)):
            with pytest.raises(UsageError) as caught:
                run_samples(ask(tmp_path, url, **({"samples_per_prompt": 2} | {name: value})))
            assert f"`{name}` was" in caught.value.why
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


@pytest.mark.parametrize("api", list(Api))
def test_log_probabilities_become_soft_targets_where_they_belong(tmp_path: Path, api: Api) -> None:
    """A plain loop over the shards finds every target's probabilities again."""
    prompts(tmp_path, 40)

    def speak(body: dict[str, Any]) -> str:
        return add(body) + " \u20ac"  # of three bytes, none of which is a text

    def likely(place: int, token: bytes) -> list[tuple[bytes, float]]:
        others = [bytes([ord("A") + place % 26]), b"\xff\xff", b"~"]
        shares = [0.5, 0.2 + 0.001 * place, 0.1, 0.05]
        return [(t, float(np.log(p))) for t, p in zip([token, *others], shares, strict=True)]

    with running(speak=speak, cut=cut_bytes, likely=likely) as (url, behaviour):
        request = ask(tmp_path, url, tokenizer="bytes", seq_len=64, api=api, jobs=3)
        run_samples(request)
        shown = {"chat": ("top_logprobs", 20), "completions": ("logprobs", 5)}[api.value]
        assert {seen.body[shown[0]] for seen in behaviour.seen} == {shown[1]}
    shards = ShardSet.open(request.out / "shards")
    cache = TeacherCache.open(request.out / "cache")
    rows = cache.for_shards([shards])
    num_soft = num_targets = 0
    texts = set()
    for number in range(shards.num_rows):
        row = shards.row(number)
        assert row.loss_mask is not None
        ids_nK, weights_nK, entropy_n = rows.row(0, number)
        n, said = 0, b""
        for t in range(len(row.input_ids) - 1):
            if row.document_ids[t] == 0 or row.document_ids[t] != row.document_ids[t + 1]:
                continue
            if not row.loss_mask[t + 1]:
                said = b""
                continue
            token = int(row.input_ids[t + 1])
            found = dict(zip(ids_nK[n].tolist(), weights_nK[n].tolist(), strict=True))
            assert ids_nK[n, 0] == token
            if token == TOKENIZER.eot_id:
                assert found[token] == 1
                assert entropy_n[n] == 0
                texts.add(said.decode())
            else:
                byte = TOKENIZER.token_bytes(token)
                # 0xFF 0xFF is no token of ours: the rest is scaled to a sum of 1.
                place = len(said)
                wanted = {
                    t: p
                    for t, p in dict(likely(place, byte)).items()
                    if t != b"\xff\xff" and (t != byte or p == np.log(0.5))
                }
                total = sum(np.exp(p) for p in wanted.values())
                for other, logprob in wanted.items():
                    (other_id,) = TOKENIZER.encode_bytes(other).tolist()
                    assert found[other_id] == pytest.approx(np.exp(logprob) / total, rel=2e-3)
                assert sum(p > 0 for p in found.values()) == len(wanted)
                p = np.exp(np.array(list(wanted.values()))) / total
                # One byte an entropy: codes are up to 0.03 nats apart there.
                assert entropy_n[n] == pytest.approx(-(p * np.log(p)).sum(), abs=0.03)
                said += byte
                num_soft += 1
            num_targets += 1
            n += 1
        assert n == len(ids_nK)
    packed = summary_of(request.out)["shards"]
    assert packed["num_targets"] == num_targets
    assert packed["num_soft_targets"] == num_soft == num_targets - 40
    assert packed["num_rows_matched"] == 40
    assert texts == {f"It is {2 * i}. \u20ac" for i in range(40)}


def test_the_teachers_end_of_turn_is_ours_whatever_its_name(tmp_path: Path) -> None:
    prompts(tmp_path, 1)
    end = b"<|im_end|>"

    def likely(place: int, token: bytes) -> list[tuple[bytes, float]]:
        other = b"!" if token == end else end
        return [(token, float(np.log(0.7))), (other, float(np.log(0.3)))]

    with running(speak=add, cut=cut_bytes, likely=likely, end_token=end) as (url, _):
        request = ask(tmp_path, url, tokenizer="bytes", seq_len=64)
        run_samples(request)
    shards = ShardSet.open(request.out / "shards")
    ids_nK, weights_nK, _ = TeacherCache.open(request.out / "cache").for_shards([shards]).row(0, 0)
    found = [
        dict(zip(i, w, strict=True))
        for i, w in zip(ids_nK.tolist(), weights_nK.tolist(), strict=True)
    ]
    assert all(row[TOKENIZER.eot_id] == pytest.approx(0.3, rel=2e-3) for row in found[:-1])
    assert found[-1][TOKENIZER.eot_id] == pytest.approx(0.7, rel=2e-3)
    assert found[-1][TOKENIZER.encode("!").item()] == pytest.approx(0.3, rel=2e-3)


def test_answers_that_are_cut_otherwise_are_learned_as_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(tmp_path)

    def pairs(text: str) -> list[bytes]:
        data = text.encode()
        size = 2 if "4" in text or "6" in text else 1
        return [data[i : i + size] for i in range(0, len(data), size)]

    with running(speak=add, cut=pairs) as (url, behaviour):
        request = ask(tmp_path, url, tokenizer="bytes", seq_len=128)
        run_samples(request)
        packed = summary_of(request.out)["shards"]
        assert packed["num_rows_with_logprobs"] == 5
        assert packed["num_rows_matched"] == 3
        shards = ShardSet.open(request.out / "shards")
        rows = TeacherCache.open(request.out / "cache").for_shards([shards])
        num_certain = sum(int((rows.row(0, i)[1][:, 0] == 1).sum()) for i in range(shards.num_rows))
        assert num_certain == packed["num_targets"] - packed["num_soft_targets"] == 2 * 8 + 5
        behaviour.cut = lambda text: [text.encode()]
        other = ask(tmp_path, url, tokenizer="bytes", out=tmp_path / "other")
        run_samples(other)
    assert "no soft targets: the tokenizer cuts no answer" in capsys.readouterr().err
    assert not (tmp_path / "other" / "cache").exists()
    assert ShardSet.open(tmp_path / "other" / "shards").num_tokens == shards.num_tokens


@pytest.mark.parametrize("how", ["leaves out", "refuses"])
def test_a_server_without_log_probabilities_is_asked_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    prompts(tmp_path)
    with running(speak=add) as (url, behaviour):
        if how == "refuses":
            behaviour.always = refuses("logprobs")
        request = ask(tmp_path, url, tokenizer="bytes", jobs=3)
        run_samples(request)
    assert capsys.readouterr().err.count(f"the server {how} `logprobs`") == 1
    assert len(rows_of(request.out)) == 5
    assert ShardSet.open(request.out / "shards").index["num_documents"] == 5
    assert not (request.out / "cache").exists()


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


def test_a_tokenizer_may_come_after_the_answers(tmp_path: Path) -> None:
    prompts(tmp_path)
    with running(speak=add, cut=cut_bytes) as (url, behaviour):
        run_samples(ask(tmp_path, url, top_logprobs=3))
        run_samples(ask(tmp_path, url, tokenizer="bytes"))
        assert len(behaviour.seen) == 5
        cache = TeacherCache.open(tmp_path / "answers" / "cache")
        assert cache.num_exact == 4
        # Another choice of rows takes the place of the old shards and cache.
        run_samples(ask(tmp_path, url, tokenizer="bytes", seq_len=32))
        assert len(behaviour.seen) == 5
    shards = ShardSet.open(tmp_path / "answers" / "shards")
    assert shards.seq_len == 32
    again = TeacherCache.open(tmp_path / "answers" / "cache").for_shards([shards])
    assert len(again.row(0, 0)[0]) > 0


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
