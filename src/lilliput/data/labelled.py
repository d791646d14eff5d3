"""A row becomes a text with a class: columns found, labels named and counted, texts encoded.

    my.tsv:7  "a gripping film<TAB>pos"  ->  ids [CLS] a gripping film [SEP], class 1 of ["neg", "pos"]

A label is a text or a whole number, and its name is what is kept; classes are numbered in the order of their names,
numbers by value. Rows come from any file of `records.py`. In a .tsv file quotes are literal here, as in GLUE's files,
and two columns without a header are a text and its label.
Not here: chats (`chats.py`), several labels to a row, texts in pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.data.examples import Overlong
from lilliput.data.records import Record, Records, SkippedRow, first_fields, gather, settle
from lilliput.errors import DataError, nearest
from lilliput.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label",)
_AT_ONCE = 256  # texts handed to the tokenizer at a time
_MANY = 100  # such parts, from which on a bar is shown
_SHOWN = 8  # labels in an error before "…"


@dataclass(frozen=True)
class LabelledText:
    """One row: its text, the name of its label, and where it stands (`"my.tsv:7"`)."""

    text: str
    label: str
    origin: str = ""


@dataclass(frozen=True)
class LabelledTexts:
    """The good rows of a file, the bad ones that were left out, the fingerprint of all, and what is to be said."""

    rows: list[LabelledText]
    skipped: list[SkippedRow] = field(default_factory=list)
    sha256: str = ""
    note: str = ""

    def labels(self) -> list[str]:
        """The names of the labels that occur, in the order of the classes: numbers by value, else by name."""
        return in_order({row.label for row in self.rows})


@dataclass(frozen=True)
class ClassExample:
    """Token ids of one text, special tokens included, and the number of its class."""

    input_ids: list[int]
    label: int
    origin: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class ClassSet:
    """The examples of a file and what became of its rows.

    Attributes:
        examples: in the order of the file.
        labels: names of the classes; an example's `label` is an index into it.
        overlong: origins of the texts longer than `max_length`, which were dropped or truncated.
        overlong_rule: what was done with them.
        skipped: bad rows that were left out.
        sha256: fingerprint of the file's rows.
    """

    examples: list[ClassExample]
    labels: list[str]
    overlong: list[str] = field(default_factory=list)
    overlong_rule: Overlong = "truncate"
    skipped: list[SkippedRow] = field(default_factory=list)
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[ClassExample]:
        return iter(self.examples)

    def counts(self) -> dict[str, int]:
        """How many examples each class has."""
        return class_counts(self.examples, self.labels)

    def report(self) -> str:
        """One line: how many examples there are, and how many rows went another way."""
        parts = [f"{len(self.examples):,} examples"]
        if self.overlong:
            fate = "dropped" if self.overlong_rule == "drop" else "truncated"
            parts.append(f"{len(self.overlong):,} over-long rows {fate}")
        if self.skipped:
            parts.append(f"{len(self.skipped):,} bad rows skipped")
        return ", ".join(parts)


def read_labelled(
    path: str | Path, *, text_column: str | None = None, label_column: str | None = None, skip_bad_rows: bool = False
) -> LabelledTexts:
    """Read the labelled texts of a JSON, JSONL, CSV, TSV or Parquet file.

    Args:
        path: the file.
        text_column: the column with the text; None takes `text` or `sentence`.
        label_column: the column with the label, a text or a whole number; None takes `label`.
        skip_bad_rows: leave out rows without a text or a label and list them, instead of refusing the file.

    Raises DataError for a file that cannot be read, columns that are not there (with those that are), and bad rows: no
    label, one that is neither text nor whole number, an empty text.
    """
    path = Path(path)
    records, note = _gather(path, text_column, label_column)
    text, label = _columns(path, records, text_column, label_column)
    rows, bad = [], list(records.skipped)
    for record in records:
        made = _labelled(record, text, label)
        if isinstance(made, SkippedRow):
            bad.append(made)
        else:
            rows.append(made)
    settle(path, bad, len(records) + len(records.skipped), skip=skip_bad_rows)
    if note:
        _check_first_line(path, rows)
    return LabelledTexts(rows, sorted(bad, key=lambda row: row.row), records.sha256, note)


def _gather(path: Path, text_column: str | None, label_column: str | None) -> tuple[Records, str]:
    """The raw rows, and what is to be said where a header was found missing."""
    first = first_fields(path, literal=True)
    known = {*TEXT_COLUMNS, *LABEL_COLUMNS}
    if (
        path.suffix.lower() == ".tsv"
        and first
        and len(first) == 2
        and not (text_column or label_column or known & {*first})
    ):
        columns = (TEXT_COLUMNS[0], LABEL_COLUMNS[0])
        note = f"{path.name} has no header: its first column is read as the text, its second as the label"
        return gather(path, columns=columns, literal=True), note
    return gather(path, literal=True), ""


def _check_first_line(path: Path, rows: Sequence[LabelledText]) -> None:
    """Raise DataError when the first line of a file that seems to have no header looks like one after all."""
    first, others = rows[0], {row.label for row in rows[1:]}
    if len(others) > 1 and first.label not in others and first.origin == f"{path.name}:1":
        raise DataError(
            f"the label '{first.label}' stands nowhere else, so this line may be a header",
            where=first.origin,
            todo=f"If it is, say --text-column '{first.text}' --label-column '{first.label}'; if not, begin the file "
            "with the line text<TAB>label.",
        )


def _columns(path: Path, records: Records, text: str | None, label: str | None) -> tuple[str, str]:
    """The names of the two columns. Raises DataError with what is there instead."""
    there = list(dict.fromkeys(name for record in records[:100] for name in record.fields))
    if not records:  # every row is broken; `settle` says how
        return text or TEXT_COLUMNS[0], label or LABEL_COLUMNS[0]
    found = []
    for what, asked, usual in (("text", text, TEXT_COLUMNS), ("label", label, LABEL_COLUMNS)):
        wanted = (asked,) if asked else usual
        name = next((name for name in wanted if name in there), None)
        if name is None:
            missing = " or ".join(f"'{name}'" for name in wanted)
            near = nearest(wanted[0], there)
            todo = f"Name the column with --{what}-column (data.{what}_column in a recipe)."
            raise DataError(
                f"has no column {missing}{near}; its columns are {', '.join(there) or 'none'}",
                where=str(path),
                todo=todo,
            )
        found.append(name)
    return found[0], found[1]


def _labelled(record: Record, text_column: str, label_column: str) -> LabelledText | SkippedRow:
    text, label = record.fields.get(text_column), record.fields.get(label_column)
    if text is not None and not isinstance(text, str):
        return SkippedRow(record.origin, f"'{text_column}' is no text ({type(text).__name__})", record.row)
    if text is None or not text.strip():
        return SkippedRow(record.origin, f"'{text_column}' is {'missing' if text is None else 'empty'}", record.row)
    name = _label_name(label)
    if name is None:
        return SkippedRow(record.origin, f"'{label_column}' is {_fault(label)}", record.row)
    return LabelledText(text, name, record.origin)


def _label_name(label: Any) -> str | None:
    """A label as its name: 1, 1.0 and "1" are the same class; None where it is none."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return str(int(label))
    return (label.strip() or None) if isinstance(label, str) else None


