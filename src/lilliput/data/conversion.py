"""A file of rows of one form becomes a file of rows of another, in constant memory; what went another way is counted.

    alpaca.jsonl:17 ── parse ── the form's `read` ── check ── cut where too long ── the target's `write` ── out.jsonl

A file is cut into pieces of lines (or of rows, where it is no JSONL), and `convert_lines` turns a piece into bytes: a
pure function of values that can be pickled, so that an engine (`engine.py`) may call it elsewhere. A bad row stops the
conversion, unless bad rows are to be skipped; the file that was there before stays until the new one is whole.
Not here: the forms (`forms.py`), duplicates and quality (the room `synthesis`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from lilliput import files
from lilliput.data.chats import Chat, check_chat
from lilliput.data.engine import Engine
from lilliput.data.forms import TARGETS, Form, form_named, form_of_columns, forms_of, printable, unknown_form
from lilliput.data.oasst import MessageFile, check_paths
from lilliput.data.reading import Choices, Fields, Reading, in_words
from lilliput.data.records import Record, SkippedRow, kind_of, parse_line, quick_fields, readable, stream_records
from lilliput.errors import DataError, UsageError, nearest
from lilliput.progress import bar

Length = Callable[[Chat], int]
_First = tuple[list[Record], list[SkippedRow]]  # the good and the bad ones of the first rows

_PIECE_BYTES = 1 << 20  # of lines in a piece
_PIECE_ROWS = 1000  # and rows, where they do not come as lines
_LOOKED_AT = 20  # rows that tell the form of a file
_SHOWN = 20  # bad rows that are listed; all are counted
_ARRAY = ".json"  # the suffix of an output that is one JSON array
_KINDS = {_ARRAY: b",\n", ".jsonl": b"\n", ".ndjson": b"\n", "": b"\n"}  # what stands between two rows


def characters(chat: Chat) -> int:
    """How long a chat is in characters, all turns together."""
    return sum(len(turn.content) for turn in chat.turns)


@dataclass(frozen=True)
class Job:
    """What is done with each row; plain values and functions that can be pickled.

    Attributes:
        form: of the rows that come in.
        target: the form of those that go out.
        choices: see `Choices`.
        longest: chats longer than this are cut into several before a user's turn; None cuts none.
        length: how `longest` measures.
        between: the bytes between two rows that go out.
        file: the name of the file, for the places of bad rows.
    """

    form: Form
    target: Form
    choices: Choices = field(default_factory=Choices)
    longest: int | None = None
    length: Length = characters
    between: bytes = b"\n"
    file: str = ""


@dataclass
class Piece:
    """What became of some rows: bytes to write, and counts.

    `dropped` and `changed` count by reason; `faults` are the first bad rows, `bad` is the number of all; `taken` is how
    many bytes of the file the rows were (0 where that is not known).
    """

    data: bytes = b""
    rows: int = 0
    chats: int = 0
    bad: int = 0
    taken: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    faults: list[SkippedRow] = field(default_factory=list)


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        source, target: the forms.
        rows: rows of the file, bad ones too.
        chats: rows written.
        bad: rows that could not be used and were skipped; the first of them are in `skipped`.
        dropped: what was left out, by reason.
        changed: what was mended or cut, by reason.
        left: fields of the first rows that the form does not read, such as an id.
        orphans: places of messages whose tree does not begin in the file (OpenAssistant's single messages).
        seconds: of the clock.
    """

    source: str
    target: str
    rows: int
    chats: int
    bad: int
    dropped: dict[str, int]
    changed: dict[str, int]
    skipped: list[SkippedRow]
    left: list[str]
    orphans: list[str]
    seconds: float


