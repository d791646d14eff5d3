"""A table's rows as rows of a task: columns found, labels named, choices and answers brought together.

    my.jsonl:7  {"ctx": "He cracked the egg", "endings": ["into a pan", "into a car"], "label": 0}
    ->  situation "He cracked the egg", options ("into a pan", "into a car"), answer "into a pan"

Any file of `data/records.py` will do, and text files whose lines are cut at a separator (`slots || text`). A row is
taken as it stands or refused with its place and its field. Rows come one at a time, so that a file of any size is read
in little memory (a JSON array is read as a whole).
Not here: what a task is (`flan_tasks.py`), which rows are drawn (`flan.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lilliput.data.records import Record, SkippedRow, Table, first_fields, readable, stream_records
from lilliput.errors import DataError, UsageError, nearest
from lilliput.synthesis.flan_tasks import Task, label_text

_PEEK = 100  # rows whose keys tell which columns a file has
_BOM = "\ufeff"


@dataclass(frozen=True)
class Part:
    """One file of one task, and how it is read.

    path: the file. task: what its rows are.
    columns: the task's column -> the file's, where names differ; `a+b` makes a list of two, `a.b` looks into an object.
    constants: the task's column -> the words that stand in it in every row (`source_language` -> `German`).
    separator: what cuts the lines of a text file into fields; "" reads the file by its kind.
    names: the columns of a file without a header line, in order.
    count_from: 0 or 1, where an answer is the number of a choice.
    cap: at most so many rows are drawn from, None for all. balance: equally many of each label.
    """

    path: Path
    task: Task
    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    separator: str = ""
    names: Sequence[str] = ()
    count_from: int = 0
    cap: int | None = None
    balance: bool = False


@dataclass(frozen=True)
class TaskRow:
    """One row of a task.

    values: column -> words, only of columns that the row has; a label by its name.
    options: the row's own choices; () where the task's labels are the options, or there are none.
    label: the name of its label, "" where the task has none. origin: its place. row: its number in the file, from 1.
    """

    values: dict[str, str]
    options: tuple[str, ...]
    label: str
    origin: str
    row: int


_Path = tuple[str, ...]  # ("translation", "de"): keys from the row inwards
_Source = tuple[_Path, ...]  # one path, or several that make a list


class TaskFile:
    """A part, opened: iterate over it, as often as you like, for `TaskRow`s and `SkippedRow`s in the order of the file.

    `names` are the columns of a file without a header line, () where it has one; `headless` is True where that was
    guessed, and `note` is what is to be said about it, "" for nothing.

    Raises:
        DataError: a file that cannot be read, or one that lacks a column, with those it has.
        UsageError: a column or a constant that the task does not have.
    """

    def __init__(self, part: Part) -> None:
        _check_mapping(part)
        self.part, self.task = part, part.task
        self.headless = False
        self.note = ""
        self.names = self._given_names() or self._missing_header()
        self._sources, self._constants = self._find_columns()
        self._labels = part.task.label_names()
        self._label_column, self._choices_column = part.task.column_of("label"), part.task.column_of("choices")

    def __iter__(self) -> Iterator[TaskRow | SkippedRow]:
        for record in self._records():
            yield record if isinstance(record, SkippedRow) else self._row(record)

    def _records(self) -> Iterator[Record | SkippedRow]:
        if self.part.separator:
            return _separated(self.part.path, self.part.separator, self.names)
        return stream_records(self.part.path, Table(self.names or None, literal=True))

    # ---- columns ----

    def _given_names(self) -> tuple[str, ...]:
        part = self.part
        if part.names and not part.separator and first_fields(part.path, literal=True) is None:
            raise UsageError(f"the rows of {part.path.name} name their fields themselves", where="--names")
        return tuple(part.names)

    def _missing_header(self) -> tuple[str, ...]:
        """The names of the columns of a file whose first line seems to be no header, else ()."""
        part = self.part
        first = _first_separated(part) if part.separator else first_fields(part.path, literal=True)
        if first is None:
            return ()
        usual = {name.casefold() for name in _usual_names(part)}
        needed = [name for name, column in self.task.columns.items() if not (column.optional or self._constant(name))]
        if usual & {name.casefold() for name in first} or len(first) != len(needed):
            return tuple(first) if part.separator else ()
        self.headless = True
        self.note = f"{part.path.name} has no header: its columns are read as {', '.join(needed)}"
        return tuple(needed)

    def _constant(self, name: str) -> str | None:
        return self.part.constants.get(name) or self.task.columns[name].default

    def _find_columns(self) -> tuple[dict[str, _Source], dict[str, str]]:
        """Where each of the task's columns is found in a row, and those that are the same in all rows."""
        peeked = [row for row in islice(self._records(), _PEEK) if isinstance(row, Record)]
        there = list(dict.fromkeys(name for record in peeked for name in record.fields))
        sources: dict[str, _Source] = {}
        constants: dict[str, str] = {}
        for name, column in self.task.columns.items():
            asked = self.part.columns.get(name)
            wanted = [asked] if asked else [name, *column.aliases]
            found = next((found for want in wanted if (found := _find(want, there))), None)
            constant = self._constant(name)
            if found and name not in self.part.constants:
                sources[name] = found
            elif constant is not None and not asked:
                constants[name] = constant
            elif peeked and (asked or not column.optional):  # where all rows are bad, the caller says how
                raise self._no_column(name, asked, there)
        for name, source in sources.items():
            twin = next((other for other, theirs in sources.items() if other != name and theirs == source), None)
            if twin:
                what = f"{name} and {twin} are both read from the column '{'.'.join(source[0])}'"
                raise UsageError(what, where=str(self.part.path), todo=f"Say --columns {name}=NAME,{twin}=NAME.")
        return sources, constants

    def _no_column(self, name: str, asked: str | None, there: list[str]) -> DataError:
        about = self.task.columns[name].about
        meant = f" ({about})" if about else ""
        said = (
            f"has no column '{asked or name}'; the task {self.task.name} needs {name}{meant}; the file's columns are "
            f"{', '.join(there) or 'none'}{nearest(asked or name, there)}"
        )
        todo = f"Say --columns {name}=NAME"
        todo += (
            f", or --constants {name}=WORDS if it is the same in all rows."
            if self.task.columns[name].kind == "text"
            else "."
        )
        return DataError(said, where=str(self.part.path), todo=todo)

    # ---- rows ----

    def _row(self, record: Record) -> TaskRow | SkippedRow:
        values = dict(self._constants)
        try:
            held = {name: _fetch(record.fields, source) for name, source in self._sources.items()}
            choices = self._choices(held)
            for name, value in held.items():
                if self.task.columns[name].kind != "choices" and (said := self._said(name, value, choices)):
                    values[name] = said
            "".join((*values.values(), *(choices.texts if choices else ()))).encode()
        except _Unusable as fault:
            return SkippedRow(record.origin, str(fault), record.row)
        except UnicodeEncodeError:
            return SkippedRow(record.origin, "holds half a character (a lone surrogate)", record.row)
        label = values.get(self._label_column, "")
        return TaskRow(values, choices.texts if choices else (), label, record.origin, record.row)

    def _said(self, name: str, value: Any, choices: _Choices | None) -> str:
        """The words of one column; "" where it is optional and has none."""
        column = self.task.columns[name]
        if column.kind == "label":
            return self._label(value, name)
        if column.kind == "answer" and choices:
            return _chosen(value, choices, self.part.count_from, name)
        said = _facts(value) if column.kind == "facts" else _words(value)
        if not said and not column.optional:
            raise _Unusable(f"'{name}' is {_lacking(value)}{self._called(name)}")
        return said

    def _called(self, name: str) -> str:
        """` (the file's 'txt')` where a column has another name in the file."""
        source = "+".join(".".join(path) for path in self._sources[name])
        return "" if source == name else f" (the file's '{source}')"

    def _choices(self, held: Mapping[str, Any]) -> _Choices | None:
        name = self._choices_column
        if name not in held or (held[name] is None and self.task.columns[name].optional):
            return None
        return _read_choices(held[name], name)

    def _label(self, value: Any, name: str) -> str:
        text = label_text(value)
        if text is None:
            raise _Unusable(f"'{name}' is {_lacking(value)}{self._called(name)}")
        if not self._labels:
            return text
        found = self._labels.get(text.casefold())
        if found is None:
            known = ", ".join(_label_help(self.task))
            hint = nearest(text, self.task.labels)
            raise _Unusable(f"the label '{text}' is none of {known}; --labels {text}=NAME,… names all{hint}")
        return found


