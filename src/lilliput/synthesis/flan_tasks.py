"""FLAN's task types as data: which columns a task has, how its labels are called, and its templates.

A task is one YAML file; those of `templates/` come with the package, and a person's own is read in the same way, so
that a task is added without code. A template says how a row is asked, and how it is answered:

    {prompt: "Is this review {options}?  {sentence}", answer: "{label}"}      sst2.tsv:17 -> a question, "negative"
    {prompt: "Write a review that is {label}.", answer: "{sentence}", turned: true}        -> the row turned around

Source: FLAN (arXiv 2109.01652), section 2.1 (ten templates a data set, up to three of them turned around) and 2.3 (the
options behind a question that has a fixed set of answers). All wording is ours.
Not here: reading rows (`flan_rows.py`), drawing and mixing them (`flan.py`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lilliput.errors import UsageError, nearest

OPTIONS = "options"  # the placeholder that writes the options within a sentence: "negative or positive"
_LIST_HEAD = "Answer with one of these:"
M = TypeVar("M", bound="Strict")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Strict(BaseModel):
    """What a file holds, or a part of it; unknown keys are refused. INNER: key -> what the lists under it hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    INNER: ClassVar[dict[str, type[BaseModel]]] = {}


class Column(Strict):
    """One column of a task.

    kind: what stands in it. `text`: words. `label`: one of the task's labels. `choices`: a list of answers to choose
    from. `answer`: words, or, where the row has choices, one of them by number, letter or words. `facts`: words, a
    list, or names with values.
    """

    kind: Literal["text", "label", "choices", "answer", "facts"] = "text"
    aliases: tuple[str, ...] = Field(
        (), description="what files call it; `a+b` makes a list of two columns, `a.b` looks into an object"
    )
    optional: bool = Field(False, description="rows without it are taken, by templates that do not ask for it")
    default: str | None = Field(None, description="what is written where a file does not have it")
    about: str = Field("", description="what it is, for people")


class Template(Strict):
    """One way to ask a row.

    Placeholders are column names in braces, and `{options}` for the answers to choose from; a brace is written twice.
    """

    prompt: str
    answer: str = ""
    options: bool = Field(False, description="list the options below the prompt")
    turned: bool = Field(False, description="the input is asked for, and the answer is given")
    words: dict[str, str] = Field({}, description="label -> how this template says it")

    @cached_property
    def asks(self) -> frozenset[str]:
        """The columns that a row must have to be written with this template."""
        return frozenset(placeholders(self.prompt) | placeholders(self.answer)) - {OPTIONS}

    @cached_property
    def inline(self) -> bool:
        """Whether the options stand within the prompt."""
        return OPTIONS in placeholders(self.prompt)


