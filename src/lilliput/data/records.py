"""Rows of JSON, JSONL, CSV, TSV and Parquet files; every fault says file, line or row, and reason.

A file is told by its content first and its suffix second, read as UTF-8 (a byte order mark is allowed), and never
repaired: a row is read as it stands, or refused, or, when asked, skipped and listed. What the fields of a row mean
is not decided here but in `chats.py` and `labelled.py`. Not here: compressed files, folders of files, the network.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import orjson

from lilliput.errors import DataError

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PARQUET = b"PAR1"
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_LISTS_OF_ONE_ROW = ("messages", "conversations")  # a list under such a name belongs to a row, it does not hold rows
_UNDERSTOOD = "JSON (an array, or an object with one list of rows), JSONL, CSV, TSV and Parquet are understood"
_CSV_FIELD_LIMIT = 1 << 30  # characters; the csv module's own limit of 131,072 is shorter than a long chat


@dataclass(frozen=True)
class Record:
    """One raw row: its fields, where it stands (`"my.jsonl:17"`), and its number in the file, from 1."""

    fields: dict[str, Any]
    origin: str
    row: int = 0


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used: where it stands, why, and its number in the file, from 1."""

    origin: str
    reason: str
    row: int = 0


class Records(Sequence[Record]):
    """The good rows of a file in its order, the bad ones beside them, and a fingerprint of the good ones.

    `sha256` depends on the fields alone, not on the file's name, its kind, or the order of keys within a row.
    """

    def __init__(self, rows: list[Record], skipped: list[SkippedRow], sha256: str) -> None:
        self._rows, self.skipped, self.sha256 = rows, skipped, sha256

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Records({len(self)} rows, {len(self.skipped)} skipped)"


def read_records(path: str | Path, *, skip_bad_rows: bool = False) -> Records:
    """Read the rows of a JSON, JSONL, CSV, TSV or Parquet file.

    Args:
        path: the file.
        skip_bad_rows: leave out rows that are broken and list them in `.skipped`, instead of refusing the file.

    Raises:
        DataError: no such file, an empty one, one of another kind or in another encoding, broken JSON or CSV; or a
            bad row (the first one, with the number of bad rows in all), unless they are skipped.
    """
    path = Path(path)
    records = gather(path)
    settle(path, records.skipped, len(records) + len(records.skipped), skip=skip_bad_rows)
    return records


def gather(path: Path, *, columns: Sequence[str] | None = None, literal: bool = False) -> Records:
    """Read all rows, the bad ones into `.skipped`. Raises DataError only where the file itself cannot be read.

    Args:
        path: the file.
        columns: names of the columns of a CSV or TSV file that has no header line.
        literal: in a .tsv file a double quote is a character like any other, and a row is a line.
    """
    good: list[Record] = []
    bad: list[SkippedRow] = []
    digest = hashlib.sha256()
    for row in stream_records(path, Table(None if columns is None else tuple(columns), literal)):
        if isinstance(row, SkippedRow):
            bad.append(row)
            continue
        try:
            digest.update(_canonical(row.fields))
        except UnicodeEncodeError:
            bad.append(SkippedRow(row.origin, "holds half a character (a lone surrogate)", row.row))
        else:
            good.append(row)
    if not good and not bad:
        raise DataError("holds no rows", where=str(path))
    return Records(good, bad, digest.hexdigest())


def settle(path: Path, bad: list[SkippedRow], total: int, *, skip: bool) -> None:
    """Raise DataError for the first bad row unless they are to be skipped and a good one is left."""
    if not bad:
        return
    first = min(bad, key=lambda row: row.row)
    if len(bad) == total:
        count = "the only row is bad" if total == 1 else f"all {total:,} rows are bad"
    else:
        count = f"{len(bad):,} of {total:,} rows {'is' if len(bad) == 1 else 'are'} bad"
    if len(bad) == total:
        raise DataError(f"{first.reason}; {count}", where=first.origin, todo=f"Fix {path}, or name another file.")
    if not skip:
        todo = "Fix the file, or leave such rows out with --skip-bad-rows (in Python: skip_bad_rows=True)."
        raise DataError(f"{first.reason}; {count}", where=first.origin, todo=todo)


