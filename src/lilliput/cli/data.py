"""`lilliput data …`: the commands that make, turn and look at data sets; each has its own file."""

from __future__ import annotations

import typer

from lilliput.cli.data_convert import convert
from lilliput.cli.data_dedupe import dedupe
from lilliput.cli.data_evolve import evolve
from lilliput.cli.data_flan import flan
from lilliput.cli.data_inspect import inspect
from lilliput.cli.data_report import report
from lilliput.cli.data_self_instruct import self_instruct
from lilliput.cli.door import command

app = typer.Typer(name="data", help="Make, turn and look at data sets.")
for function in (convert, inspect, flan, self_instruct, evolve, dedupe, report):
    app.command(name=function.__name__.replace("_", "-"))(command(function))