class _Unusable(Exception):
    """Why a row cannot be used; it becomes a SkippedRow."""


def _label_help(task: Task) -> list[str]:
    """`negative (0, neg)` for each label."""
    return [f"{name} ({', '.join(values)})" if values else name for name, values in task.labels.items()]


def _check_mapping(part: Part) -> None:
    """Refuse columns and constants that the task does not have."""
    names = part.task.columns
    for option, given in (("--columns", part.columns), ("--constants", part.constants)):
        for name, value in given.items():
            if name not in names:
                turned = f"; the task's column stands first: {value}={name}" if value in names else nearest(name, names)
                known = f"Columns of the task {part.task.name}: {', '.join(names)}."
                raise UsageError(f"'{name}' is no column of the task{turned}", where=option, todo=known)
    for name in part.constants:
        if names[name].kind not in ("text", "facts"):
            raise UsageError(
                f"'{name}' is of kind {names[name].kind}, which differs from row to row", where="--constants"
            )
    if part.separator and part.path.suffix.lower() in (".json", ".jsonl", ".parquet"):
        raise UsageError(f"{part.path.name} is no text file whose lines have fields", where="--separator")


def _usual_names(part: Part) -> Iterator[str]:
    """What a header line of a file of this part may hold."""
    asked = [*part.task.columns, *part.columns.values()]
    asked += [alias for column in part.task.columns.values() for alias in column.aliases]
    for name in asked:
        yield from (name, *name.split("+"), *name.split("."))