class Task(Strict):
    """A task type. `load_task` reads one.

    labels: name -> how files write it besides; empty: the names are those that the file has.
    answer: the column that a template answers with when it does not say.
    """

    INNER: ClassVar[dict[str, type[BaseModel]]] = {"columns": Column, "templates": Template}

    name: str
    about: str = ""
    columns: dict[str, Column]
    labels: dict[str, tuple[str, ...]] = {}
    answer: str
    templates: tuple[Template, ...] = Field(min_length=1)

    @field_validator("labels", mode="before")
    @classmethod
    def _values_as_text(cls, labels: Any) -> Any:
        """YAML reads 0 as a number and true as a truth value; a file's labels are compared as text."""
        if not isinstance(labels, dict):
            return labels
        values = {name: [held] if not isinstance(held, list | tuple) else held for name, held in labels.items()}
        return {name: [str(label_text(value)) for value in held if value is not None] for name, held in values.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> Task:
        _check_columns(self)
        answered = tuple(
            template if template.answer else template.model_copy(update={"answer": f"{{{self.answer}}}"})
            for template in self.templates
        )
        object.__setattr__(self, "templates", answered)
        for number, template in enumerate(self.templates, start=1):
            _check_template(self, template, number)
        return self

    def column_of(self, kind: str) -> str:
        """The name of the column of this kind, "" where there is none."""
        return next((name for name, column in self.columns.items() if column.kind == kind), "")

    @property
    def has_options(self) -> bool:
        """Whether rows of this task may come with answers to choose from."""
        return bool(self.column_of("label") or self.column_of("choices"))

    def label_names(self) -> dict[str, str]:
        """What files write for a label, in lower case -> the label's name."""
        known = {value.casefold(): name for name, values in self.labels.items() for value in values}
        return known | {name.casefold(): name for name in self.labels}

    def with_labels(self, names: Mapping[str, str]) -> Task:
        """The same task with labels named by the person: the file's value -> the name.

        Where these are other names than the task's own, templates that say the labels in words of their own (`words`)
        are left out, since their words belong to the names that went. Raises UsageError when none is left.
        """
        label = self.column_of("label")
        if not label:
            raise UsageError(f"the task {self.name} has no labels", where="--labels")
        labels: dict[str, list[str]] = {}
        for value, name in names.items():
            labels.setdefault(name, []).append(value)
        own = {name: place for place, name in enumerate(self.labels)}
        same = bool(self.labels) and labels.keys() <= own.keys()
        kept = self.templates if same else tuple(template for template in self.templates if not template.words)
        if not kept:
            raise UsageError(
                f"all templates of {self.name} say its labels in words of their own", where="--labels",
                todo=f"Map your values to its labels: {', '.join(own)}.",
            )  # fmt: skip
        ordered = sorted(labels, key=lambda name: own[name]) if same else list(labels)
        return self.model_copy(update={"labels": {name: tuple(labels[name]) for name in ordered}, "templates": kept})


def label_text(value: Any) -> str | None:
    """A label as the text it is compared by: 1, 1.0 and " 1 " are the same; None where it is no label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return (value.strip() or None) if isinstance(value, str) else None


def placeholders(text: str) -> set[str]:
    """The names in braces of a template's text. Raises ValueError for what is no plain `{name}`."""
    found = set()
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is None:
            continue
        if form or conversion or not _NAME.fullmatch(name):
            raise ValueError(f"'{{{name}}}' is no column name in braces; a brace that is meant is written twice")
        found.add(name)
    return found


# ---- a row through a template ------------------------------------------------------------------------------------


def render(
    template: Template,
    values: Mapping[str, str],
    options: Iterable[str] = (),
    *,
    listed: bool = False,
    label: str = "label",
) -> tuple[str, str]:
    """The prompt and the answer of one row.

    Args:
        template: one whose columns (`asks`) the row has.
        values: column -> words; a label by its name in the task.
        options: the answers to choose from, in the order in which they are written.
        listed: write them as a list below the prompt.
        label: the column whose value the template may say in words of its own.
    """
    said = {**values, label: template.words.get(values[label], values[label])} if label in values else values
    shown = [template.words.get(option, option) for option in options]
    filled = {**said, OPTIONS: _in_words(shown)}
    prompt = template.prompt.format_map(filled).strip()
    if listed and shown:
        prompt = "\n".join((prompt, "", _LIST_HEAD, *(f"- {option}" for option in shown)))
    return prompt, template.answer.format_map(filled).strip()


def _in_words(options: list[str]) -> str:
    """`negative, neutral or positive`."""
    return " or ".join((", ".join(options[:-1]), options[-1])) if len(options) > 1 else "".join(options)


# ---- reading -----------------------------------------------------------------------------------------------------


def task_names() -> list[str]:
    """Names of the tasks that come with the package."""
    folder = resources.files("lilliput.synthesis") / "templates"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def task_source(name_or_path: str | Path) -> str:
    """The YAML text of a task that comes with the package, or of a file. Raises UsageError as `load_task` does."""
    name = str(name_or_path)
    if name in task_names():
        return (resources.files("lilliput.synthesis") / "templates" / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        known = task_names()
        raise UsageError(
            f"no task and no file named '{name}'{nearest(name, known)}", where="--task",
            todo=f"Tasks: {', '.join(known)}; or a YAML file of your own.",
        ) from error  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read ({error})", where=name) from error


def load_task(name_or_path: str | Path) -> Task:
    """Read a task by its name or from a YAML file.

    Raises UsageError: no such task (with the nearest name), no YAML, an unknown key, a template that asks for a column
    that the task does not have, or one that shows its answer.
    """
    return parse_task(task_source(name_or_path), str(name_or_path))


def parse_task(text: str, where: str) -> Task:
    """A task from YAML text; `where` says in errors where it comes from. Raises as `load_task`."""
    return parse_yaml(text, where, Task)


def parse_yaml(text: str, where: str, model: type[M]) -> M:
    """YAML text as an instance of `model`. Raises UsageError in our words, unknown keys with the nearest known one."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"no YAML: {' '.join(str(error).split())}", where=where) from error
    if not isinstance(values, dict):
        raise UsageError(f"expected keys {', '.join(model.model_fields)}, found {str(values)[:60]!r}", where=where)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")  # a misspelt key first
        raise UsageError(_explain(fault, model), where=f"{where}{_place(fault)}") from error


def _place(fault: Any) -> str:
    """Where in the file: `: templates[3].prompt`, counted from 1 as people do."""
    said = ""
    for step in fault["loc"]:
        said += f"[{step + 1}]" if isinstance(step, int) else f".{step}" if said else f"{step}"
    return f": {said}" if said and said != "[key]" else ""


def _explain(fault: Any, model: type[Strict]) -> str:
    """One finding of pydantic in our words."""
    kind = fault["type"]
    if kind == "extra_forbidden":
        known = _fields_at(fault["loc"][:-1], model)
        return f"unknown key{nearest(str(fault['loc'][-1]), known)} Known: {', '.join(known)}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    if kind == "string_type":
        return (
            f"is {fault['input']!r}, not text; YAML reads yes, no, on and numbers as something else: put it in quotes"
        )
    return f"is {str(fault['input'])[:60]!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _fields_at(place: tuple[Any, ...], model: type[Strict]) -> list[str]:
    """The keys that are known at a place of a file: at the top, or within a thing of one of its lists."""
    held = model.INNER[place[0]] if place else model
    return list(held.model_fields)


def _check_columns(task: Task) -> None:
    for name in task.columns:
        if not _NAME.fullmatch(name) or name == OPTIONS:
            raise ValueError(
                f"columns: '{name}' cannot be a column's name: letters, digits and _ can, and '{OPTIONS}' is taken"
            )
    kinds = [column.kind for column in task.columns.values()]
    for kind in ("label", "choices", "answer"):
        if kinds.count(kind) > 1:
            raise ValueError(f"columns: {kinds.count(kind)} of kind {kind}, one is allowed")
    if task.answer not in task.columns:
        raise ValueError(f"answer: '{task.answer}' is no column{nearest(task.answer, task.columns)}")
    if task.labels and "label" not in kinds:
        raise ValueError("labels: there is no column of kind label")
    values = [value.casefold() for held in task.labels.values() for value in held]
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"labels: '{twice[0]}' stands for two labels")


def _check_template(task: Task, template: Template, number: int) -> None:
    where = f"templates[{number}]"
    asked: dict[str, set[str]] = {}
    for part in ("prompt", "answer"):
        try:
            asked[part] = placeholders(getattr(template, part))
        except ValueError as error:
            raise ValueError(f"{where}.{part}: {error}") from error
        choices = task.column_of("choices")
        if choices in asked[part]:
            raise ValueError(
                f"{where}.{part}: asks for {{{choices}}}; say {{{OPTIONS}}}, or options: true to list them below"
            )
        for name in sorted(asked[part] - {*task.columns, OPTIONS}):
            known = ", ".join(task.columns)
            raise ValueError(
                f"{where}.{part}: asks for {{{name}}}, which is no column{nearest(name, task.columns)} Columns: {known}"
            )
        if not asked[part] - {OPTIONS}:
            raise ValueError(f"{where}.{part}: names no column, so that all rows would be the same")
    shown = sorted(asked["prompt"] & asked["answer"])
    if shown:
        raise ValueError(f"{where}: the prompt shows {{{shown[0]}}}, which is what it is to be answered with")
    if (template.options or template.inline) and (not task.has_options or template.turned):
        why = "it is turned around" if template.turned else "the task has neither labels nor choices"
        raise ValueError(f"{where}: there are no options to show, since {why}")
    if template.inline and not task.column_of("label") and task.columns[task.column_of("choices")].optional:
        raise ValueError(
            f"{where}.prompt: asks for {{{OPTIONS}}}, but rows may be without choices; say options: true instead"
        )
    if template.words and not task.labels:
        raise ValueError(f"{where}.words: the task names no labels")
    for name in template.words:
        if name not in task.labels:
            raise ValueError(f"{where}.words: '{name}' is no label{nearest(name, task.labels)}")
