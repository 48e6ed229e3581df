"""What comes back from a server: an answer, or a failure put in words.

in: an HTTP exchange; out: the text and its token counts, or `Failure`, which says if it may pass
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import re
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

MAX_REPLY_BYTES = 16 << 20
_MAX_WORDS = 240  # of a server's message
_PASSING = (408, 409, 425, 429)  # and 5xx

KEY_FIX = "put a valid key into `OPENAI_API_KEY`, or name another variable with `--api-key-env`"
URL_FIX = "check `--endpoint`: it is the address that ends in `/v1` as a rule"
LATER_FIX = "try again later, with fewer `--jobs`"
TIMEOUT_FIX = "raise `--timeout`, or ask with fewer `--jobs`"


class Failure(Exception):
    """One try that brought no answer."""

    def __init__(
        self,
        why: str,
        fix: str,
        *,
        is_passing: bool = False,  # the next try may succeed
        may_be_billed: bool = False,
        is_absent: bool = False,  # nobody is there; passing only if somebody was before
        retry_after_s: float | None = None,
        refused: str | None = None,  # the setting the server does not take
        is_of_request: bool = False,  # of this one, so that others may succeed
    ) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix
        self.is_passing, self.may_be_billed, self.is_absent = is_passing, may_be_billed, is_absent
        self.retry_after_s, self.refused = retry_after_s, refused
        self.is_of_request = is_of_request


def send(
    opener: urllib.request.OpenerDirector,
    request: urllib.request.Request,
    timeout_s: float,
    secret: str | None = None,
    max_bytes: int = MAX_REPLY_BYTES,
) -> Any:
    """Make one exchange and parse its JSON; `secret` never appears in words. raises: Failure"""
    deadline = time.monotonic() + timeout_s
    try:
        with opener.open(request, timeout=timeout_s) as response:
            data = _read(response, deadline, max_bytes)
            kind = response.headers.get("Content-Type", "")
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, secret) from error
    except (TimeoutError, urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _broken(error, timeout_s) from error
    return _parse(data, kind, secret)


def _read(response: Any, deadline: float, max_bytes: int) -> bytes:
    """The whole body. A server that drips is as late as one that is silent."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            why = f"its answer is longer than {max_bytes >> 20} MiB"
            raise Failure(why, URL_FIX, may_be_billed=True)
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # less came than was promised
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _refusal(error: urllib.error.HTTPError, secret: str | None) -> Failure:
    """A status that is no success."""
    try:
        data = error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        data = b""
    if 300 <= error.code < 400:
        target = clean(error.headers.get("Location", "nowhere"), secret)
        why = f"it redirects to `{target}`, and keys are not sent to other addresses"
        return Failure(why, "pass the address it redirects to with `--endpoint`")
    return of_status(error.code, _message(data, secret), _retry_after(error.headers), data)


def of_status(
    status: int, message: str, retry_after_s: float | None = None, data: bytes = b""
) -> Failure:
    """What a status means."""
    why = f"the server answers {status}" + (f": {message}" if message else "")
    if status in (401, 403):
        return Failure(why, KEY_FIX)
    if status == 429 and b"insufficient_quota" in data:
        return Failure(why, "the account behind the key has nothing left: add to it")
    if status in _PASSING or (status >= 500 and status != 501):
        return Failure(why, LATER_FIX, is_passing=True, retry_after_s=retry_after_s)
    if status == 404:
        return Failure(
            why, f"{URL_FIX}; and `--model`: the server lists its models at `/v1/models`"
        )
    if status in (400, 413, 422):
        fix = "use shorter `--lengths` if the context is too long, else check `--model` and `--api`"
        return Failure(why, fix, refused=_refused_setting(data), is_of_request=True)
    return Failure(why, URL_FIX)


def _refused_setting(data: bytes) -> str | None:
    """The name of a setting that an error is about, where it says so."""
    error = _error_of(_json_or_none(data))
    if b"logprobs" in data:  # whatever way it is said: too many of them, or none at all
        return "logprobs"
    if not isinstance(error, dict):
        return None
    code, name = str(error.get("code")), error.get("param")
    if isinstance(name, str) and code in ("unsupported_parameter", "unsupported_value"):
        return name
    return None


