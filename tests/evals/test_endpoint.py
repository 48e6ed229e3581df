"""The client of OpenAI-compatible servers, over real HTTP, through every failure."""

from __future__ import annotations

import email.utils
import itertools
import json
import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai_server
import pytest
from openai_server import Behaviour, running

from l4cli import terminal
from l4cli.data.longcontext.sample import Question, Sample
from l4cli.errors import L4Error, UsageError
from l4cli.evals.endpoint import Api, EndpointOptions, api_key_from, request_url
from l4cli.evals.endpoint_subject import EndpointSubject, EstimatedTokenizer
from l4cli.evals.parallel import Stopped, in_parallel
from l4cli.text import load_tokenizer

FILLER = "The grass is green and the sky is blue, as they were on the day before. "


def sample(num_questions: int = 3, filler: int = 20, seed: int = 0) -> Sample:
    """Numbers hidden in filler, each asked for."""
    rng = np.random.default_rng(seed)
    values = rng.integers(10**6, 10**7, num_questions).tolist()
    pieces: list[str] = []
    for i, value in enumerate(values):
        pieces.append(FILLER * filler)
        pieces.append(f"One of the special magic numbers for key-{i} is: {value}. ")
    questions = tuple(
        Question(
            f"\nThe special magic number for key-{i} in the text above is:",
            (f" {value}",),
            evidence=(2 * i + 1,),
        )
        for i, value in enumerate(values)
    )
    return Sample("single", tuple(pieces), questions)


def subject(url: str, api: Api = Api.chat, **options: Any) -> EndpointSubject:
    """Impatient, so that tests are fast."""
    mine = {"max_tokens", "tokenizer", "answer_tokens"}
    of_subject = {name: options.pop(name) for name in mine & set(options)}
    settings = {
        "url": request_url(url, api),
        "model": "reader",
        "api": api,
        "api_key": openai_server.KEY,
        "timeout_s": 5.0,
        "max_tries": 4,
        "first_wait_s": 0.01,
        "longest_wait_s": 0.05,
    }
    return EndpointSubject(EndpointOptions(**(settings | options)), **of_subject)


def expect_right(asked: Sample, answers: list[str]) -> None:
    assert len(answers) == len(asked.questions)
    for question, answer in zip(asked.questions, answers, strict=True):
        assert question.answers[0].strip() in answer


@pytest.mark.parametrize("api", list(Api))
def test_every_question_is_asked_after_its_text_and_answered(api: Api) -> None:
    asked = sample()
    with running() as (url, behaviour):
        answers = subject(url, api).ask(asked)
    expect_right(asked, answers)
    if api is Api.completions:  # a continuation begins with the answer, as scores want it
        assert [q.score(a) for q, a in zip(asked.questions, answers, strict=True)] == [1.0] * 3
    paths = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
    assert {seen.path for seen in behaviour.seen} == {paths[api]}
    prompts = set()
    for seen in behaviour.seen:
        body = seen.body
        assert (body["model"], body["temperature"], body["seed"]) == ("reader", 0, 0)
        assert 16 < body["max_tokens"] < 200
        assert seen.headers["Authorization"] == f"Bearer {openai_server.KEY}"
        prompts.add(body["messages"][0]["content"] if api is Api.chat else body["prompt"])
    assert prompts == {asked.text + question.prompt for question in asked.questions}


def test_a_text_without_the_needle_is_answered_wrongly() -> None:
    asked = replace(sample(), pieces=(FILLER,))
    with running() as (url, _):
        answers = subject(url).ask(asked)
    assert not any(q.answers[0].strip() in a for q, a in zip(asked.questions, answers, strict=True))