def _fault(label: Any) -> str:
    if label is None or (isinstance(label, float) and label != label):
        return "missing"
    return "empty" if isinstance(label, str) else f"{label!r}, expected a text or a whole number"


def in_order(labels: Iterable[str]) -> list[str]:
    """Distinct labels in the order of the classes: by value where all are whole numbers, else by name."""
    distinct = sorted(set(labels))
    try:
        return sorted(distinct, key=int)
    except ValueError:
        return distinct


def check_classes(path: Path, labels: Sequence[str]) -> None:
    """Raise DataError unless there are two classes or more to tell apart."""
    if len(labels) < 2:
        todo = "A classifier needs rows of at least two classes."
        raise DataError(f"all rows have the label '{labels[0]}'", where=str(path), todo=todo)


def encode_labelled(
    texts: LabelledTexts,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    progress: bool = True,
) -> ClassSet:
    """Token ids and class numbers of texts.

    Args:
        texts: from `read_labelled`.
        tokenizer: the model's; it puts its special tokens around each text.
        labels: names of the classes.
        max_length: tokens of the longest example, special tokens included.
        overlong: what to do with longer ones; a truncated one keeps its special tokens.
        progress: show a bar.

    Raises DataError for a label that is none of `labels` (with its row), for a text that is too long where `overlong`
    is "error", and when no example is left.
    """
    number = {name: index for index, name in enumerate(labels)}
    for row in texts.rows:
        if row.label not in number:
            known = ", ".join(labels[:_SHOWN]) + (", …" if len(labels) > _SHOWN else "")
            raise DataError(
                f"the label '{row.label}' is none that was learned{nearest(row.label, labels)}",
                where=row.origin,
                todo=f"The classes are: {known}. Correct the row, or train with rows of this class.",
            )
    examples, long = [], []
    encoded = encode_texts([row.text for row in texts.rows], tokenizer, max_length, progress=progress)
    for row, ids, longer in zip(texts.rows, *encoded, strict=True):
        if longer:
            long.append(row.origin)
        if not longer or overlong == "truncate":
            examples.append(ClassExample(ids, number[row.label], row.origin))
    if long and overlong == "error":
        what = (
            f"more than {max_length:,} tokens (data.max_length); {len(long):,} of {len(texts.rows):,} rows are longer"
        )
        raise DataError(what, where=long[0], todo="Raise data.max_length, or set data.overlong to drop or truncate.")
    if not examples:
        what = f"all {len(long):,} rows have more than {max_length:,} tokens"
        raise DataError(what, todo="Raise data.max_length, or set data.overlong=truncate.")
    return ClassSet(examples, list(labels), long, overlong, texts.skipped, texts.sha256)


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, *, progress: bool = False
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of each text with the special tokens, cut at `max_length`, and whether something was cut off."""
    parts = [list(texts[at : at + _AT_ONCE]) for at in range(0, len(texts), _AT_ONCE)]
    ids: list[list[int]] = []
    longer: list[bool] = []
    for part in track(parts, "reading rows", shown=progress and len(parts) > _MANY):
        whole = tokenizer(part, verbose=False)["input_ids"]
        if any(len(row) > max_length for row in whole):
            ids += tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        else:
            ids += whole
        longer += [len(row) > max_length for row in whole]
    return ids, longer


def class_counts(examples: Iterable[ClassExample], labels: Sequence[str]) -> dict[str, int]:
    """How many of these examples each class has, in the order of the classes."""
    found = Counter(example.label for example in examples)
    return {name: found[index] for index, name in enumerate(labels)}


def collate_labelled(examples: Sequence[ClassExample], pad_token_id: int) -> dict[str, Tensor]:
    """A batch, padded at the right to its longest example.

    Returns: input_ids int64 [rows, tokens]; attention_mask int64 [rows, tokens], 1 where a token is no padding; labels
    int64 [rows]; tokens: how many are no padding.
    """
    longest = max(map(len, examples))
    rows = [example.input_ids + [pad_token_id] * (longest - len(example)) for example in examples]
    seen = [[1] * len(example) + [0] * (longest - len(example)) for example in examples]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(seen),
        "labels": torch.tensor([example.label for example in examples]),
        "tokens": torch.tensor(sum(map(len, examples))),
    }


def length_batches(examples: Sequence[ClassExample], batch_size: int) -> list[list[int]]:
    """Numbers of the examples in batches, those of similar length together, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
