"""A file of rows without its near-duplicates: what is compared, what is written, what is said about it.

The file is read twice: once for the texts, once to copy the rows that stay, in their order. Rows of a JSONL file are
copied byte for byte. What is held in memory are the numbered words of every text and some marks a row, not the rows.
Not here: which texts are near (near.py), the score (rouge.py).
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lilliput.data.chats import is_whole
from lilliput.data.engine import Engine
from lilliput.data.forms import Form, forms_of, unknown_form
from lilliput.data.reading import Reading, type_of
from lilliput.data.reading import text as text_of
from lilliput.data.records import Record, SkippedRow, jsonl_lines, kind_of, readable, settle, stream_records
from lilliput.errors import DataError, UsageError, nearest
from lilliput.files import replace, write_json
from lilliput.synthesis.near import Bands, Near, find_near, method_of
from lilliput.synthesis.rouge import THRESHOLD

TEXTS = ("first", "chat")  # what is compared of a row without --field
_OWN_TEXT = {"oasst-messages": "text"}  # forms whose rows are no chats by themselves: the field that is compared
_SHOWN = 200  # characters of a text in the report


@dataclass(frozen=True)
class Duplicate:
    """A row that went: its place and number, those of the row that it repeats, the score, and how both begin."""

    origin: str
    row: int
    of: str
    of_row: int
    score: float
    same: bool
    text: str
    of_text: str


@dataclass(frozen=True)
class Deduped:
    """What became of a file's rows.

    Attributes:
        rows: good rows in the file; skipped: bad ones, left out.
        kept, same, near: rows that stay, that repeat an earlier text, that come near one.
        wordless: rows in which ROUGE-L sees no words; they were only compared letter for letter.
        bands, missed: see `near.Near`.
        duplicates: the rows that went, in the order of the file.
    """

    file: str
    out: str
    threshold: float
    rows: int
    kept: int
    same: int
    near: int
    wordless: int
    skipped: int
    bands: Bands | None
    missed: float
    duplicates: list[Duplicate]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the duplicates are left to the report."""
        plain = {name: value for name, value in asdict(self).items() if name != "duplicates"}
        return {"method": method_of(self.bands), **plain}

    def write_report(self, path: str | Path) -> None:
        """Write the counts and every row that went as JSON."""
        write_json(path, {**self.to_json(), "duplicates": [asdict(one) for one in self.duplicates]})


def dedupe(
    path: str | Path,
    out: str | Path,
    *,
    threshold: float = THRESHOLD,
    field: str | None = None,
    text: str = "first",
    words: str = "unicode",
    exact: bool | None = None,
    engine: Engine | None = None,
    skip_bad_rows: bool = False,
    progress: bool = True,
) -> Deduped:
    """Copy the rows of a file to `out`, without those whose text repeats or comes near that of an earlier row.

    Args:
        path: any file of rows (JSON, JSONL, CSV, TSV, Parquet).
        out: a .jsonl, .json, .csv or .tsv file, written at the end; not `path` itself.
        threshold: a row goes when its ROUGE-L with an earlier row that stays is above it.
        field: the field of a row that is compared; by default what `text` says.
        text: "first", the user's first turn, or "chat", all turns; rows of any form that `lilliput.data` knows.
        words, exact, engine: see `near.find_near`.
        skip_bad_rows: leave out rows that cannot be used, instead of refusing the file.

    Raises:
        UsageError: an option of no such value, or an `out` that cannot be.
        DataError: the file or a row cannot be used.
    """
    path, out = Path(path), Path(out)
    write = _writer(path, out)
    texts = _Texts(path, field, text, skip_bad_rows)
    near = find_near(
        texts, threshold=threshold, words=words, exact=exact, engine=engine, threads=_cores(), progress=progress
    )
    rows = np.array(texts.rows)
    gone = {*rows[~near.stays].tolist(), *(row.row for row in texts.bad)}
    with replace(out) as temporary:
        write(path, temporary, gone)
    return Deduped(
        file=str(path),
        out=str(out),
        threshold=threshold,
        rows=len(rows),
        kept=int(near.stays.sum()),
        same=int(near.same.sum()),
        near=int((~near.stays & ~near.same).sum()),
        wordless=len(near.wordless),
        skipped=len(texts.bad),
        bands=near.bands,
        missed=near.missed,
        duplicates=_duplicates(path, texts, rows, near),
    )


