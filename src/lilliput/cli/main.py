"""The command line `lilliput`. Each command has its own file and imports torch only when it runs: --help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

import lilliput
from lilliput.cli import chat, check, demo, doctor, export, inspect, pull, quantize, tune
from lilliput.cli import data as data_sets
from lilliput.cli import eval as evaluation
from lilliput.cli.door import Door, command

app = typer.Typer(
    name="lilliput",
    cls=Door,
    help="Fine-tune, shrink and run large language models on the computer you already own.\n\n"
    "MODEL is a Hugging Face directory, a .gguf file, a hub id (org/name), or a short name such as "
    "smollm2-135m-instruct.\n\n"
    "Example:  lilliput tune smollm2-135m-instruct --data my.jsonl -o runs/mine",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate = typer.Typer(name="eval", help="Measure a model, with or without an adapter.")
app.add_typer(evaluate)
app.add_typer(data_sets.app)

COMMANDS = (
    demo.demo,
    pull.pull,
    tune.tune,
    check.check,
    chat.chat,
    quantize.quantize,
    export.export,
    inspect.inspect,
    doctor.doctor,
)
for function in COMMANDS:
    app.command()(command(function))
evaluate.command()(command(evaluation.perplexity))
evaluate.command()(command(evaluation.classify))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lilliput {lilliput.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command; the program's help stands above."""


def main() -> None:
    """The entry point of the `lilliput` script."""
    app()