def _find(name: str, there: Sequence[str]) -> _Source | None:
    """Where `name` is in rows with these keys: a key (its case does not matter), `a+b`, or `a.b`; None if nowhere."""
    keys = {key.casefold(): key for key in there}
    if name.casefold() in keys:
        return ((name if name in there else keys[name.casefold()],),)
    if "+" in name:
        each = [_find(one.strip(), there) for one in name.split("+")]
        return tuple(path for found in each if found for path in found) if all(each) else None
    first, dot, rest = name.partition(".")
    return ((keys[first.casefold()], *rest.split(".")),) if dot and first.casefold() in keys else None


def _fetch(fields: Mapping[str, Any], source: _Source) -> Any:
    """The value at a source, None where there is none; a list of values where the source is several columns."""
    if len(source) == 1 and len(source[0]) == 1:
        return fields.get(source[0][0])
    found = []
    for path in source:
        value: Any = fields
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found.append(value)
    return found if len(source) > 1 else found[0]


# ---- values ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choices:
    texts: tuple[str, ...]
    marks: tuple[str, ...]  # what the file calls them: A, B, …; () where it does not


def _words(value: Any) -> str:
    """The words of a value. Several right answers (a list, or SQuAD's {"text": […]}) give their first."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return "" if value != value else label_text(value) or str(value)
    if isinstance(value, Mapping):
        return _words(value.get("text"))
    if isinstance(value, list | tuple):
        return next((words for words in map(_words, value) if words), "")
    return value.strip() if isinstance(value, str) else ""


def _facts(value: Any) -> str:
    """Facts in a line: text as it is, names with values as `name: value; …`, triples as `a, b, c | …`."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {words}" for name, held in value.items() if (words := _facts(held)))
    if isinstance(value, list | tuple):
        nested = any(isinstance(held, list | tuple | Mapping) for held in value)
        return (" | " if nested else ", ").join(words for words in map(_facts, value) if words)
    return _words(value)


