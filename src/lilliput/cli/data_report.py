"""`lilliput data report`: the quality report of a generated data set, or of any file of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer
from lilliput.errors import DataError, UsageError


def report(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A run's folder (data.jsonl, journal.jsonl), or a file of rows.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Where to write; by default the run's folder, or NAME-report beside a file.",
        ),
    ] = None,
    seeds: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The seed tasks, or Alpaca rows, that it was grown from: how near is it to them?"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws the samples.")] = 0,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used.")] = False,
) -> Answer:
    """Say what a data set is like: accepted and refused by reason, lengths, verbs and nouns, nearness, samples.

    Writes report.md, report.json and report.png. Works on a run that is still going on, or was stopped.

    Example:  lilliput data report out/

    Example:  lilliput data report alpaca.json -o looked-at
    """
    from lilliput.synthesis.report import write_report

    if not data.exists():
        raise DataError("no such file or folder", where=str(data), todo="Check the path.")
    place = out or (data if data.is_dir() else data.with_name(f"{data.stem}-report"))
    if place.is_file():
        raise UsageError("is a file", where=str(place), todo="Give -o a directory.")
    grown_from = _instructions(seeds) if seeds else []
    found = write_report(place, data, seeds=grown_from, seed=seed, skip_bad_rows=skip_bad_rows)
    results = {key: value for key, value in found.items() if key != "samples"}
    results["variety"] = {key: value for key, value in found["variety"].items() if key != "pairs"}
    results["report"], results["plot"] = str(place / "report.md"), str(place / "report.png")
    return Answer(results, _people(found, place))


def _instructions(path: Path) -> list[str]:
    """Instructions of a file of seed tasks, or of any rows."""
    from lilliput.synthesis.seeds import read_seeds

    return [task.instruction for task in read_seeds(path)]


def _people(found: dict[str, Any], place: Path) -> Group:
    from lilliput.synthesis.diversity import rings
    from lilliput.synthesis.report_page import summary

    variety, lengths = found["variety"], found["lengths"]
    top = ", ".join(f"{verb} {count:,}" for verb, count, _ in rings(variety["pairs"], verbs=8))
    rows = {
        f"words of {what}": f"median {each['median']:,}, 95 % have at most {each['p95']:,}, longest {each['longest']:,}"
        for what, each in lengths.items()
        if each["texts"]
    }
    for what, each in found["nearest"].items():
        rows[f"nearest to {what}"] = (
            f"median ROUGE-L {each['median']:.2f}; {each['above_0.7']:,} of {each['instructions']:,} above 0.7"
        )
    rows["verbs"] = f"{top or 'none'}; found with a noun in {variety['with_noun']:,} of {variety['instructions']:,}"
    written = f"Written: {place / 'report.md'}, {place / 'report.json'} and {place / 'report.png'}"
    return Group(Text(summary(found)), facts(found["title"], rows), Text(written))
