"""A batch of requests to an endpoint in one event loop: so many at a time, tried again, until each has its final reply.

What happens to a request that was not answered well stands at the top of `endpoint.py`. Not here: the words of the
API (`completions_api.py`), the rate (`pace.py`).
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx2

from lilliput.errors import TeacherError, nearest
from lilliput.synthesis.completions_api import OPTIONAL, fields_of, held_back, not_taken, reply_of
from lilliput.synthesis.journal import json_bytes
from lilliput.synthesis.pace import retry_after
from lilliput.synthesis.teacher import Reply, Request

if TYPE_CHECKING:
    from lilliput.synthesis.endpoint import Endpoint

_PATIENCE = 3600.0  # seconds; an endpoint that asks for a longer pause ends the run
_SLOW = 2  # tries again after a time-out, each of which may take ten minutes
IS_IT_THERE = "Is the URL right, and the server running?"
_LESS = "Ask less at once (--concurrency, --rpm, --tpm), or wait a little."
_LONGER = "Give it more time (--timeout), or ask less at once (--concurrency)."


class _Again(Exception):
    """A try that failed and may do better.

    todo: for a person, if it does not. wait: seconds that the endpoint asked for. alone: others may be answered well.
    most: so often at most it is tried again after faults of this kind.
    """

    def __init__(
        self, what: str, todo: str = IS_IT_THERE, wait: float | None = None, alone: bool = False, most: int = 99
    ) -> None:
        super().__init__(what)
        self.todo, self.wait, self.alone, self.most = todo, wait, alone, most


class _Refused(Exception):
    """This request gets no answer, after so many tries. sure: no need to ask whether others do."""

    def __init__(self, what: str, finish: str = "refused", sure: bool = False, tries: int = 1) -> None:
        super().__init__(what)
        self.finish, self.sure, self.tries = finish, sure, tries


class Batch:
    """The requests of one `complete`, in its event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.settings = endpoint, endpoint.settings
        self.http = httpx2.AsyncClient(**endpoint.connection())
        self.gate = asyncio.Semaphore(self.settings.concurrency)
        self.over = False  # the endpoint is out of reach: nothing more is asked

    async def close(self) -> None:
        """Cancel what is still asked."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.http.aclose()

    async def answer(self, request: Request) -> Reply:
        """The final reply to a request."""
        async with self.gate:
            if self.over:
                await asyncio.Event().wait()  # until `close` cancels it
            started = time.monotonic()
            try:
                reply = await self._final(request)
            except TeacherError:
                self.over = True
                raise
            return replace(reply, seconds=round(time.monotonic() - started, 3))

    async def _final(self, request: Request) -> Reply:
        """What it answers, or that it answers others but not this."""
        try:
            return await self._tries(request, self.settings.retries)
        except _Refused as refused:
            if not refused.sure:
                await self._others_are_answered(request, str(refused))
            return Reply("", refused.finish, error=str(refused), tries=refused.tries)

    async def _others_are_answered(self, request: Request, fault: str) -> None:
        """Ask the plain question. Raises TeacherError, with the fault of `request`, when it gets no answer either."""
        plain = replace(request, prompt="Hi", system="")
        try:
            await self._tries(plain, min(self.settings.retries, 2))
        except _Refused as error:
            raise self.endpoint.away(f"answers no request: {fault}") from error

    async def _tries(self, request: Request, retries: int) -> Reply:
        """Ask until there is an answer, at most `retries` times more. Raises _Refused, TeacherError."""
        tries, alike = 1, Counter[int]()
        while True:
            try:
                return replace(await self._once(request), tries=tries)
            except _Again as fault:
                alike[fault.most] += 1
                if tries <= retries and alike[fault.most] <= fault.most:
                    await self._wait(tries, fault.wait)
                    tries += 1
                    continue
                what = f"{fault}; {tries} tries"
                if fault.alone:
                    raise _Refused(what, "failed", tries=tries) from fault
                raise self.endpoint.away(what, fault.todo) from fault

    async def _wait(self, tries: int, asked: float | None) -> None:
        """Pause before the next try: as long as the endpoint asked, else twice as long each time. Never all at once."""
        settings = self.settings
        if asked is None:
            await asyncio.sleep(
                min(settings.first_wait * 2 ** (tries - 1), settings.longest_wait) * (0.5 + random.random())
            )
        elif asked <= _PATIENCE:
            self.endpoint.pace.hold(asked)
            await asyncio.sleep(asked + settings.first_wait * random.random())
        else:
            what = f"asks for a pause of {asked / 3600:.1f} hours"
            raise self.endpoint.away(what, "Run the same command again after that.")

    async def _once(self, request: Request) -> Reply:
        """One try. Raises _Again, _Refused, TeacherError."""
        expected = (len(request.prompt) + len(request.system)) // 4 + request.decoding.max_tokens
        await self.endpoint.pace.turn(expected)
        completions, left_out = self.settings.completions, self.endpoint.left_out
        fields = fields_of(request, self.settings.model, completions=completions, left_out=left_out)
        response = await self._post(fields)
        if response.status_code != 200:
            await self._judge(response, fields)
            return await self._once(request)  # without the field that was named
        reply = reply_of(response, request)
        if reply is None:
            raise _Again(f"answers what no client understands: {self.endpoint.message(response)}", alone=True)
        self.endpoint.pace.correct(expected, reply.prompt_tokens + reply.completion_tokens)
        if not reply.prompt_tokens and not reply.error:
            self.endpoint.once("does not count tokens, so tokens and cost are not known")
        return reply

    async def _post(self, fields: dict[str, Any]) -> httpx2.Response:
        path = "completions" if self.settings.completions else "chat/completions"
        headers = {"Content-Type": "application/json"}
        try:
            post = self.http.post(path, content=json_bytes(fields), headers=headers)
            response = await asyncio.wait_for(post, self.settings.timeout)  # httpx2's own ends at a pause, not a drip
        except (asyncio.TimeoutError, httpx2.ReadTimeout) as error:
            raise _Again(f"gives no answer within {self.settings.timeout:g} s", _LONGER, most=_SLOW) from error
        except httpx2.TransportError as error:
            what = f"cannot be reached ({reason(error)})"
            if not self.endpoint.reached and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                raise self.endpoint.away(what) from error  # a wrong URL is told at once
            raise _Again(what) from error
        except httpx2.DecodingError as error:
            raise _Again(f"answers what cannot be decoded ({error})", alone=True) from error
        self.endpoint.reached = True
        return response

    async def _judge(self, response: httpx2.Response, fields: dict[str, Any]) -> None:
        """Raise what an answer with an error means, or leave out one of `fields`, so that it may be tried again."""
        status, said = response.status_code, self.endpoint.message(response)
        what = f"answers {status}: {said}"
        if status == 404:
            raise await self._not_found(response)
        if status in (401, 402, 403) or 300 <= status < 400:
            raise self.endpoint.refusal(response)
        if status == 429 and "insufficient_quota" in response.text:
            raise self.endpoint.away(what, "Add credit there, then run the same command again.")
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(response.headers.get("Retry-After"))
            raise _Again(what, _LESS, wait, alone=status >= 500 and wait is None)
        if held_back(response):
            raise _Refused(what, sure=True)
        if (name := not_taken(response, fields)) is None:
            raise _Refused(what)
        self.endpoint.left_out.add(name)
        self.endpoint.once(f"does not take '{name}': {OPTIONAL[name]}")

    async def _not_found(self, response: httpx2.Response) -> TeacherError:
        """404: no such model there, or no such place."""
        model = self.settings.model
        try:
            known = await asyncio.to_thread(self.endpoint.models)
        except TeacherError:
            return self.endpoint.refusal(response)
        if model in known:
            return self.endpoint.refusal(response)
        todo = f"Known (--name): {', '.join(known)}." if known else "It offers none."
        return self.endpoint.away(f"has no model '{model}'{nearest(model, known)}", todo)


def reason(error: BaseException) -> str:
    """What the system said, where httpx2 tells the cause; else its own words; some of its errors have none."""
    said = str(error) or type(error).__name__
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            asyncios = inner.strerror.startswith("Connect call failed")  # in place of what the system said
            said = os.strerror(inner.errno) if asyncios and inner.errno else inner.strerror
        inner = inner.__cause__ or inner.__context__
    return said
