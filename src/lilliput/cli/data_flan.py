"""`lilliput data flan`: Rows of a table as instructions, through templates."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer, choose
from lilliput.errors import UsageError
from lilliput.progress import say

if TYPE_CHECKING:
    from lilliput.synthesis.flan import FlanReport, Sample, Wording
    from lilliput.synthesis.flan_mix import Mix
    from lilliput.synthesis.flan_rows import Part
    from lilliput.synthesis.flan_tasks import Column, Task

_OPTIONS = ("written", "always", "never")
_SHOWN = 700  # characters of a sample on the screen

Pairs = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK=FILE,…", help="The task's column and the file's, where names differ; a+b makes a list."),
]
Constants = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN=WORDS,…", help="A column that has the same words in all rows."),
]
Labels = Annotated[
    list[str] | None, typer.Option(metavar="VALUE=NAME,…", help="What the file's labels are called, e.g. 0=bad,1=good.")
]


def flan(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Rows: CSV, TSV, JSON, JSONL, Parquet; or text with --separator."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="What the rows are, e.g. sentiment; or a YAML file of your own."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="The JSONL file to write.")] = None,
    mix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of FILE: YAML that lists files with their tasks.")
    ] = None,
    templates: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Draw from the task's first N templates; by default from all."),
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="Write every row through all of them, not through one.")] = False,
    turned: Annotated[
        bool, typer.Option("--turned/--no-turned", help="Also templates that ask for the input and give the answer.")
    ] = True,
    options: Annotated[
        str, typer.Option(metavar="WHEN", help="Answers to choose from: written (as a template has it), always, never.")
    ] = "written",
    option_order: Annotated[
        str, typer.Option(metavar="ORDER", help="Their order: shuffled for each row, or fixed.")
    ] = "shuffled",
    shots: Annotated[int, typer.Option(min=0, metavar="N", help="Solved examples before the question.")] = 0,
    few_shot_share: Annotated[
        float, typer.Option(min=0, max=1, metavar="X", help="With --shots: share of the rows that get them.")
    ] = 1.0,
    balance: Annotated[bool, typer.Option("--balance", help="Draw equally many rows of each label.")] = False,
    cap: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Draw from at most N rows; in a mix 30,000 of each file.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Draw N rows in all; if there are fewer, some again.")
    ] = None,
    columns: Pairs = None,
    constants: Constants = None,
    labels: Labels = None,
    separator: Annotated[str, typer.Option(metavar="TEXT", help="What cuts the lines of a text file, e.g. '||'.")] = "",
    names: Annotated[
        str, typer.Option(metavar="NAME,…", help="The columns of a file without a header line, in order.")
    ] = "",
    count_from: Annotated[
        int, typer.Option(min=0, max=1, metavar="0|1", help="Where an answer is the number of a choice: of the first.")
    ] = 0,
    to: Annotated[str, typer.Option(metavar="FORM", help="Written as messages, prompt-completion or p3.")] = "messages",
    seed: Annotated[int, typer.Option(metavar="N", help="Of all draws: the same seed, the same file.")] = 0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and count them.")
    ] = False,
    show: Annotated[
        bool,
        typer.Option("--show", help="Only show the task's file, to begin one of your own; without --task, all tasks."),
    ] = False,
) -> Answer:
    """Turn the rows of a table into instructions: each through a template, drawn from the many of its task.

    Tasks: sentiment, nli, paraphrase, classification, closed-book-qa, reading-comprehension, commonsense, coreference,
    summarisation, translation, data-to-text. A task is a YAML file; --show prints one.

    Example:  lilliput data flan sst2.tsv --task sentiment -o flan.jsonl --templates 10

    Example:  lilliput data flan --mix mix.yaml -o flan.jsonl --shots 3 --few-shot-share 0.5
    """
    if show:
        return _show(task)
    from lilliput.synthesis.flan import TARGETS, Wording
    from lilliput.synthesis.flan import flan as write

    choose(options, _OPTIONS, "--options")
    choose(option_order, ("shuffled", "fixed"), "--option-order")
    choose(to, TARGETS, "--to")
    if few_shot_share < 1 and not shots:
        raise UsageError("there are no solved examples to give", where="--few-shot-share", todo="Say --shots N too.")
    if out is None:
        raise UsageError("-o FILE is missing", where="--out", todo="Name the JSONL file to write.")
    own = {
        "columns": pairs(columns, "--columns"), "constants": pairs(constants, "--constants"),
        "labels": pairs(labels, "--labels"), "separator": separator.replace("\\t", "\t"), "count_from": count_from,
        "names": tuple(name.strip() for name in names.split(",") if name.strip()), "cap": cap, "balance": balance,
    }  # fmt: skip
    wording = Wording(templates, each, turned, options, option_order == "shuffled", shots, few_shot_share)  # type: ignore[arg-type]
    max_rate = None
    if mix is not None:
        _check_mix(file, task, each, own)
        mixed, parts = _read_mix(mix)
        max_rate, rows = mixed.max_rate, rows or mixed.rows
    else:
        parts = [_read_part(file, task, own)]
    started = time.perf_counter()
    report = write(parts, out, wording, seed=seed, target=to, rows=rows, max_rate=max_rate, skip_bad_rows=skip_bad_rows)
    for note in report.notes:
        say(note)
    results = {"out": str(out), "seed": seed, **report.to_json(), "seconds": round(time.perf_counter() - started, 3)}
    return Answer(results, _people(report, results, parts, wording))


def pairs(given: list[str] | None, option: str) -> dict[str, str]:
    """`["a=b,c=d", "e=f"]` as a dictionary. Raises UsageError for a piece that is none, and for a name given twice."""
    found: dict[str, str] = {}
    for piece in (piece for words in given or () for piece in words.split(",")):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not (name and equals and value):
            raise UsageError(f"'{piece}' is not of the form NAME=VALUE", where=option)
        if found.get(name, value) != value:
            raise UsageError(f"'{name}' is given twice, as {found[name]} and as {value}", where=option)
        found[name] = value
    return found


def _show(task: str | None) -> Answer:
    """The file of a task, or what tasks there are."""
    from lilliput.synthesis.flan_tasks import load_task, task_names, task_source

    if task:
        source = task_source(task)
        load_task(task)
        return Answer({"task": task, "yaml": source}, source.rstrip("\n"))
    tasks = [load_task(name) for name in task_names()]
    table = Table("task", "rows", "columns", "templates")
    for one in tasks:
        table.add_row(
            one.name, one.about, ", ".join(map(_column, one.columns, one.columns.values())), str(len(one.templates))
        )
    listed = [
        {"name": one.name, "about": one.about, "columns": list(one.columns), "templates": len(one.templates)}
        for one in tasks
    ]
    return Answer({"tasks": listed}, table)


def _column(name: str, column: Column) -> str:
    return f"({name})" if column.optional or column.default is not None else name


def _check_mix(file: Path | None, task: str | None, each: bool, own: Mapping[str, Any]) -> None:
    """A mix says itself what belongs to its files."""
    given = [name for name, value in {"task": task, **own}.items() if value]
    if file is not None:
        raise UsageError(f"{file} is given beside --mix", where="--mix", todo="Name it in the mix.")
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError("belongs to one file", where=option, todo="Say it in the mix, under the file it belongs to.")
    if each:
        raise UsageError(
            "--each and --mix exclude each other: tasks have different numbers of templates", where="--each"
        )


def _read_mix(path: Path) -> tuple[Mix, list[Part]]:
    from lilliput.synthesis.flan_mix import load_mix

    mixed = load_mix(path)
    return mixed, mixed.open(path.parent)


def _read_part(file: Path | None, task: str | None, own: dict[str, Any]) -> Part:
    from lilliput.synthesis.flan_mix import make_part
    from lilliput.synthesis.flan_tasks import task_names

    if file is None:
        raise UsageError("a FILE of rows is missing", todo="Name one, or a --mix of several.")
    if task is None:
        raise UsageError("is missing", where="--task", todo=f"Tasks: {', '.join(task_names())}; or a YAML file.")
    return make_part(file, task, **own)


# ---- for people ----


def _people(report: FlanReport, results: dict[str, Any], parts: list[Part], wording: Wording) -> Group:
    rows = {
        "rows": f"{report.rows:,}, of these {report.turned:,} turned around and {report.with_options:,} with options",
        "zero-shot": f"{results['zero_shot']:,}",
        "few-shot": f"{results['few_shot']:,}" + _by_shots(report),
        "written": f"{results['out']}, {results['seconds']:.1f} s",
    }
    tables: list[RenderableType] = [facts("Instructions from templates", rows), _parts(report)]
    if len(parts) == 1:
        tables.append(_templates(report, parts[0].task, wording))
    return Group(*tables, *map(_sample, report.samples))


def _by_shots(report: FlanReport) -> str:
    found = [f"{rows:,} with {shots}" for shots, rows in sorted(report.shots.items()) if shots]
    return f" ({', '.join(found)} examples)" if found else ""


def _parts(report: FlanReport) -> Table:
    table = Table(title=Text("Files"), title_justify="left")
    for name in ("file", "task"):
        table.add_column(name, no_wrap=True)
    for name in ("rows", "bad", "left out", "drawn", "written"):
        table.add_column(name, justify="right")
    table.add_column("written by label")
    for part in report.parts:
        labels = ", ".join(f"{name} {rows:,}" for name, rows in sorted(part.labels.items()))
        numbers = (part.read, part.skipped, part.left_out, part.drawn, part.rows)
        table.add_row(Text(part.file), part.task, *(f"{number:,}" for number in numbers), Text(labels))
    return table


def _templates(report: FlanReport, task: Task, wording: Wording) -> Table:
    table = Table(title=Text("Templates"), title_justify="left")
    table.add_column("", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("asks", no_wrap=True, max_width=100)
    for number, template in wording.of(task):
        turned = "(turned around) " if template.turned else ""
        table.add_row(
            str(number), f"{report.parts[0].templates[number]:,}", Text(turned + " ".join(template.prompt.split()))
        )
    return table


def _sample(sample: Sample) -> Text:
    shown = replace(sample, prompt=_cut(sample.prompt), answer=_cut(sample.answer))
    head = f"\n{shown.source}, template {shown.template} of {shown.task}\n"
    return Text.assemble((head, "dim"), shown.prompt, "\n", ("answer: ", "dim"), (shown.answer, "green"))


def _cut(words: str) -> str:
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]} …"
