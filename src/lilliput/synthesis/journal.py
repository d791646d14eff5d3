"""The journal of a generation: an append-only JSONL file from which all that has happened is rebuilt.

    {"kind": "begin", "time": …, "version": …, "settings": {…}, "price": {…}}      once a start of the program
    {"kind": "answer", "time": …, "key": …, "sha256": …, "request": {…}, "reply": {…}}
    {"kind": "decision", "time": …, "key": …, "decision": {…}}

A line goes to the system in one write as soon as there is something to write, so a killed program loses at most the
line that it was writing; half a line at the end is cut off before the next is written. The disk is made to hold what
was written (fsync) with every 64th line, with a line 5 seconds after the last time, and whenever `sync` is called
(before rows are handed out, after each batch of questions): that is what a power cut can cost.
`sha256` is the hash of the request (`hash_of`): prompt, system turn, decoding, seed and schema.

Only one program writes a journal: the file is locked (flock; there is no such lock on Windows, nor on some network
disks). Not here: what is asked and decided (self_instruct.py, evol_instruct.py), who uses it (run.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lilliput import __version__
from lilliput.errors import DataError, DiskError, UsageError
from lilliput.progress import warn
from lilliput.synthesis.cost import Price, Spent
from lilliput.synthesis.teacher import Reply, Request

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL = "journal.jsonl"  # the file's name in a run's folder
_SYNC_LINES, _SYNC_SECONDS = 64, 5.0  # what a power cut may cost at most
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what a disk without locks answers


@dataclass(frozen=True)
class Answered:
    """An answer in the journal, with the hash of its request and its time (ISO 8601, UTC)."""

    sha256: str
    reply: Reply
    time: str


@dataclass
class State:
    """All that a journal says.

    settings: of the run; the same at each start. version: of Lilliput, at the first start.
    price: at the last start. answers, decisions: by key, in the order in which they were written.
    starts: a pair a start of the program: its time, and that of its last line (ISO 8601, UTC).
    end: bytes of the file up to the end of its last whole line. tail: bytes behind it, half a line.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    price: Price = field(default_factory=Price)
    answers: dict[str, Answered] = field(default_factory=dict)
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: list[tuple[str, str]] = field(default_factory=list)
    end: int = 0
    tail: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The accepted rows, in the order of the decisions."""
        return [decision["row"] for decision in self.decisions.values() if "row" in decision]

    @property
    def spent(self) -> Spent:
        """Sums over all answers."""
        total = Spent()
        for answered in self.answers.values():
            total.add(answered.reply)
        return total

    @property
    def seconds(self) -> float:
        """How long the program ran, all starts together."""
        lasted = (datetime.fromisoformat(last) - datetime.fromisoformat(first) for first, last in self.starts)
        return sum(span.total_seconds() for span in lasted)


def read_journal(path: str | Path) -> State:
    """Read a journal, or the one in a directory; it may be in use. Half a line at its end is left out.

    Raises:
        DataError: no such file; or it is broken elsewhere than in its last line.
    """
    path = Path(path)
    path = path / JOURNAL if path.is_dir() else path
    state = State(path)
    try:
        for number, row, end in _lines(state):
            _take(state, number, row)
            state.end = end
    except FileNotFoundError as error:
        todo = "Name the directory that a run wrote to (its -o)."
        raise DataError("no such file", where=str(path), todo=todo) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from error
    return state


def hash_of(request: Request) -> str:
    """SHA-256 of all of a request but its key."""
    return hashlib.sha256(json_bytes(_asked(request), sort_keys=True)).hexdigest()


def json_bytes(value: Any, *, sort_keys: bool = False) -> bytes:
    """`value` as JSON in UTF-8, on one line; half a character (a lone surrogate) is escaped as JSON allows."""
    say: dict[str, Any] = {"allow_nan": False, "separators": (",", ":"), "sort_keys": sort_keys}
    try:
        return json.dumps(value, ensure_ascii=False, **say).encode()
    except UnicodeEncodeError:
        return json.dumps(value, **say).encode()


class Journal:
    """A journal that is written to.

    Args:
        path: the file; made, with its directory, if it is not there.
        settings: whatever the result depends on, plain JSON values.
        price: of tokens, kept for the report.

    Raises:
        UsageError: it has answers to other settings (named), or another program writes it.
        DataError: as `read_journal`.
        DiskError: it cannot be written.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], price: Price | None = None) -> None:
        self.path = Path(path)
        self._unsynced, self._synced_at = 0, time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run is
            _sync_directory(self.path.parent)
        except OSError as error:
            todo = "Choose another place with -o."
            raise DiskError(f"cannot be written ({error.strerror})", where=str(self.path), todo=todo) from error
        try:
            self._lock()
            self.state = read_journal(self.path)
            _check(self.state, settings)
            self._cut()
            begin = {"version": __version__, "settings": dict(settings), "price": asdict(price or Price())}
            self._write({"kind": "begin", **begin})
            self.sync()
        except BaseException:
            self._file.close()
            raise

    def answer(self, request: Request, reply: Reply) -> None:
        """Write an answer down."""
        assert request.key not in self.state.answers, f"{request.key} is answered already"
        said = {"sha256": hash_of(request), "request": _asked(request), "reply": asdict(reply)}
        self._write({"kind": "answer", "key": request.key, **said})

    def decision(self, key: str, decision: Mapping[str, Any]) -> None:
        """Write a decision down."""
        assert key not in self.state.decisions, f"{key} is decided already"
        self._write({"kind": "decision", "key": key, "decision": dict(decision)})

    def sync(self) -> None:
        """Return when the disk holds all lines."""
        if self._unsynced:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise DiskError(f"cannot be written ({error.strerror})", where=str(self.path)) from error
        self._unsynced, self._synced_at = 0, time.monotonic()

    def close(self) -> None:
        """Sync, and let others have the journal."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            todo = "Wait for it, stop it, or choose another directory with -o."
            raise UsageError("another run is writing this journal", where=str(self.path), todo=todo) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warn(f"{self.path}: this disk has no file locks; let no other run write to the same directory")

    def _cut(self) -> None:
        """Drop half a line at the end, which the next line would become part of."""
        if self.state.tail:
            warn(f"{self.path}: the last line was cut short ({self.state.tail} bytes) and is dropped")
            self._file.truncate(self.state.end)
            self.state.tail = 0

    def _write(self, row: dict[str, Any]) -> None:
        """Append one line, and take it into the state."""
        row = {"kind": row.pop("kind"), "time": _now(), **row}
        line = json_bytes(row) + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self.state.end)
            todo = "Free some space and run the same command again; all earlier lines are kept."
            raise DiskError(f"cannot be written ({error.strerror})", where=str(self.path), todo=todo) from error
        self.state.end += len(line)
        _take(self.state, 0, row)
        self._unsynced += 1
        if self._unsynced >= _SYNC_LINES or time.monotonic() - self._synced_at > _SYNC_SECONDS:
            self.sync()


def _sync_directory(path: Path) -> None:
    """Make the disk hold the names in a directory: a new file's name is not part of the file."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks sync no directories
                raise
        finally:
            os.close(handle)