def convert(
    path: str | Path,
    out: str | Path,
    *,
    source: str | None = None,
    target: str = "messages",
    columns: Mapping[str, str] | None = None,
    choices: Choices | None = None,
    longest: int | None = None,
    length: Length = characters,
    skip_bad_rows: bool = False,
    engine: Engine | None = None,
    progress: bool = True,
) -> Converted:
    """Write the rows of `path` in the form `target` to `out` (JSONL, or one JSON array where it ends with .json).

    Args:
        path: JSON, JSONL, CSV, TSV or Parquet. JSONL, CSV and Parquet are read in constant memory, JSON as a whole.
        out: replaced when all is written; never the file that is read.
        source: the name of the form of the rows; None looks at the first of them.
        target: the name of the form to write.
        columns: instead of `source`, which part is in which column: {"user": "question", "assistant": "answer"}.
        choices: what is taken of OpenAssistant trees and ShareGPT conversations.
        longest: cut chats that are longer between exchanges; an exchange that is longer alone is dropped.
        length: how long a chat is; characters by default.
        skip_bad_rows: leave out rows that cannot be used or said in the target's form, and count them.
        engine: where it is done (`engine_of`); this process by default. The bytes are the same.
        progress: show a bar.

    Raises:
        UsageError: an unknown form, suffix or choice, or a choice that means nothing for the form.
        DataError: the file cannot be read, its form cannot be told, a row is bad, or no chat is left.
        DiskError: the output cannot be written.
    """
    path, out = Path(path), Path(out)
    started = time.perf_counter()
    first = _first_rows(path)
    job = _job(path, out, source, target, columns, choices or Choices(), longest, length, first)
    messages = MessageFile(path) if job.form.name == "oasst-messages" else None
    total = Piece()
    with files.replace(out) as temporary, open(temporary, "wb", buffering=1 << 20) as file:
        file.write(b"[\n" if out.suffix.lower() == _ARRAY else b"")
        for piece in _pieces(path, job, messages, engine, progress):
            _check_faults(path, total, piece, skip_bad_rows)
            if piece.data:
                file.write(job.between + piece.data if total.chats else piece.data)
            _add(total, piece)
        file.write(b"\n]\n" if out.suffix.lower() == _ARRAY else b"\n")
        _check_left(path, total, messages.orphans if messages else [])
    rows = messages.rows if messages else total.rows
    return Converted(
        source=job.form.name,
        target=target,
        rows=rows,
        chats=total.chats,
        bad=total.bad,
        dropped=dict((+total.dropped).most_common()),
        changed=dict((+total.changed).most_common()),
        skipped=total.faults,
        left=_left(first, job.form),
        orphans=messages.orphans if messages else [],
        seconds=time.perf_counter() - started,
    )


# ---- what is asked for -------------------------------------------------------------------------------------------


def _job(
    path: Path,
    out: Path,
    source: str | None,
    target: str,
    columns: Mapping[str, str] | None,
    choices: Choices,
    longest: int | None,
    length: Length,
    first: _First,
) -> Job:
    """Check what was asked for, before anything is read but the first rows."""
    between = _KINDS.get(out.suffix.lower())
    if between is None:
        raise UsageError(
            f"'{out.suffix}' is no suffix of what is written", where=str(out), todo="End it with .jsonl, or .json."
        )
    if out.exists() and path.exists() and out.samefile(path):
        raise UsageError("is the file that is read", where=str(out), todo="Write to another file.")
    if target not in TARGETS:
        raise UsageError(
            f"unknown form '{target}'{nearest(target, TARGETS)}",
            where="--to",
            todo=f"Written are: {', '.join(TARGETS)}.",
        )
    if source and columns:
        raise UsageError("--from and --columns both say what the rows are", todo="Take one of them.")
    if longest is not None and longest < 1:
        raise UsageError(f"{longest} is not a length from 1 up", where="--max-chars or --max-tokens")
    check_paths(choices.paths)
    given = form_of_columns(columns) if columns else form_named(source) if source else None
    form = given or _detect(path, first)
    unused = [item.name for item in fields(choices) if getattr(choices, item.name) != item.default]
    for name in unused:
        if name not in form.choices:
            option = _OPTIONS[name]
            raise UsageError(
                f"means nothing for rows of the form {form.name}", where=option, todo=f"Leave out {option}."
            )
    return Job(form, form_named(target), choices, longest, length, between, path.name)


_OPTIONS = {"paths": "--paths", "languages": "--lang", "unreviewed": "--unreviewed", "keep_html": "--keep-html"}


def detect(path: str | Path) -> Form:
    """The form of a file, as the keys of its first rows tell it.

    Raises DataError: the file cannot be read or has no rows, no form has these keys, or several have.
    """
    return _detect(Path(path), _first_rows(Path(path)))


def _detect(path: Path, first: _First) -> Form:
    rows, bad = first
    if not rows:
        if not bad:
            raise DataError("holds no rows", where=str(path))
        raise DataError(f"{bad[0].reason}; none of the first {len(bad)} rows can be read", where=bad[0].origin)
    told = [forms for row in rows if (forms := forms_of(row.fields))]  # a row of no form is a bad one, later
    found = [form for form in (told or [[]])[0] if all(form in forms for forms in told)]
    if len(found) == 1:
        return found[0]
    if found:
        names = [form.name for form in found]
        keys = " and ".join(f"{form.name} ({', '.join(form.keys)})" for form in found)
        todo = f"Say which it is: --from {' or --from '.join(names)}."
        raise DataError(f"may be of several forms: {keys}", where=str(path), todo=todo)
    if told:
        names = list(dict.fromkeys(forms[0].name for forms in told))
        todo = "Put each form into a file of its own, or say which is meant with --from."
        raise DataError(f"holds rows of several forms ({', '.join(names)})", where=str(path), todo=todo)
    error = unknown_form(rows[0])
    todo = "Say which columns hold what, e.g. --columns user=question,assistant=answer."
    raise DataError(error.what, where=error.where, todo=todo)