PASSING = {
    "429 without a wait": openai_server.rate_limited(None),
    "429 with a wait": openai_server.rate_limited("0.05"),
    "500": openai_server.broken(500),
    "502": openai_server.broken(502),
    "503": openai_server.broken(503),
    "cut off": openai_server.cut_off,
    "no word": openai_server.no_word,
    "error under status 200": openai_server.says(b'{"error": {"code": 502, "message": "no"}}'),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(name: str) -> None:
    asked = sample()
    with running(failures=[PASSING[name]] * 3) as (url, behaviour):
        asking = subject(url)
        expect_right(asked, asking.ask(asked))
    assert len(behaviour.seen) == 3 + 3
    assert asking.report()["num_retries"] == 3


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_after_all_tries_is_an_error(name: str) -> None:
    with running(always=PASSING[name]) as (url, behaviour):
        with pytest.raises(L4Error) as caught:
            subject(url).ask(sample())
        assert len(behaviour.seen) == 4
    assert caught.value.what == f"gave up asking `{url}/chat/completions`"
    assert "in each of 4 tries" in caught.value.why
    assert "the same command goes on" in caught.value.fix


@pytest.mark.parametrize("failing", [openai_server.slow(5.0), openai_server.dripping])
def test_a_silent_or_dripping_server_times_out(failing: openai_server.Failing) -> None:
    asked = sample(1)
    with running(failures=[failing]) as (url, behaviour):
        expect_right(asked, subject(url, timeout_s=0.4, max_tries=9).ask(asked))
        behaviour.always = failing
        start = time.monotonic()
        with pytest.raises(L4Error) as caught:
            subject(url, timeout_s=0.2, max_tries=2).ask(asked)
        assert time.monotonic() - start < 5  # the server would take 10 s, or 100
    assert "no answer came within 0.2 s" in caught.value.why
    assert "`--timeout`" in caught.value.fix


@pytest.mark.parametrize("as_date", [False, True])
def test_the_wait_a_server_asks_for_is_kept_by_all(as_date: bool) -> None:
    # Dates have whole seconds: two ahead is at least one.
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    asked = sample(8)
    with running() as (url, behaviour):
        asking = subject(url, num_jobs=4)
        asking.ask(sample(1))
        behaviour.seen.clear()
        behaviour.failures = [openai_server.rate_limited(wait)] * 2
        behaviour.delay_s = 0.1
        expect_right(asked, asking.ask(asked))
    times = [seen.time_s for seen in behaviour.seen]
    assert len(times) == 10
    # The four that were under way at the time, then nobody for a second.
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps[:6]) > 0.75


def test_a_wait_that_is_too_long_is_not_slept_through() -> None:
    with running(always=openai_server.rate_limited("86400")) as (url, behaviour):
        with pytest.raises(L4Error, match="asks to wait 24h00m"):
            subject(url).ask(sample())
        assert len(behaviour.seen) == 1


def test_waits_double() -> None:
    with running(failures=[openai_server.broken(500)] * 4) as (url, behaviour):
        subject(url, max_tries=5, first_wait_s=0.05, longest_wait_s=0.2).ask(sample(1))
    gaps = [b.time_s - a.time_s for a, b in itertools.pairwise(behaviour.seen)]
    for gap, wait in zip(gaps, (0.05, 0.1, 0.2, 0.2), strict=True):
        assert gap >= wait


