"""A mix of files, described in YAML: which files, of which tasks, and how many rows of each.

    rows: 20000                      # in all; by default as many as go without drawing a row twice
    max_rate: 3000                   # more rows than that give a file no more weight
    cap: 30000                       # at most so many rows of a file are drawn from
    parts:
      - {file: sst2-train.tsv, task: sentiment, balance: true}
      - {file: e2e-valid.txt, task: data-to-text, separator: "||"}
      - {file: wmt.jsonl, task: translation, columns: {source: de, target: en},
         constants: {source_language: German, target_language: English}}

Files, and tasks that are files, are found from the folder in which the mix lies. Source: `flan.py`.
Not here: what the numbers do (`flan.proportional`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from lilliput.errors import UsageError
from lilliput.progress import say
from lilliput.synthesis.flan import CAP, MAX_RATE
from lilliput.synthesis.flan_rows import Part
from lilliput.synthesis.flan_tasks import Strict, label_text, load_task, parse_yaml, task_names


class MixPart(Strict):
    """One file of a mix: the fields of `flan_rows.Part`, and `labels`, the file's value -> the label's name."""

    file: str
    task: str
    columns: dict[str, str] = Field({})
    constants: dict[str, str] = Field({})
    labels: dict[str, str] = Field({})
    separator: str = ""
    names: tuple[str, ...] = ()
    count_from: Literal[0, 1] = 0
    cap: int | None = Field(None, ge=1)
    balance: bool = False

    @field_validator("labels", mode="before")
    @classmethod
    def _as_text(cls, labels: Any) -> Any:
        """YAML reads 0 as a number."""
        if not isinstance(labels, dict):
            return labels
        return {str(label_text(value)): str(label_text(name)) for value, name in labels.items()}


class Mix(Strict):
    """A mix as its file says it."""

    INNER: ClassVar[dict[str, type[BaseModel]]] = {"parts": MixPart}

    parts: tuple[MixPart, ...] = Field(min_length=1)
    rows: int | None = Field(None, ge=1)
    max_rate: int = Field(MAX_RATE, ge=1)
    cap: int = Field(CAP, ge=1)

    def open(self, folder: Path) -> list[Part]:
        """The parts, their paths taken from `folder`. Raises UsageError for a task that does not exist."""
        return [
            make_part(
                folder / part.file, part.task if part.task in task_names() else folder / part.task, labels=part.labels,
                columns=part.columns, constants=part.constants, separator=part.separator, names=part.names,
                count_from=part.count_from, cap=part.cap or self.cap, balance=part.balance,
            )
            for part in self.parts
        ]  # fmt: skip


def make_part(path: Path, task: str | Path, *, labels: Mapping[str, str], **how: Any) -> Part:
    """A part of a task that is loaded by its name or from its file, with labels as a person names them, if any."""
    loaded = load_task(task)
    named = loaded.with_labels(labels) if labels else loaded
    lost = len(loaded.templates) - len(named.templates)
    if lost:
        said = f"{lost} of the {len(loaded.templates)} templates of {loaded.name} are left out"
        say(f"{said}: they say its labels in words of their own, which do not go with {', '.join(named.labels)}")
    return Part(path, named, **how)


def load_mix(path: str | Path) -> Mix:
    """Read a mix. Raises UsageError: no such file, no YAML, an unknown key (with the nearest), a wrong value."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"cannot be read ({said})", where=str(path), todo="Name a YAML file.") from error
    return parse_yaml(text, str(path), Mix)