def _first_rows(path: Path) -> _First:
    """The good and the bad ones of the first rows."""
    looked_at = list(islice(stream_records(path), _LOOKED_AT))
    good = [row for row in looked_at if isinstance(row, Record)]
    return good, [row for row in looked_at if isinstance(row, SkippedRow)]


def _left(first: _First, form: Form) -> list[str]:
    """What stands in the first rows beside the form's own keys; messages of trees have too much of it to be said."""
    if "paths" in form.choices:
        return []
    names = dict.fromkeys(name for row in first[0] for name in row.fields)
    return [printable(name) for name in names if name not in (*form.keys, *form.also)]


# ---- pieces ------------------------------------------------------------------------------------------------------


def _pieces(
    path: Path, job: Job, messages: MessageFile | None, engine: Engine | None, progress: bool
) -> Iterator[Piece]:
    """What becomes of the file, a piece at a time in its order, under a bar."""
    by_lines = messages is None and kind_of_readable(path) == "jsonl"
    function: Callable[[Any], Piece]
    items: Iterable[Any]
    if by_lines:
        function, items = partial(_convert_lines, job=job), _line_pieces(path)
    else:
        function, items = (
            partial(convert_records, job=job),
            _row_pieces(messages.trees() if messages else stream_records(path)),
        )
    unit, size = ", trees" if messages else ", rows", None
    if by_lines:
        unit, size = ", kB", max(path.stat().st_size >> 10, 1)
    rows = taken = 0
    with bar(f"{path.name}{unit}", size, shown=progress) as advance:
        for piece in engine.map(function, items) if engine else map(function, items):
            rows += piece.rows
            before, taken = taken, taken + piece.taken
            advance((taken >> 10) - (before >> 10) if by_lines else piece.rows, "" if messages else f"{rows:,} rows")
            yield piece


def kind_of_readable(path: Path) -> str:
    """The kind of a file. Raises DataError where it cannot be read."""
    with readable(path):
        return kind_of(path)


def _line_pieces(path: Path) -> Iterator[tuple[list[bytes], int]]:
    """Whole lines of about _PIECE_BYTES, and the number of the first."""
    with readable(path), open(path, "rb") as file:
        number = 1
        while lines := file.readlines(_PIECE_BYTES):
            yield lines, number
            number += len(lines)


def _row_pieces(rows: Iterator[Record | SkippedRow]) -> Iterator[list[Record | SkippedRow]]:
    while piece := list(islice(rows, _PIECE_ROWS)):
        yield piece


def _convert_lines(item: tuple[list[bytes], int], job: Job) -> Piece:
    return convert_lines(*item, job)


def convert_lines(lines: list[bytes], first_line: int, job: Job) -> Piece:
    """What becomes of some lines of a JSONL file.

    Args:
        lines: with their line ends.
        first_line: the number of the first in its file.
        job: what is done.
    """
    piece = _convert(_parsed(lines, first_line, job.file), job)
    piece.taken = sum(map(len, lines))
    return piece


def convert_records(records: list[Record | SkippedRow], job: Job) -> Piece:
    """What becomes of some rows that were read already."""
    return _convert(((row, 0) if isinstance(row, SkippedRow) else (row.fields, row.origin) for row in records), job)


def _parsed(lines: list[bytes], first_line: int, file: str) -> Iterator[tuple[Fields | SkippedRow, int | str]]:
    """Each row with its line; blank lines are none."""
    for number, line in enumerate(lines, start=first_line):
        fields_ = quick_fields(line)
        if fields_ is not None:
            yield fields_, number
        elif line.strip():
            row = parse_line(line, f"{file}:{number}", 0)
            yield (row.fields if isinstance(row, Record) else row), number


