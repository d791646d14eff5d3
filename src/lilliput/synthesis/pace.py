"""Not too fast: requests and tokens a minute, and the pauses that an endpoint asks for. All requests share a `Pace`."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime


class Pace:
    """Spreads requests evenly, so that there are no more in a minute than allowed.

    Args:
        requests: a minute; None for no limit. tokens: a minute, prompt and answer; None for no limit.
    """

    def __init__(self, requests: float | None = None, tokens: float | None = None) -> None:
        self._per_request = 60 / requests if requests else 0.0
        self._per_token = 60 / tokens if tokens else 0.0
        self._free = self._held = 0.0  # monotonic seconds: the next turn, the end of a pause

    async def turn(self, tokens: int) -> None:
        """Wait until a request may go that will use about that many tokens."""
        mine = max(time.monotonic(), self._free)
        self._free = mine + max(self._per_request, self._per_token * tokens)
        while (left := max(mine, self._held) - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def correct(self, expected: int, used: int) -> None:
        """The request that expected some tokens has used others: the next may go earlier or later."""
        if self._per_token * expected > self._per_request:
            self._free += max(self._per_token * used, self._per_request) - self._per_token * expected

    def hold(self, seconds: float) -> None:
        """No request goes for so long."""
        self._held = max(self._held, time.monotonic() + seconds)


def retry_after(said: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait, given in seconds or as a date (RFC 9110, section 10.2.3)."""
    if not said:
        return None
    try:
        return max(float(said), 0.0)
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(said)
    except ValueError:
        return None  # neither: as if it were not there
    until = until if until.tzinfo else until.replace(tzinfo=timezone.utc)
    return max((until - datetime.now(timezone.utc)).total_seconds(), 0.0)