def _canonical(fields: dict[str, Any]) -> bytes:
    """A row as bytes that do not depend on the order of its keys. UnicodeEncodeError on half a character."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8") + b"\n"


# ---- which kind of file ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """What a CSV or TSV file does not say about itself: see `gather`."""

    columns: tuple[str, ...] | None = None
    literal: bool = False


def stream_records(path: Path, table: Table | None = None) -> Iterator[Record | SkippedRow]:
    """The rows of a file one after the other, the bad ones too, each as it is read; a file of JSON that is not JSONL is
    read as a whole first. Raises DataError where the file itself cannot be read."""
    with readable(path):
        kind = kind_of(path)
        yield from _read_csv(path, table or Table()) if kind == "csv" else _READERS[kind](path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the system says about a file that cannot be read becomes a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), todo="Check the path.") from error
    except IsADirectoryError as error:
        raise DataError("is a folder, not a file", where=str(path), todo="Name one file of rows.") from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", where=str(path)) from error


def kind_of(path: Path) -> str:
    """ "json", "jsonl", "csv" (TSV too) or "parquet": by the first bytes, then the suffix, then the first line."""
    with open(path, "rb") as file:
        head = file.read(4)
        if head == _PARQUET:
            return "parquet"
        if head[:2] in _UTF16:
            raise DataError("is UTF-16, not UTF-8", where=str(path), todo="Save it as UTF-8.")
        file.seek(0)
        first = _first_line(file)
        more = any(line.strip() for line in file)
    if not first:
        raise DataError("is empty", where=str(path), todo=f"Put at least one row into it; {_UNDERSTOOD}.")
    by_suffix = _SUFFIXES.get(path.suffix.lower())
    if by_suffix == "parquet":
        raise DataError("is not a Parquet file, its first bytes are not PAR1", where=str(path), todo="Copy it again.")
    if by_suffix == "csv":
        return "csv"
    if by_suffix == "jsonl" and not first.startswith(b"["):
        return "jsonl"
    if first.startswith((b"[", b"{")) or path.suffix.lower() == ".json" or by_suffix:
        return "jsonl" if more and _is_json(first) else "json"
    raise DataError("is of no kind that is understood", where=str(path), todo=f"{_UNDERSTOOD}.")


def _first_line(file: Any) -> bytes:
    for line in file:
        if text := line.removeprefix(_BOM).strip():
            return bytes(text)
    return b""


def _is_json(line: bytes) -> bool:
    """Whether one line is a whole JSON value, as every line of a JSONL file should be."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# ---- JSON and JSONL ----------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[Record | SkippedRow]:
    """One object a line."""
    for row, number, line in jsonl_lines(path):
        yield parse_line(line, f"{path.name}:{number}", row)


def jsonl_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Each row of a JSONL file, read line by line: its number, the number of its line, and the line as it stands.

    Blank lines are no rows. Raises OSError.
    """
    row = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if (line.removeprefix(_BOM) if number == 1 else line).strip():
                row += 1
                yield row, number, line


def quick_fields(line: bytes) -> dict[str, Any] | None:
    """The fields of a row that is well, at the speed of orjson; None where `parse_line` is to say what is wrong, or is
    more patient (NaN, half a character). Numbers beyond 64 bits lose digits here."""
    try:
        value = orjson.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parse_line(raw: bytes, origin: str, row: int) -> Record | SkippedRow:
    """The row that stands on a line of a JSONL file, or what is wrong with it. A byte order mark is no part of it."""
    try:
        return _as_record(json.loads(raw.removeprefix(_BOM).decode("utf-8").rstrip()), origin, row)
    except UnicodeDecodeError as error:
        return SkippedRow(origin, f"is not UTF-8 ({_bad_byte(error)})", row)
    except json.JSONDecodeError as error:
        return SkippedRow(origin, f"broken JSON: {error.msg} (column {error.colno})", row)
    except (ValueError, RecursionError) as error:
        return SkippedRow(origin, f"JSON that cannot be read ({error})", row)


def _as_record(value: Any, origin: str, row: int) -> Record | SkippedRow:
    if isinstance(value, dict):
        return Record(value, origin, row)
    return SkippedRow(origin, f"is {_a(value)}, not an object with named fields", row)


def _a(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"


def _read_json(path: Path) -> Iterator[Record | SkippedRow]:
    """An array of rows, or an object with one list of rows, or a single row; read as a whole."""
    text = _decode(path.read_bytes(), path)
    start = len(text) - len(text.lstrip())
    try:
        if text[start] == "[":
            yield from _array_rows(text, start, path)
        else:
            yield from _object_rows(json.loads(text), path)
    except json.JSONDecodeError as error:
        raise DataError(
            f"broken JSON: {error.msg} (column {error.colno})",
            where=f"{path.name}:{error.lineno}",
            todo="Nothing behind that place can be read; fix it, or save the rows as JSONL, one object a line.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"JSON that cannot be read ({error})", where=str(path)) from error


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.removeprefix(_BOM).count(b"\n", 0, error.start) + 1
        raise _not_utf8(error, path, line) from error


def _not_utf8(error: UnicodeDecodeError, path: Path, line: int) -> DataError:
    what = f"is not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return DataError(what, where=f"{path.name}:{line}", todo="Save the file as UTF-8.")


def _array_rows(text: str, start: int, path: Path) -> Iterator[Record | SkippedRow]:
    """The elements of the array at `start`, one after the other, so that each is known by its line."""
    decoder, line, counted, row = json.JSONDecoder(), 1, 0, 0
    position = _skip_space(text, start + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        row += 1
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield _as_record(value, f"{path.name}:{line} (row {row})", row)
        position = _skip_space(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter or ']'", text, position)
        position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise json.JSONDecodeError("Extra data behind the array", text, rest)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object_rows(value: Any, path: Path) -> Iterator[Record | SkippedRow]:
    if not isinstance(value, dict):
        raise DataError(f"is {_a(value)}, not a list of rows", where=str(path), todo=f"{_UNDERSTOOD}.")
    lists = [key for key, held in value.items() if isinstance(held, list) and key not in _LISTS_OF_ONE_ROW]
    if not lists:
        yield Record(value, f"{path.name}:1", 1)
        return
    if len(lists) > 1:
        names = ", ".join(f"'{name}'" for name in lists)
        todo = "Leave one of them, or save the rows as JSONL."
        raise DataError(
            f"holds several lists ({names}), so which one holds the rows is not known", where=str(path), todo=todo
        )
    for row, held in enumerate(value[lists[0]], start=1):
        yield _as_record(held, f"{path.name}:{lists[0]}, row {row}", row)


# ---- CSV ---------------------------------------------------------------------------------------------------------


def first_fields(path: Path, *, literal: bool = False) -> list[str] | None:
    """The fields of a CSV or TSV file's first line, which may be a header; None for other kinds. Raises as `gather`."""
    with readable(path), open(path, "rb") as file:
        if kind_of(path) != "csv":
            return None
        lines = _text_lines(file, path)
        first = next(lines)
        try:
            return [name.strip() for name in next(_csv_reader(first, lines, path, literal))]
        except csv.Error as error:
            raise _broken_csv(error, path, 1) from error


