"""Ask a model behind an OpenAI-compatible server, politely and until it answers.

in: prompts; out: answers with the tokens they took, and log-probabilities where they are asked for
source: the OpenAI REST API, /v1/chat/completions and /v1/completions; RFC 9110 for Retry-After

One answer is one POST. What may pass (429, 5xx, a timeout, a cut-off connection) is tried again
with waits that double; what cannot pass stops the run with the server's own words. The key is
sent to the one address that was named: redirects are not followed.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from l4cli import __version__, terminal
from l4cli.errors import L4Error, UsageError
from l4cli.evals.endpoint_logprobs import read_logprobs, read_reasoning
from l4cli.evals.endpoint_replies import MAX_REPLY_BYTES, Failure, clean, read_answer, send
from l4cli.evals.parallel import Stopped
from l4cli.evals.token_budget import Promise
from l4cli.text.token_logprobs import TokenLogprobs

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"


class Api(StrEnum):
    """The shape of a request."""

    chat = "chat"
    completions = "completions"


@dataclass(frozen=True)
class EndpointOptions:
    """Where to ask, and how patiently."""

    url: str  # the whole address, as `request_url` makes it
    model: str
    api: Api = Api.chat
    api_key: str | None = field(default=None, repr=False)
    num_jobs: int = 4
    timeout_s: float = 300.0
    max_tries: int = 6
    seed: int = 0
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0  # of our own waits
    longest_retry_after_s: float = 600.0  # of the waits a server may ask for

    @property
    def shown_url(self) -> str:
        """The address for reports: without its query, which may hold what nobody should see."""
        return self.url.partition("?")[0]


@dataclass(frozen=True)
class Ask:
    """What one request asks for."""

    prompt: str | Sequence[Mapping[str, Any]]  # text, or the messages of a chat
    answer_tokens: int  # at most
    temperature: float = 0.0
    top_p: float | None = None  # None: not said
    seed: int | None = None  # None: the endpoint's
    top_logprobs: int = 0  # so many of the likeliest tokens at each place


@dataclass(frozen=True)
class Answer:
    """What a server said, and what it counted; None where it does not count."""

    text: str
    prompt_tokens: int | None
    answer_tokens: int | None
    finish: str | None
    reasoning: str | None = None  # what was thought before, where it is kept apart
    logprobs: TokenLogprobs | None = None


class RequestRefused(L4Error):
    """The server does not take this request, and may well take others."""


class Endpoint:
    """One server and model; `complete` may be called from many threads at once."""

    def __init__(self, options: EndpointOptions) -> None:
        self.options = options
        self.num_requests, self.num_retries = 0, 0  # answered, and tried again
        self.was_answered = False  # in an earlier run, by the same model
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": f"l4/{__version__}",
        }
        if options.api_key:
            self._headers["Authorization"] = f"Bearer {options.api_key}"
        self._opener = urllib.request.build_opener(_NoRedirect)  # proxies: the environment's
        self._slots = threading.Semaphore(options.num_jobs)
        self._first, self._has_answered = threading.Lock(), False
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._resume_at = 0.0
        # What this server is known to refuse, and is asked without.
        self._refused: set[str] = set()
        self._has_missed_logprobs = False
        self._jitter = random.Random(options.seed)

    def stop(self) -> None:
        """End waits; requests that have not begun never will."""
        self._stop.set()

    def complete(self, prompt: str, answer_tokens: int, promise: Promise) -> Answer:
        """Ask for a greedy continuation or answer of at most `answer_tokens`.

        raises: L4Error when it cannot be had, Stopped after `stop`
        """
        return self.ask(Ask(prompt, answer_tokens), promise)

    @property
    def is_stopped(self) -> bool:
        """Whether nothing more is asked."""
        return self._stop.is_set()

    def ask(self, ask: Ask, promise: Promise, *, may_refuse: bool = False) -> Answer:
        """Ask for one answer.

        `may_refuse`: a refusal of this request does not stop the rest, once one was answered.
        raises: RequestRefused; L4Error when no answer can be had; Stopped after `stop`
        """
        with self._slots, self._alone_at_first():
            try:
                return self._until_answered(ask, promise)
            except L4Error as error:
                may_refuse = may_refuse and (self._has_answered or self.was_answered)
                if not (isinstance(error, RequestRefused) and may_refuse):
                    self.stop()  # before the next in the queue has its turn
                raise

    def _until_answered(self, ask: Ask, promise: Promise) -> Answer:
        tries = 0
        while True:
            tries += 1
            self._wait_until(self._resume_at)
            body = self.request(ask)
            try:
                answer = self._try(body, ask.top_logprobs)
            except Failure as failure:
                if failure.may_be_billed:  # whoever reads the whole prompt and then fails
                    promise.charge()
                if failure.refused in body and self._go_without(failure, ask):
                    continue
                self._judge(failure, tries)
                continue
            self._has_answered = True
            with self._lock:
                self.num_requests += 1
            promise.spend(answer.prompt_tokens, answer.answer_tokens)
            return answer

    def _try(self, body: dict[str, Any], top_logprobs: int) -> Answer:
        data = json.dumps(body).encode()
        options = self.options
        post = urllib.request.Request(options.url, data, self._headers, method="POST")
        most = MAX_REPLY_BYTES * (1 + top_logprobs)
        reply = send(self._opener, post, options.timeout_s, options.api_key, most)
        text, prompt_count, answer_count, finish = read_answer(reply)
        choice = reply["choices"][0]
        reasoning, logprobs = read_reasoning(choice), None
        if "logprobs" in body:
            logprobs = read_logprobs(choice)
            if logprobs is None and text:
                self._miss_logprobs()
        return Answer(text, prompt_count, answer_count, finish, reasoning, logprobs)

    def request(self, ask: Ask) -> dict[str, Any]:
        """The body of a request, without what the server refuses."""
        body: dict[str, Any] = {"model": self.options.model}
        is_chat, prompt = self.options.api is Api.chat, ask.prompt
        if is_chat:
            is_text = isinstance(prompt, str)
            body["messages"] = [{"role": "user", "content": prompt}] if is_text else list(prompt)
        else:
            assert isinstance(prompt, str)
            body["prompt"] = prompt
        limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        seed = self.options.seed if ask.seed is None else ask.seed
        settings = {limit: ask.answer_tokens, "temperature": ask.temperature, "seed": seed}
        if ask.top_p is not None:
            settings["top_p"] = ask.top_p
        if ask.top_logprobs and "logprobs" not in self._refused:
            settings |= {"logprobs": True} if is_chat else {"logprobs": ask.top_logprobs}
            settings |= {"top_logprobs": ask.top_logprobs} if is_chat else {}
        body |= {name: value for name, value in settings.items() if name not in self._refused}
        return body

    def _go_without(self, failure: Failure, ask: Ask) -> bool:
        """Leave out a setting this server does not know; once each, and said."""
        name = str(failure.refused)
        with self._lock:
            if name in self._refused:
                return True  # another thread's request has found it out meanwhile
            if name not in _OPTIONAL:
                return False
            self._refused.add(name)
        loss = _OPTIONAL[name]
        if name == "temperature" and ask.temperature > 0:
            loss = "answers are drawn at its own"
        if name == "logprobs":  # it may just be too many of them
            loss += f" ({failure.why})"
        terminal.warn(f"the server refuses `{name}`; {loss}")
        return True

    def _miss_logprobs(self) -> None:
        """Say once that log-probabilities were asked for in vain; they may still come."""
        with self._lock:
            is_known, self._has_missed_logprobs = self._has_missed_logprobs, True
        if not is_known:
            terminal.warn(f"the server leaves out `logprobs`; {_OPTIONAL['logprobs']}")

    @contextmanager
    def _alone_at_first(self) -> Iterator[None]:
        """Let one request find out whether key, model and counts are right, before many go."""
        if self._has_answered:
            yield
            return
        with self._first:
            if not self._has_answered:
                yield
                return
        yield

    def _judge(self, failure: Failure, tries: int) -> None:
        """Plan the next try, or give up. raises: L4Error"""
        options = self.options
        where = f"`{options.shown_url}`"
        is_passing = failure.is_passing and (self._has_answered or not failure.is_absent)
        if not is_passing:
            kind = RequestRefused if failure.is_of_request else L4Error
            raise kind(f"cannot ask {where}", why=failure.why, fix=failure.fix)
        if tries >= options.max_tries:
            fix = f"{failure.fix}; what is finished is kept, and the same command goes on"
            why = f"{failure.why}, in each of {tries} tries"
            raise L4Error(f"gave up asking {where}", why=why, fix=fix)
        wait = min(options.first_wait_s * 2 ** (tries - 1), options.longest_wait_s)
        if failure.retry_after_s is not None:
            if failure.retry_after_s > options.longest_retry_after_s:
                why = f"{failure.why}, and asks to wait {terminal.time_text(failure.retry_after_s)}"
                fix = "run the same command again then; what is finished is kept"
                raise L4Error(f"gave up asking {where}", why=why, fix=fix)
            # Everyone waits: the limit is on the key, not on this request.
            self._resume_at = max(self._resume_at, time.monotonic() + failure.retry_after_s)
            wait = failure.retry_after_s
        with self._lock:
            self.num_retries += 1
            # Up to half as much again, so that threads do not come back all at once.
            wait *= 1 + 0.5 * self._jitter.random()
        self._wait_until(time.monotonic() + wait)

    def _wait_until(self, moment: float) -> None:
        if self._stop.wait(max(0.0, moment - time.monotonic())):
            raise Stopped


def request_url(endpoint: str, api: Api) -> str:
    """The address requests go to: `http://host:8000`, `.../v1` or the whole of it will do.

    raises: UsageError
    """
    what = f"cannot use the endpoint `{terminal_safe(endpoint)}`"
    fix = "write it like `--endpoint http://127.0.0.1:8000/v1`"
    try:
        parts = urllib.parse.urlsplit(endpoint)
        is_usable = parts.hostname is not None and parts.port != 0
    except ValueError as error:
        raise UsageError(what, why=str(error).lower(), fix=fix) from error
    if parts.scheme not in ("http", "https") or not is_usable:
        raise UsageError(what, why="it is no `http://` or `https://` address of a host", fix=fix)
    if parts.username is not None or parts.password is not None:
        why = "it holds a name or a password, which would be shown in reports"
        raise UsageError("cannot use this endpoint", why=why, fix="use `--api-key-env NAME`")
    if not endpoint.isascii() or any(c.isspace() or not c.isprintable() for c in endpoint):
        raise UsageError(what, why="it holds blanks or signs that addresses do not have", fix=fix)
    path = parts.path.rstrip("/") or "/v1"
    tail = "/chat/completions" if api is Api.chat else "/completions"
    is_chat = path.endswith("/chat/completions")
    if not path.endswith("/completions"):
        path += tail
    elif is_chat != (api is Api.chat):
        other = "chat" if is_chat else "completions"
        why = f"its path is that of the other kind of request, not of `--api {api}`"
        raise UsageError(what, why=why, fix=f"use `--api {other}`, or end the address in `/v1`")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def terminal_safe(text: str) -> str:
    """A user's word as it can be shown: never the password in an address."""
    return clean(re.sub(r"//[^/@]*@", "//(hidden)@", text))


def api_key_from(variable: str | None) -> str | None:
    """The key in an environment variable; None named: `OPENAI_API_KEY`, if it is set at all.

    raises: UsageError for a variable that is named and not set, and for what cannot be a key
    """
    name = variable or DEFAULT_KEY_VARIABLE
    key = os.environ.get(name)
    if not key:
        if variable is None:
            return None
        why = f"the environment variable `{name}` is not set or empty"
        raise UsageError("there is no key for the endpoint", why=why, fix=f"export {name}=...")
    if not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
        why = f"`{name}` holds blanks, line ends or signs that no key has"
        raise UsageError("cannot use the key", why=why, fix=f"export {name}=... with the key alone")
    return key


_OPTIONAL = {
    "max_tokens": "it is asked for `max_completion_tokens`",
    "temperature": "answers are not greedy, and may differ from run to run",
    "seed": "answers may differ from run to run",
    "top_p": "answers are drawn from all tokens",
    "logprobs": "answers come without log-probabilities",
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like others: the key must not travel to addresses nobody named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
