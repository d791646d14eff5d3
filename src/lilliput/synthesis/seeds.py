"""Seed tasks: what people wrote, from which a language model's own tasks grow.

Source: Self-Instruct, arXiv 2212.10560, section 2.2. A seed task is an instruction with at least one instance (an
input, which may be empty, and its output). The built-in ones (`seeds.jsonl`, written for this project) have the fields
of the 175 public ones: `id`, `name`, `instruction`, `instances`, `is_classification`. Rows with `instruction` and
`output` (Alpaca) are seed tasks with one instance.
Not here: how a task is shown to a model (`prompts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lilliput.data.reading import type_of
from lilliput.data.records import Record, read_records
from lilliput.errors import DataError, nearest

BUILT_IN = Path(__file__).with_name("seeds.jsonl")


@dataclass(frozen=True)
class Instance:
    """One case of a task: `input` may be "", `output` is not."""

    input: str
    output: str


@dataclass(frozen=True)
class SeedTask:
    """A task written by a person. `classification` is None where the file does not say whether it is one."""

    name: str
    instruction: str
    instances: tuple[Instance, ...]
    classification: bool | None = None


class SeedTasks(Sequence[SeedTask]):
    """The tasks of a file in its order, and the SHA-256 of what they say."""

    def __init__(self, tasks: Sequence[SeedTask], sha256: str) -> None:
        self._tasks, self.sha256 = tuple(tasks), sha256

    @overload
    def __getitem__(self, index: int) -> SeedTask: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SeedTask, ...]: ...
    def __getitem__(self, index: int | slice) -> SeedTask | tuple[SeedTask, ...]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[SeedTask]:
        return iter(self._tasks)


def read_seeds(path: str | Path | None = None) -> SeedTasks:
    """The seed tasks of a JSON, JSONL, CSV, TSV or Parquet file; the built-in ones by default.

    Raises:
        DataError: a file that cannot be read; a row that is no task, or a field of it that is missing, empty or of
            the wrong type, with file and line.
    """
    records = read_records(BUILT_IN if path is None else path)
    return SeedTasks([_task(record) for record in records], records.sha256)


def _task(record: Record) -> SeedTask:
    fields = record.fields
    instruction = _text(fields, "instruction", record.origin)
    if "instances" in fields:
        instances = _instances(fields["instances"], record.origin)
    elif "output" in fields:
        instances = (_instance(fields, "", record.origin),)
    else:
        what = f"has neither 'instances' nor 'output'{_meant(fields)}"
        todo = "A seed task is {instruction, instances: [{input, output}]}, or a row with instruction, input, output."
        raise DataError(what, where=record.origin, todo=todo)
    name = fields.get("name") or fields.get("id") or f"row {record.row}"
    return SeedTask(str(name), instruction, instances, _classification(fields, record.origin))


def _instances(value: Any, origin: str) -> tuple[Instance, ...]:
    if not isinstance(value, list) or not value:
        what = "is empty" if value == [] else f"is {type_of(value)}, not a list of inputs and outputs"
        raise DataError(f"'instances' {what}", where=origin)
    return tuple(_instance(item, f"instances[{number}]", origin) for number, item in enumerate(value))


def _instance(fields: Any, inside: str, origin: str) -> Instance:
    """`inside` is the path to `fields` within the row, "" for the row itself."""
    if not isinstance(fields, dict):
        raise DataError(f"'{inside}' is {type_of(fields)}, not an object with input and output", where=origin)
    given = fields.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(f"'{_path(inside, 'input')}' is {type_of(given)}, not text", where=origin)
    return Instance((given or "").strip(), _text(fields, "output", origin, inside))


def _text(fields: Mapping[str, Any], key: str, origin: str, inside: str = "") -> str:
    if key not in fields:
        raise DataError(f"has no '{_path(inside, key)}'{_meant(fields, key)}", where=origin)
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"'{_path(inside, key)}' is {type_of(value)}, not text", where=origin)
    if not value.strip():
        raise DataError(f"'{_path(inside, key)}' is empty", where=origin)
    return value.strip()


def _classification(fields: Mapping[str, Any], origin: str) -> bool | None:
    value = fields.get("is_classification")
    if value is not None and not isinstance(value, bool):
        raise DataError(f"'is_classification' is {type_of(value)}, not true or false", where=origin)
    return value


def _path(inside: str, key: str) -> str:
    return f"{inside}.{key}" if inside else key


def _meant(fields: Mapping[str, Any], key: str = "instances") -> str:
    """The keys that are there, and the nearest of them."""
    seen = ", ".join(f"'{name}'" for name in fields) or "none"
    return f" (its keys are {seen}{nearest(key, fields)})"
