"""`lilliput check`: are the promises kept on this model and these rows? Asked before an hour is spent on training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from lilliput.cli.door import Answer, LabelColumn, Model, NumberFormat, RecipeName, Settings, Task, TextColumn
from lilliput.cli.tune import Data, read_recipe

if TYPE_CHECKING:
    from lilliput.training import CheckResult


def check(
    model: Model,
    data: Data,
    task: Task = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    number_format: NumberFormat = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that are broken.")] = False,
) -> Answer:
    """Check the promises of exactness on your model and rows, without training.

    Packed loss = unpacked loss; accumulation 1x8 = 8x1; end tokens and labels where they belong; one BOS; gradients at
    every adapter; saved and loaded adapters answer the same. Shows one example with what is learned in colour.
    Exit status 1 when a promise is broken.

    Example:  lilliput check smollm2-135m-instruct --data my.jsonl
    """
    plan = read_recipe(
        recipe, settings, number_format,
        task=task, text_column=text_column, label_column=label_column, skip_bad_rows=skip_bad_rows,
    )  # fmt: skip
    from lilliput.training import check_data

    results = check_data(model, data, plan)
    broken = [result.name for result in results if not result.passed]
    fault = f"{len(broken)} of {len(results)} promises broken: {', '.join(broken)}" if broken else ""
    return Answer({"passed": not broken, "checks": [asdict(result) for result in results]}, _table(results), fault)


def _table(results: Sequence[CheckResult]) -> Table:
    table = Table("", "promise", "found", title="Promises, on your rows", title_justify="left")
    table.columns[2].overflow = "fold"
    for result in results:
        verdict = Text("kept", style="green") if result.passed else Text("BROKEN", style="bold red")
        found = "\n".join(line for line in (result.detail, result.todo) if line)
        table.add_row(verdict, result.name, Text(found))
    return table