NONSENSE = {
    "no JSON": (openai_server.says(b"hello there"), "answers `hello there`, which is not JSON"),
    "empty": (openai_server.says(b""), "its answer is empty"),
    "a page": (
        openai_server.says(b"<html><title>Welcome\n to nginx</title>", "text/html"),
        "answers with a web page (Welcome to nginx), not with JSON",
    ),
    "no choices": (
        openai_server.says(b'{"object": "list", "data": []}'),
        "no answer in `choices`: it has `object`, `data`",
    ),
    "empty choices": (openai_server.says(b'{"choices": []}'), "no answer in `choices`"),
    "a list": (openai_server.says(b"[1, 2]"), "no answer in `choices`"),
    "a number for a text": (
        openai_server.says(b'{"choices": [{"message": {"content": 7}}]}'),
        "its answer is of type int, not text",
    ),
    "deep": (openai_server.says(b"[" * 100_000), "not JSON"),
    "a page under 404": (
        openai_server.says(b"<html>no</html>", "text/html", 404),
        "the server answers 404",
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_an_error_at_once(name: str) -> None:
    failing, why = NONSENSE[name]
    with running(always=failing) as (url, behaviour):
        with pytest.raises(L4Error) as caught:
            subject(url).ask(sample())
        assert len(behaviour.seen) == 1
    assert why in caught.value.why
    assert "`--endpoint`" in caught.value.fix
    assert len(caught.value.why.splitlines()) == 1


def test_a_wrong_key_is_said_at_once_and_never_shown() -> None:
    secret = "sk-wrong-9876543210"
    with running() as (url, behaviour):
        asking = subject(url, api_key=secret)
        with pytest.raises(L4Error) as caught:
            asking.ask(sample(8))
        assert len(behaviour.seen) == 1
    error = caught.value
    assert "401: Incorrect API key provided: (the key)" in error.why
    assert "--api-key-env" in error.fix
    assert secret not in repr(asking.options) + error.what + error.why + error.fix + str(error)


def test_an_unknown_model_and_a_context_too_long_are_the_servers_words() -> None:
    with running(max_model_len=100) as (url, _):
        with pytest.raises(L4Error, match="The model `ghost` does not exist"):
            subject(url, model="ghost").ask(sample())
        with pytest.raises(L4Error, match="maximum context length is 100 tokens") as caught:
            subject(url).ask(sample())
    assert "--lengths" in caught.value.fix


def test_an_empty_account_is_not_asked_again() -> None:
    body = b'{"error": {"code": "insufficient_quota", "message": "You exceeded your quota."}}'
    with running(always=openai_server.says(body, status=429)) as (url, behaviour):
        with pytest.raises(L4Error, match="You exceeded your quota"):
            subject(url).ask(sample())
        assert len(behaviour.seen) == 1


def test_redirects_are_not_followed_with_the_key() -> None:
    with running() as (other, elsewhere), running() as (url, behaviour):
        behaviour.always = lambda handler: handler.raw(
            307, b"", "text/plain", Location=f"{other}/chat/completions"
        )
        with pytest.raises(L4Error, match="redirects to"):
            subject(url).ask(sample())
    assert elsewhere.seen == []


def test_nobody_there_is_said_at_once() -> None:
    with running() as (url, _):
        pass
    start = time.monotonic()
    with pytest.raises(L4Error, match="nothing listens there"):
        subject(url, first_wait_s=30).ask(sample())
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", ["temperature", "seed"])
def test_a_setting_a_server_refuses_is_left_out_and_said(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    asked = sample(6)
    with running(always=openai_server.refuses(name)) as (url, behaviour):
        expect_right(asked, subject(url).ask(asked))
    assert len(behaviour.seen) == 7
    warning = capsys.readouterr().err
    assert warning.count(f"the server refuses `{name}`") == 1
    assert "may differ" in warning


def test_a_refusal_of_what_was_not_asked_for_is_an_error() -> None:
    error = {"message": "No.", "param": "temperature", "code": "unsupported_value"}
    body = json.dumps({"error": error}).encode()
    with running(always=openai_server.says(body, status=400)) as (url, behaviour):
        with pytest.raises(L4Error, match="the server answers 400: No"):
            subject(url).ask(sample())
        assert len(behaviour.seen) == 2


def test_newer_servers_get_their_own_name_for_the_limit() -> None:
    asked = sample(2)
    with running(always=openai_server.refuses("max_tokens")) as (url, behaviour):
        expect_right(asked, subject(url).ask(asked))
    bodies = [seen.body for seen in behaviour.seen]
    assert [set(body) & {"max_tokens", "max_completion_tokens"} for body in bodies] == [
        {"max_tokens"},
        {"max_completion_tokens"},
        {"max_completion_tokens"},
    ]


def test_jobs_run_at_once_and_no_more_than_asked_for() -> None:
    asked = sample(9)
    for num_jobs in (1, 4):
        with running(delay_s=0.1) as (url, behaviour):
            expect_right(asked, subject(url, num_jobs=num_jobs).ask(asked))
        assert behaviour.num_most == num_jobs


def test_several_threads_share_the_jobs() -> None:
    """Samples may be asked in parallel too; the server still sees no more than `num_jobs`."""
    asked = [sample(4, seed=seed) for seed in range(4)]
    with running(delay_s=0.03) as (url, behaviour):
        asking = subject(url, num_jobs=3)
        for one, answers in zip(asked, in_parallel(asking.ask, asked, 4), strict=True):
            expect_right(one, answers)
    assert behaviour.num_most == 3
    assert len(behaviour.seen) == 16


def test_the_first_failure_ends_all_requests() -> None:
    with running(delay_s=0.02) as (url, behaviour):
        asking = subject(url, num_jobs=2)
        asking.ask(sample(1))
        behaviour.failures = [openai_server.says(b"hello")]
        with pytest.raises(L4Error, match="not JSON"):
            asking.ask(sample(40))
        time.sleep(0.1)
        assert len(behaviour.seen) <= 5


# The guard on cost


def total(behaviour: Behaviour, num_answer: int) -> int:
    prompts = [seen.body["messages"][0]["content"] for seen in behaviour.seen]
    return sum(round(len(prompt) / behaviour.bytes_per_token) for prompt in prompts) + num_answer


@pytest.mark.parametrize("bytes_per_token", [6.0, 4.0, 2.1])
def test_the_guard_stops_before_the_limit_whatever_the_servers_vocabulary(
    bytes_per_token: float,
) -> None:
    """Estimates may be wrong; one counted answer corrects them, and the limit holds."""
    asked = sample(8, filler=2)
    with running(bytes_per_token=bytes_per_token) as (url, _):
        asking = subject(url, max_tokens=60_000, num_jobs=4)

        def ask_for_ever() -> None:
            while True:
                expect_right(asked, asking.ask(asked))

        with pytest.raises(L4Error) as caught:
            ask_for_ever()
    assert 50_000 < asking.budget.num_used <= 60_000
    assert caught.value.what == "stopped before `--max-tokens 60000` was exceeded"
    assert re.match(r"5\d,\d{3} tokens are used, and the next 8 requests", caught.value.why)
    assert "`--max-tokens`" in caught.value.fix


def test_the_guard_refuses_a_first_request_that_is_too_large() -> None:
    with running() as (url, behaviour):
        with pytest.raises(L4Error, match="stopped before") as caught:
            subject(url, max_tokens=1000).ask(sample(1, filler=100))
        assert behaviour.seen == []
    assert caught.value.why.startswith("0 tokens are used, and the next 1 requests may take ")


def test_a_refusal_loses_nothing_that_is_under_way() -> None:
    """Texts asked at once: all that fit are finished, and those that do not cost nothing."""
    asked = [sample(4, seed=seed, filler=4) for seed in range(40)]
    with running(delay_s=0.01) as (url, behaviour):
        asking = subject(url, max_tokens=20_000, num_jobs=8)
        finished = []
        with pytest.raises(L4Error, match="stopped before"):
            finished.extend(in_parallel(asking.ask, asked, 4))
    assert 20 > len(finished) > 5
    assert len(behaviour.seen) == 4 * len(finished)
    assert 15_000 < asking.budget.num_used <= 20_000


def test_retries_that_may_be_billed_end_at_the_limit() -> None:
    with running(always=openai_server.cut_off) as (url, behaviour):
        asking = subject(url, max_tokens=5_000, max_tries=100)
        with pytest.raises(L4Error, match="stopped before"):
            asking.ask(sample(1))
    one = asking.budget.num_used / len(behaviour.seen)
    assert 3 * one <= asking.budget.num_used <= 5_000


def test_usage_is_the_servers_own_count() -> None:
    asked = sample(3)
    with running(bytes_per_token=3.0) as (url, behaviour):
        asking = subject(url)
        answers = asking.ask(asked)
    assert asking.report() == {
        "num_requests": 3,
        "num_retries": 0,
        "num_tokens_used": total(behaviour, sum(len(answer) // 4 for answer in answers)),
        "tokens_counted_with": "4 bytes a token, an estimate",
    }


def test_a_server_that_does_not_count_is_charged_what_was_promised() -> None:
    asked = sample(2)
    with running(counts_tokens=False) as (url, behaviour):
        asking = subject(url, max_tokens=100_000)
        asking.ask(asked)
    assert asking.budget.num_used > total(behaviour, 0)


def test_timeouts_and_cut_answers_may_have_been_billed() -> None:
    with running(failures=[openai_server.cut_off]) as (url, _):
        cut = subject(url)
        cut.ask(sample(1))
    with running(failures=[openai_server.broken(500)]) as (url, _):
        failed = subject(url)
        failed.ask(sample(1))
    assert cut.budget.num_used > 1.9 * failed.budget.num_used


def test_a_given_tokenizer_counts() -> None:
    with running(bytes_per_token=1.0) as (url, _):
        asking = subject(url, tokenizer=load_tokenizer("bytes"))
        asking.ask(sample(1))
    assert asking.report()["tokens_counted_with"] == "the tokenizer `bytes`"


# Ways to the server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's proxies are, servers of this process are asked directly."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = sample(1)
    with running() as (url, behaviour):
        monkeypatch.setenv("http_proxy", url.removesuffix("/v1"))
        expect_right(asked, subject("http://model.example/v1").ask(asked))
    assert behaviour.seen[0].path == "http://model.example/v1/chat/completions"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed by itself, for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("`openssl` is not on this machine")
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    command += " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out certificate.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    return both


def test_https_is_spoken_with_those_who_can_be_trusted(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sample(1)
    with running(certificate) as (url, behaviour):
        assert url.startswith("https://")
        with pytest.raises(L4Error, match="its certificate is not trusted") as caught:
            subject(url).ask(asked)
        assert "SSL_CERT_FILE" in caught.value.fix
        assert behaviour.seen == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        expect_right(asked, subject(url).ask(asked))


# Addresses and keys


@pytest.mark.parametrize(
    ("endpoint", "api", "url"),
    [
        ("http://127.0.0.1:8000", Api.chat, "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://127.0.0.1:8000/", Api.completions, "http://127.0.0.1:8000/v1/completions"),
        ("https://api.openai.com/v1", Api.chat, "https://api.openai.com/v1/chat/completions"),
        ("https://h/api/v1/", Api.chat, "https://h/api/v1/chat/completions"),
        ("https://h/v1/chat/completions", Api.chat, "https://h/v1/chat/completions"),
        ("https://h/d?v=2", Api.chat, "https://h/d/chat/completions?v=2"),
    ],
)
def test_addresses(endpoint: str, api: Api, url: str) -> None:
    assert request_url(endpoint, api) == url


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "127.0.0.1:8000",
        "ftp://h/v1",
        "http://",
        "http://h:port/v1",
        "http://h/a b",
        "http://[h",
    ],
)
def test_bad_addresses(endpoint: str) -> None:
    with pytest.raises(UsageError) as caught:
        request_url(endpoint, Api.chat)
    assert "--endpoint http://" in caught.value.fix


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(UsageError) as caught:
        request_url("http://me:hunter2@h/v1", Api.chat)
    assert "hunter2" not in caught.value.what + caught.value.why + caught.value.fix
    with pytest.raises(UsageError) as caught:
        request_url("ftp://me:hunter2@h/v1", Api.chat)
    assert "hunter2" not in caught.value.what + caught.value.why + caught.value.fix


def test_an_address_of_the_other_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="other kind of request"):
        request_url("http://h/v1/chat/completions", Api.completions)
    with pytest.raises(UsageError, match="other kind of request"):
        request_url("http://h/v1/completions", Api.chat)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert api_key_from(None) is None
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a")
    monkeypatch.setenv("OTHER", "sk-b")
    assert (api_key_from(None), api_key_from("OTHER")) == ("sk-a", "sk-b")
    with pytest.raises(UsageError, match="`MISSING` is not set"):
        api_key_from("MISSING")
    monkeypatch.setenv("OTHER", "sk-b\nX-Evil: 1")
    with pytest.raises(UsageError) as caught:
        api_key_from("OTHER")
    assert "sk-b" not in str(caught.value) + caught.value.fix


def test_without_a_key_none_is_sent() -> None:
    with running(key=None) as (url, behaviour):
        subject(url, api_key=None).ask(sample(1))
    assert "Authorization" not in behaviour.seen[0].headers


# Estimated tokens


def test_estimated_tokens_are_four_bytes_and_turn_back_into_text() -> None:
    tokenizer = EstimatedTokenizer()
    for text in ("", "a", "abcd", "abcde", "gr\u00fcn \U0001f40e", FILLER * 50):
        ids = tokenizer.encode(text)
        assert len(ids) == -(-len(text.encode()) // 4)
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("abc\u00e9")[:1]) == "abc"
    assert tokenizer.encode("abcd")[0] == int.from_bytes(b"abcd", "little")


def test_parallel_results_are_in_order_and_a_failure_is_the_first_to_be_raised() -> None:
    def work(i: int) -> int:
        time.sleep(0.01 * (5 - i % 5))
        if i == 7:
            raise ValueError("seven")
        return i * i

    assert list(in_parallel(work, range(7), 4)) == [i * i for i in range(7)]
    assert list(in_parallel(work, [], 4)) == []
    stopped, seen = threading.Event(), []
    with pytest.raises(ValueError, match="seven"):
        seen.extend(in_parallel(work, range(100), 4, on_failure=stopped.set))
    assert stopped.is_set()


def test_a_failure_is_raised_and_not_that_others_were_stopped_by_it() -> None:
    """Whoever is stopped says so first here; the reason still comes out."""
    others = threading.Barrier(2)

    def work(i: int) -> int:
        others.wait()
        if i == 1:
            raise Stopped
        time.sleep(0.1)
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        list(in_parallel(work, range(2), 2))

    def stop(i: int) -> int:
        raise Stopped

    with pytest.raises(Stopped):
        list(in_parallel(stop, range(3), 2))


def test_what_is_finished_before_a_failure_is_given() -> None:
    """Also what comes after what never finished: each was paid for."""
    others = threading.Barrier(3)

    def work(i: int) -> int:
        others.wait()
        if i == 0:
            time.sleep(0.2)
            raise ValueError("slow failure")
        return i

    given = in_parallel(work, range(3), 3)
    assert [next(given), next(given)] == [1, 2]
    with pytest.raises(ValueError, match="slow failure"):
        next(given)


def test_quiet_and_json_leave_no_word_on_stdout(capsys: pytest.CaptureFixture) -> None:
    terminal.configure(json=True)
    try:
        with running(always=openai_server.refuses("seed")) as (url, _):
            subject(url).ask(sample(1))
    finally:
        terminal.configure()
    assert capsys.readouterr().out == ""


def test_requests_are_plain_json() -> None:
    """Text of every script survives the way there and back."""
    key = "\u03ba\u03bb\u03b5\u03b9\u03b4\u03af-\U0001f511"
    text = f"One of the special magic numbers for {key} is: 42."
    question = Question(f"\nThe special magic number for {key} in the text above is:", (" 42",))
    with running() as (url, behaviour):
        (answer,) = subject(url).ask(Sample("t", (text,), (question,)))
    assert "42" in answer
    assert json.dumps(behaviour.seen[0].body)
