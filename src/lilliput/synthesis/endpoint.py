"""A teacher behind a URL: any endpoint that speaks OpenAI's chat completions, or the older completions.

Source: OpenAI's API reference, `/chat/completions`, `/completions`, `/models`; llama.cpp, vLLM, Ollama and most
providers offer the same. What happens to a request that was not answered well:

    no connection, time-out, broken line, 429, 5xx, 408 …    again, later and later; then TeacherError
    an answer that is no JSON, or has no choices              again; then, if a plain question is answered, Reply.error
    400 that names a field that may be left out               again without it, said once, remembered
    400, 413, 422 …                                           Reply.error, if a plain question is answered
    held back by a content filter                             Reply.error
    401, 402, 403, 404, a redirect, no credit                 TeacherError at once, with what to do

The "plain question" ("Hi") tells what is wrong with one request from what is wrong with all of them.

The key is read from the environment for each batch, and goes nowhere but into the header: not into errors, not into
the journal. It is not sent unencrypted to another machine unless that is asked for, and redirects are not followed.
Not here: how a batch is asked (`asking.py`), the words of the API (`completions_api.py`), streaming, tools, pictures.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ipaddress
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from lilliput import __version__
from lilliput.errors import TeacherError, UsageError
from lilliput.progress import warn
from lilliput.synthesis.asking import IS_IT_THERE, Batch, reason
from lilliput.synthesis.completions_api import message_of
from lilliput.synthesis.pace import Pace
from lilliput.synthesis.teacher import Reply, Request

_SHOWN = 300  # characters of an endpoint's message that a person gets to read


@dataclass(frozen=True)
class EndpointSettings:
    """Where an endpoint is and how it is asked; plain values, so that another process can make the same Endpoint.

    url: up to `/v1`. model: its name there. key_env: the environment variable with the key; it may be unset.
    key_over_http: send the key unencrypted to another machine. completions: continue plain text, without turns.
    concurrency: requests at the same time. requests_per_minute, tokens_per_minute: None for no limit.
    timeout: seconds for one answer. connect_timeout: seconds for a connection.
    retries: how often a request is tried again. first_wait, longest_wait: seconds before the first, and at most.

    Raises UsageError for a value that cannot be.
    """

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    key_over_http: bool = False
    completions: bool = False
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 600.0
    connect_timeout: float = 10.0
    retries: int = 8
    first_wait: float = 1.0
    longest_wait: float = 120.0

    def __post_init__(self) -> None:
        check_url(self.url)
        for name, (option, holds, expected) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UsageError(f"{value} is not {expected}", where=option)

    @property
    def base(self) -> str:
        """The URL without what people paste behind it: `/`, `/chat/completions`."""
        return re.sub(r"(/chat)?(/completions)?/*$", "", self.url.strip())


_LIMITS: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "concurrency": ("--concurrency", lambda x: x >= 1, "a whole number from 1 up"),
    "requests_per_minute": ("--rpm", lambda x: 0 < x < float("inf"), "a number above 0"),
    "tokens_per_minute": ("--tpm", lambda x: 0 < x < float("inf"), "a number above 0"),
    "timeout": ("--timeout", lambda x: 0 < x < float("inf"), "a number of seconds above 0"),
    "retries": ("--retries", lambda x: x >= 0, "a whole number from 0 up"),
}


def check_url(url: str) -> httpx2.URL:
    """The URL, parsed. Raises UsageError when it is none, or holds what does not belong there."""
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise UsageError(f"'{url}' is no URL ({error})", where="--model") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"'{url}' is no URL of an endpoint", where="--model", todo="E.g. http://localhost:8000/v1")
    if parsed.userinfo or parsed.query:
        part = "a name or password" if parsed.userinfo else "a query (?…)"
        todo = "The key comes from the environment (--key-env)."
        raise UsageError(f"the URL of {parsed.host} holds {part}", where="--model", todo=todo)
    return parsed


class Endpoint:
    """A model behind a URL, as a `Teacher`. Nothing is sent before the first `complete` or `models`."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self.left_out: set[str] = set()  # fields that it does not take
        self.reached = False  # whether there ever was an answer, of whatever kind
        self._said: set[str] = set()

    @property
    def name(self) -> str:
        """The model's name at the endpoint, and whether it continues plain text."""
        return f"{self.settings.model} (plain text)" if self.settings.completions else self.settings.model

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Answer all, `concurrency` at a time, each as (its number, the reply) as it comes; see the top of the file.

        The requests run in an event loop in a thread of its own; closing the iterator (or Ctrl-C) cancels them.
        """
        batch = Batch(self)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="endpoint", daemon=True)
        thread.start()
        try:
            futures = {
                asyncio.run_coroutine_threadsafe(batch.answer(request), loop): number
                for number, request in enumerate(requests)
            }
            yield from _as_they_come(futures)
        finally:
            asyncio.run_coroutine_threadsafe(batch.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def models(self) -> list[str]:
        """The names of the models there. Raises TeacherError when it does not say."""
        try:
            with httpx2.Client(**self.connection()) as http:
                response = http.get("models")
        except httpx2.TransportError as error:
            raise self.away(f"cannot be reached ({reason(error)})") from error
        self.reached = True
        if response.status_code != 200:
            raise self.refusal(response)
        try:
            return [str(row["id"]) for row in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self.away("does not list its models as OpenAI's API does", "Name one with --name.") from error

    # ---- what a batch needs ---------------------------------------------------------------------------------------

    def connection(self) -> dict[str, Any]:
        """How a client is made: address, key, time-outs. A proxy of the environment is not asked for this machine."""
        settings = self.settings
        headers = {"User-Agent": f"lilliput/{__version__}"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        return {
            "base_url": settings.base,
            "headers": headers,
            "timeout": httpx2.Timeout(settings.timeout, connect=settings.connect_timeout, pool=None),
            "limits": httpx2.Limits(max_connections=settings.concurrency + 1),
            "trust_env": not _is_local(settings.base),
        }

    def once(self, what: str) -> None:
        """Say a thing that happens again and again, the first time."""
        if what not in self._said:
            self._said.add(what)
            warn(f"{self.settings.base}: {what}")

    def away(self, what: str, todo: str = IS_IT_THERE) -> TeacherError:
        """The error that ends a run."""
        return TeacherError(what, where=self.settings.base, todo=todo)

    def refusal(self, response: httpx2.Response) -> TeacherError:
        """The error for a status that will be the same for every request."""
        status, variable = response.status_code, self.settings.key_env
        key = f"Put a valid key into the environment variable {variable}, or name another one with --key-env."
        if status == 401 and not self._key():
            return self.away(f"asks for a key, and none was sent ({self.message(response)})", key)
        if 300 <= status < 400:
            return self.away(f"sends us on to {response.headers.get('Location', 'nowhere')}", "Give the URL it means.")
        todos = {401: key, 403: key, 402: "Add credit there, then run the same command again.", 404: self._path()}
        return self.away(f"answers {status}: {self.message(response)}", todos.get(status, "Is the URL right?"))

    def message(self, response: httpx2.Response) -> str:
        """The endpoint's own words, short and without our key."""
        said = " ".join(message_of(response).split())
        if key := os.environ.get(self.settings.key_env, "").strip():
            said = said.replace(key, "***")
        return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"

    def _path(self) -> str:
        base = self.settings.base
        return "Is the URL right?" if base.endswith("/v1") else f"Is it {base}/v1?"

    def _key(self) -> str:
        """The key to send; "" for none."""
        variable = self.settings.key_env
        key = os.environ.get(variable, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise UsageError("holds characters that no key has", where=f"environment variable {variable}")
        safe = self.settings.base.startswith("https:") or _is_local(self.settings.base)
        if key and not safe and not self.settings.key_over_http:
            self.once(f"the key in {variable} is not sent, since the way there is not encrypted (--key-over-http)")
            return ""
        return key


def _as_they_come(futures: dict[concurrent.futures.Future[Reply], int]) -> Iterator[tuple[int, Reply]]:
    """Replies as they come; on an error all that are there, then the error."""
    waiting = dict(futures)
    for future in concurrent.futures.as_completed(futures):
        if future.exception() is None:
            yield waiting.pop(future), future.result()
            continue
        for other in list(waiting):
            if other.done() and other.exception() is None:
                yield waiting.pop(other), other.result()
        future.result()


def _is_local(url: str) -> bool:
    """Whether a URL is on this machine."""
    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