def near_rows(
    path: str | Path, *, threshold: float = THRESHOLD, form: Form | None = None, progress: bool = True
) -> Near:
    """Which rows of a file repeat or come near an earlier one, as `dedupe` would find; bad rows are left out."""
    texts = _Texts(Path(path), None, "first", skip_bad_rows=True, form=form)
    return find_near(texts, threshold=threshold, threads=_cores(), progress=progress)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- what is compared --------------------------------------------------------------------------------------------


class _Texts:
    """The texts of a file's good rows, read when iterated over; the numbers of these rows and the bad rows are kept."""

    def __init__(self, path: Path, field: str | None, text: str, skip_bad_rows: bool, form: Form | None = None) -> None:
        if text not in TEXTS:
            raise UsageError(f"unknown text {text!r}{nearest(text, TEXTS)}", todo=f"Known: {', '.join(TEXTS)}.")
        self.path, self.field, self.text, self.skip_bad_rows, self.form = path, field, text, skip_bad_rows, form
        self.rows = array("q")
        self.bad: list[SkippedRow] = []

    def __iter__(self) -> Iterator[str]:
        for record in stream_records(self.path):
            if isinstance(record, SkippedRow):
                self.bad.append(record)
                continue
            try:
                text = self.of(record)
            except DataError as error:
                self.bad.append(SkippedRow(record.origin, error.what, record.row))
            else:
                self.rows.append(record.row)
                yield text
        self._settle()

    def _settle(self) -> None:
        """At the end of the file, before anything is compared: refuse bad rows, or a file with no other."""
        if self.bad and not self.rows:
            what = f"{self.bad[0].reason}; and no other row has a text to compare"
            raise DataError(what, where=self.bad[0].origin, todo="Name the field that is compared with --field.")
        if not self.rows:
            raise DataError("holds no rows", where=str(self.path))
        settle(self.path, self.bad, len(self.rows) + len(self.bad), skip=self.skip_bad_rows)

    def of(self, record: Record) -> str:
        """The text of a row that is compared. Raises DataError where there is none."""
        if self.field is not None:
            return self._field(record.fields)
        forms = [self.form] if self.form else forms_of(record.fields)
        if not forms:
            raise unknown_form(record)
        if forms[0].name in _OWN_TEXT:
            return text_of(record.fields, _OWN_TEXT[forms[0].name])
        chats = forms[0].read(record.fields, Reading())
        if not chats:
            raise DataError("no chat is left of it", where=record.origin)
        if self.text == "chat":
            return "\n".join(turn.content for chat in chats for turn in chat.turns)
        turns = chats[0].turns
        return next((turn.content for turn in turns if turn.role == "user"), turns[0].content)

    def _field(self, fields: dict[str, Any]) -> str:
        assert self.field is not None
        if self.field not in fields:
            has = ", ".join(f"'{name}'" for name in fields) or "nothing"
            raise DataError(f"has no field '{self.field}' (it has {has}){nearest(self.field, fields)}")
        value = fields[self.field]
        if value is None:
            return ""  # blank, and so no duplicate
        if not isinstance(value, str):
            raise DataError(f"'{self.field}' is {type_of(value)}, not text")
        return value


