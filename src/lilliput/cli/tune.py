"""`lilliput tune`: fine-tune an adapter on a person's own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lilliput.cli.base import facts, size
from lilliput.cli.door import (
    Answer,
    LabelColumn,
    Model,
    NumberFormat,
    RecipeName,
    Settings,
    Stopped,
    Task,
    TextColumn,
    choose,
)
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from lilliput.training import Recipe, RunResult


Data = Annotated[Path, typer.Option("--data", metavar="FILE", help="Rows to learn: JSON, JSONL, CSV, TSV or Parquet.")]


def tune(
    model: Model,
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The run's folder: adapter, report, metrics.")
    ],
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to evaluate on; by default a share of --data is held out.")
    ] = None,
    task: Task = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    number_format: NumberFormat = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="First check what is promised, on your rows.")
    ] = True,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that are broken, and list them in the run's folder.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in DIR.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in DIR.")] = False,
) -> Answer:
    """Fine-tune an adapter on your own rows: QLoRA over a 4-bit base, or another recipe.

    Ctrl-C saves a checkpoint; --resume goes on as if nothing had happened. Recipes: qlora, lora, guanaco, alpaca-lora;
    classify, which --task classify takes, for texts with labels.

    Example:  lilliput tune smollm2-135m-instruct --data my.jsonl -o runs/mine

    Example:  lilliput tune MODEL --data my.jsonl --recipe guanaco --set lora.r=32 --set train.epochs=2 -o runs/big

    Example:  lilliput tune all-minilm-l6-v2 --task classify --data train.tsv --eval-data dev.tsv -o runs/sst2
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    plan = read_recipe(
        recipe, settings, number_format,
        task=task, text_column=text_column, label_column=label_column, skip_bad_rows=skip_bad_rows,
    )  # fmt: skip
    from lilliput.training import tune as run

    try:
        result = run(model, data, out, plan, check=check, resume=resume, overwrite=overwrite, eval_data=eval_data)
    except KeyboardInterrupt as error:
        raise Stopped("stopped (Ctrl-C)", todo=_how_to_go_on(out)) from error
    return Answer(result.to_json(), _table(result, model))


def _how_to_go_on(out: Path) -> str:
    """After a stop that no checkpoint was written for."""
    if any(out.glob("checkpoints/step-*")):
        return "The last checkpoint stands: run the same command with --resume to go on"
    return "Nothing was trained yet: run the same command again to begin"


def _table(result: RunResult, model: str) -> Table:
    rows = {
        "adapter": str(result.adapter),
        "report": str(result.report),
        "rows": f"{result.examples:,} learned, {result.eval_examples:,} held out",
        **_accuracy(result),
        "loss": f"{result.train_loss:.3f} at the end of training",
    }
    if result.eval_loss is not None:
        before = "" if result.eval_loss_before is None else f", {result.eval_loss_before:.3f} before"
        rows["held-out loss"] = f"{result.eval_loss:.3f} after step {result.best_step:,} of {result.steps:,}{before}"
    rows |= {
        "speed": f"{result.train_tokens_per_second:,.0f} tokens/s, {result.total_seconds:,.0f} s in all",
        "base": f"{size(result.footprint_bytes)} in memory, {result.trainable:,} weights trained",
        "now try": result.command(model),
    }
    return facts("Tuned", rows)


def _accuracy(result: RunResult) -> dict[str, str]:
    """What a classifier's table says beside the loss."""
    from lilliput.training import ClassifyResult

    if not isinstance(result, ClassifyResult) or result.confusion is None:
        return {}
    found = result.confusion
    return {
        "accuracy": f"{found.accuracy:.2%} of the rows held out; always saying the most frequent class: "
        f"{found.majority:.2%}",
        "macro F1": f"{found.macro_f1:.4f}",
    }


def read_recipe(
    name: str | None,
    settings: list[str] | None,
    number_format: str | None,
    *,
    task: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    skip_bad_rows: bool = False,
) -> Recipe:
    """The recipe with what the options change in it; an option wins over --set. A task has a recipe of its own."""
    from lilliput.training import load_recipe
    from lilliput.training.recipe import RECIPE_OF_TASK

    changes = list(settings or [])
    if task is not None:
        changes.append(f"data.task={choose(task, [*RECIPE_OF_TASK], '--task')}")
    name = name or RECIPE_OF_TASK[task or "chat"]
    for column, value in (("text", text_column), ("label", label_column)):
        if value is not None:
            changes.append(f"data.{column}_column={json.dumps(value)}")
    if number_format is not None:
        changes.append(f"model.format={number_format}")
    if skip_bad_rows:
        changes.append("data.skip_bad_rows=true")
    return load_recipe(name, changes)
