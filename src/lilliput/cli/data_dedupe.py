"""`lilliput data dedupe`: near-duplicates out of a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer, choose
from lilliput.errors import UsageError
from lilliput.progress import warn

if TYPE_CHECKING:
    from lilliput.synthesis.dedupe import Deduped, Duplicate

_EXAMPLES = 6  # pairs in the table
_WIDTH = 60  # characters of a text in it


def dedupe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows: JSON, JSONL, CSV, TSV or Parquet.")],
    rouge: Annotated[
        float, typer.Option(metavar="X", help="A row goes when its ROUGE-L with an earlier one is above it, 0 to 1.")
    ] = 0.7,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Where the rows that stay go; by default NAME.deduped beside FILE."
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare this field; by default the user's first turn.")
    ] = None,
    whole_chat: Annotated[bool, typer.Option("--whole-chat", help="Compare all turns of a chat.")] = False,
    words: Annotated[
        str, typer.Option(metavar="NAME", help="unicode: words of any script; rouge: a-z and 0-9, as rouge-score.")
    ] = "unicode",
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--minhash", help="Compare all pairs, or candidates of MinHash; by default by size."),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Where signatures are made: process, or ray.")
    ] = "process",
    workers: Annotated[int | None, typer.Option(metavar="N", help="Workers of --engine ray.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every row that went, and the one it repeats, as JSON.")
    ] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used.")] = False,
) -> Answer:
    """Copy a file without the rows whose text repeats or comes near that of an earlier row (ROUGE-L).

    Example:  lilliput data dedupe alpaca.jsonl --rouge 0.7

    Example:  lilliput data dedupe out/data.jsonl -o clean.jsonl --field instruction --report gone.json
    """
    from lilliput.data.engine import engine_of
    from lilliput.synthesis import dedupe as file_dedupe
    from lilliput.synthesis.rouge import WORDS

    if field is not None and whole_chat:
        raise UsageError("--field and --whole-chat each say what is compared", todo="Give one of them.")
    target = out or file_dedupe.default_out(file)
    if report is not None and report.resolve() in (file.resolve(), target.resolve()):
        raise UsageError("is the file that is read or written", where=f"--report {report}", todo="Name another one.")
    started = time.perf_counter()
    with engine_of(engine, workers) as place:
        found = file_dedupe.dedupe(
            file,
            target,
            threshold=rouge,
            field=field,
            text="chat" if whole_chat else "first",
            words=choose(words, WORDS, "--words"),
            exact=exact,
            engine=place,
            skip_bad_rows=skip_bad_rows,
        )
    results = {**found.to_json(), "seconds": round(time.perf_counter() - started, 3)}
    if report is not None:
        found.write_report(report)
        results["report"] = str(report)
    if found.wordless:
        more = "" if words == "unicode" else "; --words unicode sees words of any script"
        warn(f"in {found.wordless:,} rows ROUGE-L sees no words: they were only compared letter for letter{more}")
    return Answer(results, _people(found, report))


# ---- for people ----


def _people(found: Deduped, report: Path | None) -> Group:
    rows = {
        "rows": f"{found.rows:,}" + (f", and {found.skipped:,} bad ones left out" if found.skipped else ""),
        "the same": f"{found.same:,} repeat an earlier text",
        "near": f"{found.near:,} with a ROUGE-L above {found.threshold:g} with an earlier text",
        "kept": f"{found.kept:,} in {found.out}",
        "compared": "all pairs",
    }
    if found.bands:
        cut = f"{found.bands.bands} bands of {found.bands.rows}"
        rows["compared"] = (
            f"candidates of MinHash, {cut}; at most {found.missed:.2%} of near pairs are missed (--exact: none)"
        )
    written = [Text(f"Written: {report}")] if report else []
    near = sorted((one for one in found.duplicates if not one.same), key=lambda one: one.score)[:_EXAMPLES]
    tables = [_examples(near)] if near else []
    return Group(*tables, facts(found.file, rows), *written)


def _examples(duplicates: list[Duplicate]) -> Table:
    """The pairs that were decided most narrowly."""
    table = Table(title=Text("Nearest to the threshold"), title_justify="left")
    table.add_column("ROUGE-L", justify="right")
    table.add_column("went")
    table.add_column("stayed")
    for one in duplicates:
        gone, stays = (
            Text(f"{place}: {_short(text)}") for place, text in ((one.origin, one.text), (one.of, one.of_text))
        )
        table.add_row(f"{one.score:.3f}", gone, stays)
    return table


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"