def _convert(rows: Iterable[tuple[Fields | SkippedRow, int | str]], job: Job) -> Piece:
    """The one loop that all rows pass: it decides how fast a conversion is."""
    reading = Reading(job.choices)  # counts of one row, which count if it is well
    dropped, changed = reading.dropped, reading.changed
    piece = Piece()
    read, write, longest, dumps = job.form.read, job.target.write, job.longest, orjson.dumps
    assert write is not None, "the target is one of TARGETS"
    said: list[bytes] = []
    for fields_, place in rows:
        piece.rows += 1
        if type(fields_) is SkippedRow:
            _note_fault(piece, fields_)
            continue
        mark = len(said)
        try:
            chats = read(fields_, reading)  # type: ignore[arg-type]
            for chat in chats:
                check_chat(chat, answered=True)
            if longest is not None:
                chats = [part for chat in chats for part in cut(chat, longest, job.length, reading)]
            for chat in chats:
                said.append(dumps(write(chat)))
            if dropped or changed:
                piece.dropped.update(dropped)
                piece.changed.update(changed)
        except DataError as error:
            del said[mark:]
            origin = place if isinstance(place, str) else f"{job.file}:{place}"
            _note_fault(piece, SkippedRow(origin, error.what))
        if dropped or changed:
            dropped.clear()
            changed.clear()
    piece.chats = len(said)
    piece.data = job.between.join(said)
    return piece


def _note_fault(piece: Piece, fault: SkippedRow) -> None:
    piece.bad += 1
    if len(piece.faults) < _SHOWN:
        piece.faults.append(replace(fault, reason=printable(fault.reason)))


def _add(total: Piece, piece: Piece) -> None:
    for name in ("rows", "chats", "bad"):
        setattr(total, name, getattr(total, name) + getattr(piece, name))
    total.dropped.update(piece.dropped)
    total.changed.update(piece.changed)
    total.faults += piece.faults[: _SHOWN - len(total.faults)]


def _check_faults(path: Path, before: Piece, piece: Piece, skip: bool) -> None:
    """Raise DataError for the first bad row unless such rows are skipped."""
    if piece.bad and not skip:
        first, seen = piece.faults[0], before.rows + piece.rows
        count = f"{piece.bad:,} of the first {seen:,} rows {'is' if piece.bad == 1 else 'are'} bad"
        todo = f"Fix {path}, or leave such rows out with --skip-bad-rows (in Python: skip_bad_rows=True)."
        raise DataError(f"{first.reason}; {count}", where=first.origin, todo=todo)


def _check_left(path: Path, total: Piece, orphans: list[str]) -> None:
    """Raise DataError when nothing is to be written."""
    if total.chats:
        return
    if orphans and total.bad == total.rows:
        rest = f"{len(orphans):,} messages are orphans and {total.bad:,} rows are bad"
        what = rest if total.bad else f"all {len(orphans):,} messages are orphans"
        raise DataError(f"no tree begins in the file; {what}", where=orphans[0])
    if not total.rows:
        raise DataError("holds no rows", where=str(path))
    if total.bad == total.rows:
        first = total.faults[0]
        raise DataError(f"{first.reason}; all {total.rows:,} rows are bad", where=first.origin)
    raise DataError(
        f"no chat is left; dropped were {in_words(total.dropped)}", where=str(path), todo="Nothing was written."
    )


# ---- chats that are too long -------------------------------------------------------------------------------------


def cut(chat: Chat, longest: int, length: Length, reading: Reading) -> list[Chat]:
    """The chat itself, or, where it is longer than `longest`, parts of it that are not.

    The chat is one that `check_chat` lets pass. A part begins with a user's turn (behind the system turn, which each
    part has) and holds as many exchanges as fit. An exchange that is too long alone is dropped. Later parts know
    nothing of the earlier: that is the price.
    """
    if length(chat) <= longest:
        return [chat]
    system = chat.turns[:1] if chat.turns[0].role == "system" else ()
    parts: list[Chat] = []
    open_part = False
    for number, exchange in enumerate(_exchanges(chat.turns[len(system) :])):
        longer = replace(parts[-1], turns=parts[-1].turns + exchange) if open_part else None
        alone = replace(chat, turns=system + exchange, input="" if number else chat.input)
        if longer and length(longer) <= longest:
            parts[-1] = longer
        elif length(alone) <= longest:
            parts.append(alone)
            open_part = True
        else:
            reading.dropped["exchanges that are too long alone"] += 1
            open_part = False
    if len(parts) > 1:
        reading.changed["chats cut into several"] += 1
    elif not parts:
        reading.dropped["chats of which nothing is short enough"] += 1
    return parts


def _exchanges(turns: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Turns from one of a user's to the next."""
    starts = [place for place, turn in enumerate(turns) if turn.role == "user"]
    for start, end in zip(starts, [*starts[1:], len(turns)], strict=True):
        yield turns[start:end]
