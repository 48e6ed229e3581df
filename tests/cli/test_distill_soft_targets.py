"""Log-probabilities that a server shows, as soft targets of packed shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals.openai_server import KEY, refuses, running
from sums_teacher import add, ask, cut_bytes, prompts, rows_of, summary_of

from l4cli.commands.distill_samples import run_samples
from l4cli.commands.needle_options import Api
from l4cli.data.shards import ShardSet
from l4cli.data.teacher_cache import TeacherCache
from l4cli.text import load_tokenizer

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


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
        shutil.rmtree(tmp_path / "answers" / "cache")  # what is missing is written again
        run_samples(ask(tmp_path, url, tokenizer="bytes", seq_len=32))
        assert len(behaviour.seen) == 5
    shards = ShardSet.open(tmp_path / "answers" / "shards")
    assert shards.seq_len == 32
    again = TeacherCache.open(tmp_path / "answers" / "cache").for_shards([shards])
    assert len(again.row(0, 0)[0]) > 0