def _broken(error: Exception, timeout_s: float) -> Failure:
    """No HTTP answer at all, or half of one."""
    reason = getattr(error, "reason", None)
    cause = reason if isinstance(reason, Exception) else error
    if isinstance(cause, TimeoutError):
        why = f"no answer came within {timeout_s:g} s"
        return Failure(why, TIMEOUT_FIX, is_passing=True, may_be_billed=True)
    if isinstance(cause, ssl.SSLCertVerificationError):
        why = f"its certificate is not trusted: {clean(cause.verify_message)}"
        return Failure(why, "use the right host name, or set `SSL_CERT_FILE` to its authority")
    if isinstance(cause, ConnectionRefusedError):
        why = "nothing listens there (connection refused)"
        return Failure(why, f"start the server; {URL_FIX}", is_passing=True, is_absent=True)
    if isinstance(cause, http.client.IncompleteRead | ConnectionError):
        why = "the connection was cut off in the middle of an answer"
        return Failure(why, LATER_FIX, is_passing=True, may_be_billed=True)
    if isinstance(cause, http.client.HTTPException):
        why = f"it does not speak HTTP: {clean(str(cause) or type(cause).__name__)}"
        return Failure(why, URL_FIX)
    why = f"it cannot be reached: {clean(str(cause))}"
    return Failure(why, URL_FIX, is_passing=True, is_absent=True)


def _parse(data: bytes, kind: str, secret: str | None) -> Any:
    reply = _json_or_none(data)
    if reply is None:
        start = data.lstrip()[:200].decode(errors="replace")
        if "html" in kind.lower() or start.lower().startswith(("<!doctype", "<html")):
            title = re.search(rb"<title>(.*?)</title>", data, re.IGNORECASE | re.DOTALL)
            name = clean(title[1].decode(errors="replace"), secret) if title else "no title"
            why = f"it answers with a web page ({name}), not with JSON"
        else:
            shown = clean(start, secret)[:60]
            why = f"it answers `{shown}`, which is not JSON" if shown else "its answer is empty"
        raise Failure(why, URL_FIX, may_be_billed=True)
    error = _error_of(reply)
    if error and not (isinstance(reply, dict) and reply.get("choices")):
        # Some gateways report errors under status 200.
        code = error.get("code") if isinstance(error, dict) else None
        is_status = isinstance(code, int) and 300 <= code < 600
        status = code if isinstance(code, int) and is_status else 200
        raise of_status(status, _message(data, secret), None, data)
    return reply


def read_answer(reply: Any) -> tuple[str, int | None, int | None, str | None]:
    """The text, tokens of prompt and answer, and why it ended. raises: Failure"""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError):
        has = ", ".join(f"`{name}`" for name in list(reply)[:8]) if isinstance(reply, dict) else ""
        why = "its JSON has no answer in `choices`" + (f": it has {clean(has)}" if has else "")
        raise Failure(why, f"{URL_FIX}; and `--api`", may_be_billed=True) from None
    if isinstance(text, list):  # parts, as some servers have them
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if text is None:  # nothing but thinking, or a refusal: an answer, and not the right one
        text = ""
    if not isinstance(text, str):
        why = f"its answer is of type {type(text).__name__}, not text"
        raise Failure(why, f"{URL_FIX}; and `--api`", may_be_billed=True)
    usage = reply.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    finish = choice.get("finish_reason")
    return (
        text,
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        finish if isinstance(finish, str) else None,
    )


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count else None


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _error_of(reply: Any) -> Any:
    return reply.get("error") if isinstance(reply, dict) else None


def _message(data: bytes, secret: str | None) -> str:
    """The server's own words."""
    reply = _json_or_none(data)
    error = _error_of(reply)
    if isinstance(error, dict):
        error = error.get("message") or error.get("code") or error
    if error is None and isinstance(reply, dict):
        error = reply.get("message") or reply.get("detail")
    if error is None and reply is None and not data.lstrip().startswith(b"<"):
        error = data.decode(errors="replace")
    return clean(str(error), secret) if error else ""


def clean(words: str, secret: str | None = None) -> str:
    """Foreign words made fit for one line: no control characters, not too long, no key."""
    if secret:
        words = words.replace(secret, "(the key)")
    words = "".join(c if c.isprintable() else " " for c in words)
    words = " ".join(words.split()).rstrip(".")
    return words if len(words) <= _MAX_WORDS else words[: _MAX_WORDS - 3] + "..."


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait: a number, or a date."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
