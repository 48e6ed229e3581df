"""A server that speaks the OpenAI shapes over real HTTP, reads needles, and fails on demand.

Its answers come from the prompt alone: it searches the text for the key that is asked for, so a
client that garbles a prompt gets a wrong answer. Told how its tokenizer cuts a text and what else
was likely it shows log-probabilities too.
"""

from __future__ import annotations

import json
import math
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "sk-test-0123456789"
ASKED = re.compile(r"for (.+) in the text above (?:is|are):\s*$")


def find_needle(prompt: str) -> str:
    """The values of the keys that the end of the prompt asks for."""
    asked = ASKED.search(prompt)
    if asked is None:
        return "I do not understand the question."
    found = []
    for key in re.split(r", | and ", asked[1].rpartition(" for ")[2]):
        found += re.findall(rf"for {re.escape(key)} is: (\S+?)\.", prompt)
    return ", ".join(found) if found else "It is not in the text."


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time_s: float


Failing = Callable[["Handler"], None]
Likely = list[tuple[bytes, float]]  # tokens and log-probabilities


def likely_letters(place: int, token: bytes) -> Likely:
    """The token itself at 0.6, two others at 0.25 and 0.05: 0.9 are shown."""
    others = [bytes([c]) for c in b"abc" if bytes([c]) != token][:2]
    return [(token, math.log(0.6)), (others[0], math.log(0.25)), (others[1], math.log(0.05))]