def _read_csv(path: Path, table: Table) -> Iterator[Record | SkippedRow]:
    """A header line, then a row a record; fields in double quotes may hold line breaks. Every value is text."""
    with _long_fields(), open(path, "rb") as file:
        yield from _csv_rows(file, path, table)


_readers = [0, 0]  # how many CSV files are read at this moment, and the csv module's limit before the first was


@contextmanager
def _long_fields() -> Iterator[None]:
    """Raise the csv module's limit as long as any file is read: several may be, by turns."""
    if not _readers[0]:
        _readers[1] = csv.field_size_limit(_CSV_FIELD_LIMIT)
    _readers[0] += 1
    try:
        yield
    finally:
        _readers[0] -= 1
        if not _readers[0]:
            csv.field_size_limit(_readers[1])


def _csv_reader(first: str, rest: Iterator[str], path: Path, literal: bool) -> Any:
    """The lines of a file, cut into fields."""
    lines, delimiter = _chain(first, rest), _delimiter(first, path)
    if literal and path.suffix.lower() == ".tsv":
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _csv_rows(file: Any, path: Path, table: Table) -> Iterator[Record | SkippedRow]:
    lines = _text_lines(file, path)
    first = next(lines)
    reader = _csv_reader(first, lines, path, table.literal)
    row = 0
    try:
        header = list(table.columns) if table.columns else _header(next(reader), path)
        line = reader.line_num + 1  # where the next row begins
        for values in reader:
            begins, line = line, reader.line_num + 1
            origin = f"{path.name}:{begins}"
            if not values:
                continue
            row += 1
            if reader.line_num > begins and _swallowed(path, table, values):
                yield SkippedRow(origin, f"a double quote swallows the lines up to {reader.line_num}", row)
                continue
            if len(values) != len(header):
                expected = f"{len(header)} are expected" if table.columns else f"the header has {len(header)}"
                reason = f"has {len(values)} fields where {expected} ({', '.join(header)})"
                yield SkippedRow(origin, reason, row)
            else:
                yield Record(dict(zip(header, values, strict=True)), origin, row)
    except csv.Error as error:
        raise _broken_csv(error, path, reader.line_num) from error


def _swallowed(path: Path, table: Table, values: list[str]) -> bool:
    """Whether a field of a TSV file holds whole lines: most such files know no quotes, and one that begins a field
    is then part of a text."""
    tabs = path.suffix.lower() == ".tsv" and not table.literal
    return tabs and any("\t" in value and "\n" in value for value in values)


def _broken_csv(error: csv.Error, path: Path, line: int) -> DataError:
    todo = "Look for a double quote that is not closed; a quote within a quoted field is written twice."
    return DataError(f"broken CSV: {error}", where=f"{path.name}:{line}", todo=todo)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _text_lines(file: Any, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(error, path, number) from error


def _delimiter(header: str, path: Path) -> str:
    """A tab in .tsv files, else the one of comma, semicolon and tab that the header has most of."""
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)


def _header(names: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in names]
    if not all(header) or len(set(header)) != len(header):
        what = f"the header has an empty or a repeated name: {header}"
        raise DataError(what, where=f"{path.name}:1", todo="Give every column a name of its own.")
    return header


# ---- Parquet -----------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[Record | SkippedRow]:
    """Rows batch by batch, as Python values."""
    import pyarrow  # here, because it takes as long to import as all the rest of this room
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    row += 1
                    yield Record(fields, f"{path.name}:row {row}", row)
    except (pyarrow.ArrowException, OSError) as error:
        fault = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            f"is a broken Parquet file ({fault})", where=str(path), todo="Copy or write it again."
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Record | SkippedRow]]] = {
    "json": _read_json,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