def _duplicates(path: Path, texts: _Texts, rows: NDArray[np.int64], near: Near) -> list[Duplicate]:
    """The rows that went, with what they repeat; their texts are read once more."""
    gone = np.flatnonzero(~near.stays)
    wanted = {*rows[gone].tolist(), *rows[near.first[gone]].tolist()}
    seen: dict[int, tuple[str, str]] = {}
    for record in stream_records(path) if wanted else ():
        if isinstance(record, Record) and record.row in wanted:
            text = texts.of(record).encode("utf-8", "replace").decode()  # half a character cannot be shown
            seen[record.row] = (record.origin, text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
    found = []
    for number in gone:
        row, first = int(rows[number]), int(rows[near.first[number]])
        (origin, text), (of, of_text) = seen[row], seen[first]
        score, same = float(near.score[number]), bool(near.same[number])
        found.append(Duplicate(origin, row, of, first, score, same, text, of_text))
    return found


# ---- what is written ---------------------------------------------------------------------------------------------

Write = Callable[[Path, Path, set[int]], None]  # from a file to a file, without the rows of these numbers


def default_out(path: str | Path) -> Path:
    """Where the rows go when nothing is said: `name.deduped.jsonl` beside `name.jsonl`; of a kind that we write."""
    path = Path(path)
    suffix = path.suffix.lower() if path.suffix.lower() in _WRITERS else ".jsonl"
    return path.with_name(f"{path.stem}.deduped{suffix}")


def _writer(path: Path, out: Path) -> Write:
    """Who writes `out`. Raises UsageError where it is `path` itself or of another kind."""
    suffix = out.suffix.lower()
    if suffix not in _WRITERS:
        todo = f"Name a file that ends in {', '.join(_WRITERS)}."
        raise UsageError(f"'{out.name}' is of no kind that is written here", where="-o", todo=todo)
    if out.is_dir():
        raise UsageError("is a folder", where=f"-o {out}", todo="Name a file in it.")
    if out.exists() and path.exists() and out.samefile(path):
        raise UsageError("is the file that is read", where=f"-o {out}", todo="Name another one.")
    return _WRITERS[suffix]


def _write_lines(path: Path, out: Path, gone: set[int]) -> None:
    """JSONL: the very lines where the file has lines, JSON of our own otherwise."""
    if kind_of(path) != "jsonl":
        with out.open("w", encoding="utf-8") as file:
            file.writelines(_json(record.fields) + "\n" for record in _staying(path, gone))
        return
    with readable(path), out.open("wb") as file:
        for row, _, line in jsonl_lines(path):
            if row not in gone:
                file.write(line if line.endswith(b"\n") else line + b"\n")


def _write_array(path: Path, out: Path, gone: set[int]) -> None:
    """JSON: an array, indented as most such files are."""
    with out.open("w", encoding="utf-8") as file:
        comma = "[\n"
        for record in _staying(path, gone):
            file.write(comma + "  " + _json(record.fields, indent=2).replace("\n", "\n  "))
            comma = ",\n"
        file.write("\n]\n")


def _write_csv(path: Path, out: Path, gone: set[int], delimiter: str = ",") -> None:
    """CSV with the columns of the first row; only texts and numbers can be said."""
    writer: csv.DictWriter[str] | None = None
    with out.open("w", encoding="utf-8", newline="") as file:
        for record in _staying(path, gone):
            if writer is None:
                writer = csv.DictWriter(file, list(record.fields), delimiter=delimiter, lineterminator="\n")
                writer.writeheader()
            if set(record.fields) != set(writer.fieldnames) or any(
                isinstance(value, list | dict) for value in record.fields.values()
            ):
                what = "cannot be a line of a table: it has other fields than the first row, or lists in them"
                raise DataError(what, where=record.origin, todo="Name a .jsonl file with -o.")
            if not all(is_whole(str(value)) for value in record.fields.values()):
                what = "holds half a character (a lone surrogate), which no table can say"
                raise DataError(what, where=record.origin, todo="Name a .jsonl file with -o.")
            writer.writerow(record.fields)


def _write_tsv(path: Path, out: Path, gone: set[int]) -> None:
    _write_csv(path, out, gone, delimiter="\t")


def _staying(path: Path, gone: set[int]) -> Iterable[Record]:
    return (record for record in stream_records(path) if isinstance(record, Record) and record.row not in gone)


def _json(fields: dict[str, Any], indent: int | None = None) -> str:
    text = json.dumps(fields, ensure_ascii=False, indent=indent, default=str)
    return text if is_whole(text) else json.dumps(fields, indent=indent, default=str)  # half of one by its number


_WRITERS: dict[str, Write] = {
    ".jsonl": _write_lines,
    ".ndjson": _write_lines,
    ".json": _write_array,
    ".csv": _write_csv,
    ".tsv": _write_tsv,
}