@dataclass
class Behaviour:
    """How the server behaves; tests change it while it runs."""

    failures: list[Failing] = field(default_factory=list)  # for the next requests, in order
    always: Failing | None = None  # for every request
    delay_s: float = 0.0
    counts_tokens: bool = True
    bytes_per_token: float = 4.0
    key: str | None = KEY
    max_model_len: int | None = None
    speak: Callable[[dict[str, Any]], str] | None = None  # answers a body instead of the needles
    reasoning: str | None = None  # shown beside the answers of a chat
    finish: Callable[[str], str] = lambda text: "stop"
    cut: Callable[[str], list[bytes]] | None = None  # its tokenizer; None: no log-probabilities
    likely: Callable[[int, bytes], Likely] = likely_letters
    end_token: bytes | None = None  # shown among the log-probabilities, as some servers do
    seen: list[Seen] = field(default_factory=list)
    num_now: int = 0
    num_most: int = 0  # requests at one time
    lock: threading.Lock = field(default_factory=threading.Lock)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    scheme = "http"

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    is_counted = False

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "reader", "object": "model"}]})

    def do_POST(self) -> None:
        behaviour = self.server.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with behaviour.lock:
            behaviour.seen.append(Seen(self.path, dict(self.headers), body, time.monotonic()))
            behaviour.num_now += 1
            behaviour.num_most = max(behaviour.num_most, behaviour.num_now)
            failing = behaviour.failures.pop(0) if behaviour.failures else behaviour.always
        self.body, self.is_counted = body, True
        try:
            (failing or Handler.answer)(self)
        finally:
            self.leave()

    def leave(self) -> None:
        """Count this request no longer: before its last byte, or the client is faster."""
        behaviour = self.server.behaviour
        with behaviour.lock:
            behaviour.num_now -= self.is_counted
            self.is_counted = False

    def answer(self) -> None:
        """Read the prompt and answer, in the shape of the path."""
        behaviour = self.server.behaviour
        if behaviour.key and self.headers.get("Authorization") != f"Bearer {behaviour.key}":
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.fail(401, f"Incorrect API key provided: {given}.", "invalid_api_key")
            return
        time.sleep(behaviour.delay_s)
        path = urllib.parse.urlsplit(self.path).path  # a proxy gets the whole address
        is_chat = path == "/v1/chat/completions"
        if not is_chat and path != "/v1/completions":
            self.fail(404, f"no such path: {self.path}", "not_found")
            return
        if self.body["model"] != "reader":
            self.fail(404, f"The model `{self.body['model']}` does not exist.", "model_not_found")
            return
        prompt = self.body["messages"][-1]["content"] if is_chat else self.body["prompt"]
        num_prompt = round(len(prompt.encode()) / behaviour.bytes_per_token)
        if behaviour.max_model_len and num_prompt > behaviour.max_model_len:
            words = f"This model's maximum context length is {behaviour.max_model_len} tokens."
            self.fail(400, words, "context_length_exceeded")
            return
        if behaviour.speak is not None:
            text = behaviour.speak(self.body)
        else:
            value = find_needle(prompt)
            text = f"The value is **{value}**, as the text says." if is_chat else f" {value}. So"
        self.reply(200, self.shaped(text, is_chat, num_prompt))

    def shaped(self, text: str, is_chat: bool, num_prompt: int) -> dict[str, Any]:
        behaviour = self.server.behaviour
        choice: dict[str, Any] = {"index": 0, "finish_reason": behaviour.finish(text)}
        if is_chat:
            choice["message"] = {"role": "assistant", "content": text}
            if behaviour.reasoning is not None:
                choice["message"]["reasoning_content"] = behaviour.reasoning
        else:
            choice["text"] = text
        if self.body.get("logprobs") and behaviour.cut is not None:
            choice["logprobs"] = self.logprobs(behaviour.cut(text), is_chat)
        reply = {"id": "x", "object": "completion", "model": "reader", "choices": [choice]}
        if self.server.behaviour.counts_tokens:
            num_answer = len(text) // 4
            reply["usage"] = {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_answer,
                "total_tokens": num_prompt + num_answer,
            }
        return reply

    def logprobs(self, tokens: list[bytes], is_chat: bool) -> dict[str, Any]:
        behaviour = self.server.behaviour
        if behaviour.end_token is not None:
            tokens = [*tokens, behaviour.end_token]
        tops = [behaviour.likely(i, token) for i, token in enumerate(tokens)]
        said = [dict(top).get(token, -9.0) for token, top in zip(tokens, tops, strict=True)]
        if not is_chat:
            names = [_named(token) for token in tokens]
            shown = [{_named(token): p for token, p in top} for top in tops]
            return {"tokens": names, "token_logprobs": said, "top_logprobs": shown}
        num_shown = self.body["top_logprobs"]
        content = []
        for token, logprob, top in zip(tokens, said, tops, strict=True):
            item: dict[str, Any] = _shown(token, logprob)
            item["top_logprobs"] = [_shown(*other) for other in top[:num_shown]]
            content.append(item)
        return {"content": content}

    def fail(self, status: int, message: str, code: str, **more: Any) -> None:
        """An error in OpenAI's shape."""
        headers = more.pop("headers", {})
        error = {"message": message, "type": "error", "param": None, "code": code} | more
        self.reply(status, {"error": error}, **headers)

    def reply(self, status: int, body: Any, **headers: str) -> None:
        self.raw(status, json.dumps(body).encode(), "application/json", **headers)

    def raw(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.leave()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()


def _named(token: bytes) -> str:
    """How completions spell a token that is no text."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _shown(token: bytes, logprob: float) -> dict[str, Any]:
    text = token.decode(errors="replace")
    return {"token": text, "logprob": logprob, "bytes": list(token)}


# Ways to fail


def rate_limited(retry_after: str | None) -> Failing:
    """429, with a wait to ask for."""
    headers = {} if retry_after is None else {"Retry_After": retry_after}
    return lambda handler: handler.fail(429, "Slow down.", "rate_limit_exceeded", headers=headers)


def broken(status: int) -> Failing:
    """A status of the server's own fault."""
    return lambda handler: handler.raw(status, b"upstream is gone\n", "text/plain")


def slow(time_s: float) -> Failing:
    """Silence, then an answer."""

    def run(handler: Handler) -> None:
        time.sleep(time_s)
        handler.answer()

    return run


def dripping(handler: Handler) -> None:
    """A byte now and then: always alive, never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def cut_off(handler: Handler) -> None:
    """Half an answer, then the line is dead."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.hang_up()


def no_word(handler: Handler) -> None:
    """The line is dead before any answer."""
    handler.hang_up()


def says(data: bytes, kind: str = "application/json", status: int = 200) -> Failing:
    """Whatever a test wants."""
    return lambda handler: handler.raw(status, data, kind)


def refuses(name: str) -> Failing:
    """Answers only requests without this setting."""

    def run(handler: Handler) -> None:
        if name not in handler.body:
            handler.answer()
            return
        words = f"Unsupported parameter: '{name}' is not supported with this model."
        handler.fail(400, words, "unsupported_parameter", param=name)

    return run


@contextmanager
def running(certificate: Path | None = None, **options: Any) -> Iterator[tuple[str, Behaviour]]:
    """A server in this process; its address, and what to change about it."""
    behaviour = Behaviour(**options)
    server = Server(behaviour)
    if certificate is not None:  # with its key in the same file
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.scheme = "https"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.url, behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