# ---- lines ---------------------------------------------------------------------------------------------------------


def _asked(request: Request) -> dict[str, Any]:
    asked = asdict(request)
    del asked["key"]
    return asked


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _lines(state: State) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Each whole line as (its number, what it says, the byte after it); sets `state.tail`."""
    with open(state.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        number = end = 0
        while line := file.readline():
            number, start, end = number + 1, end, end + len(line)
            row = _parse(line)
            if row is None and end >= size:
                state.tail = end - start
            elif row is None:
                todo = "Cut the file before this line (head -n), or begin anew in another directory."
                raise DataError("not a line of a journal", where=f"{state.path}:{number}", todo=todo)
            else:
                yield number, row, end


def _parse(line: bytes) -> dict[str, Any] | None:
    """A JSON object on a line with its end; None for all else."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:  # broken JSON, or no UTF-8
        return None
    return row if isinstance(row, dict) else None


def _take(state: State, number: int, row: dict[str, Any]) -> None:
    """Add what a line says to the state."""
    where = f"{state.path}:{number}"
    kind = row.get("kind")
    if kind not in _KINDS or not (state.starts or kind == "begin"):
        what = f"unknown kind {kind!r}" if kind not in _KINDS else "a journal starts with a line of kind 'begin'"
        raise DataError(what, where=where, todo="This is no journal of Lilliput, or it was changed by hand.")
    try:
        _KINDS[kind](state, row)
        state.starts[-1] = (state.starts[-1][0], row["time"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"a line of kind '{kind}' that is not as it should be ({type(error).__name__}: {error})"
        raise DataError(what, where=where, todo="It was changed by hand, or by another version.") from error


def _take_begin(state: State, row: dict[str, Any]) -> None:
    if not (state.answers or state.decisions):
        state.settings, state.version = row["settings"], row["version"]
    state.price = Price(**row["price"])
    state.starts.append((row["time"], row["time"]))


def _take_answer(state: State, row: dict[str, Any]) -> None:
    _only_once(row["key"], state.answers)
    state.answers[row["key"]] = Answered(row["sha256"], Reply(**row["reply"]), row["time"])


def _take_decision(state: State, row: dict[str, Any]) -> None:
    _only_once(row["key"], state.decisions)
    state.decisions[row["key"]] = row["decision"]


def _only_once(key: str, known: Mapping[str, Any]) -> None:
    if key in known:
        raise ValueError(f"{key!r} is there already")


_KINDS: dict[Any, Callable[[State, dict[str, Any]], None]] = {
    "begin": _take_begin,
    "answer": _take_answer,
    "decision": _take_decision,
}


def _check(state: State, settings: Mapping[str, Any]) -> None:
    """A run goes on only with the settings it was begun with."""
    now = json.loads(json_bytes(dict(settings)))
    if not (state.answers or state.decisions) or state.settings == now:  # nothing depends on them yet
        return
    names = [name for name in {**state.settings, **now} if state.settings.get(name) != now.get(name)]
    then = {name: f"{_short(state.settings.get(name))} then, {_short(now.get(name))} now" for name in names}
    said = "; ".join(f"{name} {values}" for name, values in then.items())
    todo = "Give the settings it was begun with, or choose another directory with -o."
    raise UsageError(f"was begun with other settings ({said})", where=str(state.path), todo=todo)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