def _read_choices(value: Any, name: str) -> _Choices:
    marks: tuple[str, ...] = ()
    if isinstance(value, Mapping) and isinstance(value.get("label"), list):  # ARC, CommonsenseQA
        marks = tuple(str(label_text(mark)) for mark in value["label"])
    held = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(held, list | tuple) or len(held) < 2:
        raise _Unusable(f"'{name}' is {_lacking(value)}, not a list of two choices or more")
    texts = tuple(" ".join(_words(choice).split()) for choice in held)
    if not all(texts):
        raise _Unusable(f"choice {texts.index('') + 1} of '{name}' is empty")
    if len(set(texts)) < len(texts):
        raise _Unusable(f"'{name}' has the same choice twice")
    if marks and len(marks) != len(texts):
        raise _Unusable(f"'{name}' has {len(texts)} choices but {len(marks)} names for them")
    return _Choices(texts, marks)


def _chosen(value: Any, choices: _Choices, count_from: int, name: str) -> str:
    """The choice that an answer means, by the file's name for it, its words, its number or its letter."""
    text = label_text(value) or " ".join(_words(value).split())
    if not text:
        raise _Unusable(f"'{name}' is {_lacking(value)}")
    number = value - count_from if isinstance(value, int) and not isinstance(value, bool) else -1
    if not choices.marks and 0 <= number < len(choices.texts):  # it means a place, also where the choices are numbers
        return choices.texts[number]
    folded = [choice.casefold() for choice in choices.texts]
    for known in (choices.marks, choices.texts):
        if text in known:
            return choices.texts[known.index(text)]
    if text.casefold() in folded:
        return choices.texts[folded.index(text.casefold())]
    letter = len(text) == 1 and text.isascii()
    place = int(text) - count_from if text.isdecimal() else ord(text.upper()) - ord("A") if letter else -1
    if 0 <= place < len(choices.texts):
        return choices.texts[place]
    other = 1 - count_from
    hint = f"; if numbers begin at {other} say --count-from {other}" if text.isdecimal() else ""
    raise _Unusable(f"'{name}' is '{text}', none of the row's {len(choices.texts)} choices{hint}")


def _lacking(value: Any) -> str:
    """What is wrong with a value that has no words."""
    if value is None or value != value:
        return "missing"
    if isinstance(value, Mapping):
        return "an object without 'text'"
    return "empty" if isinstance(value, str | list | tuple) else f"of type {type(value).__name__}"


# ---- lines cut at a separator --------------------------------------------------------------------------------------


def _first_separated(part: Part) -> list[str]:
    for number, line in _lines(part.path):
        if isinstance(line, str):
            return [name.strip() for name in line.split(part.separator)]
        raise DataError("is not UTF-8", where=f"{part.path.name}:{number}", todo="Save the file as UTF-8.")
    raise DataError("is empty", where=str(part.path), todo="Put at least one row into it.")


def _separated(path: Path, separator: str, names: Sequence[str]) -> Iterator[Record | SkippedRow]:
    """Lines cut at `separator`; the first one is left out where it is the header that gave the names."""
    row = 0
    for number, line in _lines(path):
        origin = f"{path.name}:{number}"
        if line is None:
            row += 1
            yield SkippedRow(origin, "is not UTF-8", row)
            continue
        values = [value.strip() for value in line.split(separator)]
        if not row and values == list(names):
            continue
        row += 1
        if len(values) == len(names):
            yield Record(dict(zip(names, values, strict=True)), origin, row)
        else:
            reason = (
                f"has {len(values)} fields cut at '{separator}' where {len(names)} are expected ({', '.join(names)})"
            )
            yield SkippedRow(origin, reason, row)


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Lines with words and their numbers; None for one that is not UTF-8."""
    with readable(path), open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8").removeprefix(_BOM if number == 1 else "")
            except UnicodeDecodeError:
                yield number, None
                continue
            if line.strip():
                yield number, line.rstrip("\r\n")
