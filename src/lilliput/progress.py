"""One bar with an ETA, and lines for people; all on standard error, so that standard output stays for results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_LINE_EVERY = 15.0  # seconds between two lines where there is no terminal to draw a bar on
_SPEED_OVER = 600.0  # seconds over which a bar measures its speed: steps may take minutes

console = Console(stderr=True, highlight=False)


class Advance(Protocol):
    """What `bar` yields: call it with the steps done and a note to show behind the bar."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


def say(text: str) -> None:
    """One line for people."""
    console.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """One warning for people."""
    console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def bar(description: str, total: int | None, *, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """A progress bar with elapsed and remaining time; without a terminal, a line now and then.

    Args:
        description: what is being done, a few words.
        total: the number of steps, or None when it is not known.
        done: of these, steps that were done earlier; the estimate of the end leaves them out.
        shown: False draws nothing (for callers that were told to be quiet).
    """
    if not shown:
        yield lambda n=1, note="": None
    elif console.is_terminal:
        with _terminal_bar(description, total, done) as advance:
            yield advance
    else:
        yield _Lines(description, total, done)


@contextmanager
def _terminal_bar(description: str, total: int | None, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=_SPEED_OVER) as progress:
        task = progress.add_task(description, total=total, completed=done, note="")

        def advance(n: int = 1, note: str = "") -> None:
            progress.update(task, advance=n, note=note) if note else progress.advance(task, n)

        yield advance


class _Lines:
    """Progress where there is no terminal: at most a line every few seconds, and one at the end."""

    def __init__(self, description: str, total: int | None, done: int = 0) -> None:
        self.description, self.total, self.done, self.earlier = description, total, done, done
        self.started = self.said = time.monotonic()

    def __call__(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self.said < _LINE_EVERY and self.done != self.total:
            return
        self.said = now
        spent = now - self.started
        left = spent * (self.total - self.done) / max(self.done - self.earlier, 1) if self.total else 0.0
        of = f"/{self.total}, {left:.0f} s left" if self.total else ""
        say(f"{self.description}: {self.done}{of} ({spent:.0f} s) {note}".rstrip())


def track(iterable: Iterable[T], description: str, total: int | None = None, *, shown: bool = True) -> Iterator[T]:
    """Yield from `iterable` under a `bar`; `total` is taken from its length when it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total, shown=shown) as advance:
        for item in iterable:
            yield item
            advance()
