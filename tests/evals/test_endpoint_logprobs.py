"""Log-probabilities and thoughts as servers send them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from openai_server import KEY, Handler, refuses, running, says

from l4cli.errors import L4Error
from l4cli.evals.endpoint import (
    Api,
    Ask,
    Endpoint,
    EndpointOptions,
    RequestRefused,
    request_url,
)
from l4cli.evals.endpoint_logprobs import read_logprobs, read_reasoning
from l4cli.evals.token_budget import TokenBudget
from l4cli.text.token_logprobs import TokenLogprobs

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def endpoint(url: str, api: Api = Api.chat) -> Endpoint:
    address = request_url(url, api)
    return Endpoint(EndpointOptions(address, "reader", api, KEY, max_tries=1, timeout_s=10))


def promise() -> Any:
    return TokenBudget(None, is_exact=False).promise([(1, 1)])[0]


def item(token: str, logprob: float, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": None} | more


def test_chats_show_bytes_where_a_token_is_no_text() -> None:
    content = [
        item("\ufffd", -0.5, bytes=[0xE2, 0x82], top_logprobs=[item("\u20ac", -2.0)]),
        item("<|eot|>", -0.25, top_logprobs=[]),
    ]
    found = read_logprobs({"logprobs": {"content": content}})
    assert found is not None
    assert found.tokens == (b"\xe2\x82", b"<|eot|>")
    assert found.logprobs == (-0.5, -0.25)
    assert found.top == (((("\u20ac").encode(), -2.0),), ())


def test_completions_spell_bytes_out() -> None:
    found = read_logprobs(
        {
            "logprobs": {
                "tokens": ["bytes:\\xe2\\x82", " a"],
                "token_logprobs": [-1, -0.1],
                "top_logprobs": [{"bytes:\\xe2\\x82": -1, "b": -3}, None],
            }
        }
    )
    assert found is not None
    assert found.tokens == (b"\xe2\x82", b" a")
    assert found.top == (((b"\xe2\x82", -1.0), (b"b", -3.0)), ())


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        [],
        {},
        {"content": []},
        {"content": None},
        {"content": ["x"]},
        {"content": [{"token": "x", "logprob": "y", "top_logprobs": []}]},
        {"content": [{"token": "x", "logprob": math.nan, "top_logprobs": []}]},
        {"content": [{"token": "x", "logprob": 3.0, "top_logprobs": []}]},
        {"content": [{"token": "x", "bytes": [999], "logprob": -1, "top_logprobs": []}]},
        {"tokens": ["x"], "token_logprobs": [None]},
        {"tokens": ["x"], "token_logprobs": [-1, -2]},
        {"tokens": "x"},
    ],
)
def test_other_shapes_are_no_log_probabilities(logprobs: Any) -> None:
    assert read_logprobs({"logprobs": logprobs}) is None


def test_thoughts_go_by_two_names() -> None:
    assert read_reasoning({"message": {"reasoning_content": "so"}}) == "so"
    assert read_reasoning({"message": {"reasoning": "so", "reasoning_content": None}}) == "so"
    assert read_reasoning({"message": {"reasoning": {"effort": "low"}}}) is None
    assert read_reasoning({"text": "x"}) is None


def test_json_keeps_every_byte() -> None:
    said = TokenLogprobs(
        (b"\xff\xfe", "\u00e9".encode()), (-math.inf, -0.1234567), (((b"\x80", -1.5),), ())
    )
    text = json.dumps(said.to_json(), allow_nan=False)
    again = TokenLogprobs.from_json(json.loads(text))
    assert again.tokens == said.tokens
    assert again.logprobs == (-9999.0, -0.123457)
    assert again.top == said.top
    short = said.to_json() | {"logprobs": [-0.5]}
    with pytest.raises(ValueError, match="one length"):
        TokenLogprobs.from_json(short)


@pytest.mark.parametrize("api", list(Api))
def test_an_answer_brings_what_was_asked_for(api: Api) -> None:
    def cut(text: str) -> list[bytes]:
        return [text[i : i + 3].encode() for i in range(0, len(text), 3)]

    prompt = MESSAGES if api is Api.chat else "Hi"
    ask = Ask(prompt, 9, temperature=0.7, top_p=0.9, seed=5, top_logprobs=2)
    with running(speak=lambda body: "Hello.", cut=cut, reasoning="hm") as (url, behaviour):
        answer = endpoint(url, api).ask(ask, promise())
    assert answer.text == "Hello."
    assert answer.reasoning == ("hm" if api is Api.chat else None)
    assert answer.logprobs is not None
    assert answer.logprobs.tokens == (b"Hel", b"lo.")
    assert answer.logprobs.logprobs[0] == pytest.approx(math.log(0.6))
    if api is Api.chat:
        assert [len(top) for top in answer.logprobs.top] == [2, 2]
    body = behaviour.seen[0].body
    wanted = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "max_tokens": 9}
    wanted |= {"logprobs": True, "top_logprobs": 2} if api is Api.chat else {"logprobs": 2}
    wanted |= {"messages": MESSAGES} if api is Api.chat else {"prompt": "Hi"}
    assert body == wanted | {"model": "reader"}


@pytest.mark.parametrize("name", ["logprobs", "top_logprobs"])
def test_a_server_that_refuses_them_is_asked_without_and_it_is_said(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Ask(MESSAGES, 9, top_logprobs=30)
    with running(speak=lambda body: "Hello.", always=refuses(name)) as (url, behaviour):
        server = endpoint(url)
        assert server.ask(asked, promise()).logprobs is None
        assert server.ask(asked, promise()).text == "Hello."
    assert len(behaviour.seen) == 3
    assert capsys.readouterr().err.count("refuses `logprobs`") == 1


def test_whatever_words_a_server_refuses_them_in(capsys: pytest.CaptureFixture[str]) -> None:
    words = "Requested sample logprobs of 30, which is greater than max allowed: 20"
    with running(speak=lambda body: "Hello.") as (url, behaviour):
        behaviour.failures = [
            says(json.dumps({"message": words, "code": 400}).encode(), status=400)
        ]
        answer = endpoint(url).ask(Ask(MESSAGES, 9, top_logprobs=30), promise())
    assert answer.text == "Hello."
    assert "max allowed: 20" in capsys.readouterr().err


def test_one_refused_request_stops_the_rest_only_where_that_is_wanted() -> None:
    refusal = says(b'{"error": {"message": "too long"}}', status=400)
    with running(speak=lambda body: "Hello.") as (url, behaviour):
        server = endpoint(url)
        behaviour.failures = [Handler.answer, refusal, Handler.answer, refusal]
        assert server.ask(Ask(MESSAGES, 9), promise(), may_refuse=True).text == "Hello."
        with pytest.raises(RequestRefused):
            server.ask(Ask(MESSAGES, 9), promise(), may_refuse=True)
        assert not server.is_stopped
        assert server.ask(Ask(MESSAGES, 9), promise()).text == "Hello."
        with pytest.raises(L4Error):
            server.complete("Hi", 9, promise())
        assert server.is_stopped


def test_the_first_request_must_be_taken() -> None:
    with running(speak=lambda body: "Hello.") as (url, behaviour):
        behaviour.failures = [says(b'{"error": {"message": "no such field"}}', status=400)]
        server = endpoint(url)
        with pytest.raises(RequestRefused):
            server.ask(Ask(MESSAGES, 9), promise(), may_refuse=True)
        assert server.is_stopped


def test_many_log_probabilities_may_take_more_room_than_a_text() -> None:
    body = {"choices": [{"message": {"content": "x"}}], "padding": "." * (17 << 20)}
    with running(always=says(json.dumps(body).encode())) as (url, _):
        assert endpoint(url).ask(Ask(MESSAGES, 9, top_logprobs=1), promise()).text == "x"
        with pytest.raises(L4Error) as caught:
            endpoint(url).ask(Ask(MESSAGES, 9), promise())
        assert "longer than 16 MiB" in caught.value.why
