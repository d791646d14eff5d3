"""Errors for people: what was wrong, where, and what to do. One kind per way to be wrong.

`raise` one of these for anything that the user's input, files or disk can cause; `assert` is for our own mistakes.
The command line turns them into one line on standard error and the exit status below (no traceback unless `--debug`).
"""

from __future__ import annotations

from collections.abc import Iterable

from rapidfuzz import fuzz, process

_CLOSE_ENOUGH = 60.0  # rapidfuzz score of 0..100; below it a suggestion confuses more than it helps


class LilliputError(Exception):
    """Base of all our errors; exit status 1.

    Args:
        what: what is wrong, with the offending value in it.
        where: the file, row, parameter or layer it was found in; printed first.
        todo: what the user can do about it; printed last.
    """

    exit_status = 1

    def __init__(self, what: str, *, where: str | None = None, todo: str | None = None) -> None:
        self.what, self.where, self.todo = what, where, todo
        head = f"{where}: {what}" if where else what
        ended = head if head.endswith((".", "?", "!")) else f"{head}."
        super().__init__(f"{ended} {todo}" if todo else head)


class UsageError(LilliputError):
    """Wrong use: a bad option, an unknown key or name; exit status 2."""

    exit_status = 2


class DataError(LilliputError):
    """A row, or a file of rows, that cannot be used as it is."""


class FormatError(LilliputError):
    """Numbers that a number format cannot hold: NaN, Inf, a wrong shape or type."""


class CheckpointError(LilliputError):
    """Files of a model or an adapter that are missing, cut short or malformed."""


class WrongBaseError(LilliputError):
    """An adapter that was trained over another base."""


class CheckFailed(LilliputError):
    """A promise of exactness did not hold on this model and this data."""


class TeacherError(LilliputError):
    """A language model that was to write data is out of reach, or answers what no client understands."""


class DiskError(LilliputError):
    """A file could not be written; what was there before is still there."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What ends an error about an unknown name: `"; did you mean 'lora.r'?"`, or nothing when none is near."""
    found = process.extractOne(name, list(known), scorer=fuzz.WRatio, score_cutoff=_CLOSE_ENOUGH)
    return f"; did you mean '{found[0]}'?" if found else ""
