"""`lilliput data evolve`: a language model rewrites instructions into harder and rarer ones, and answers them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer, choose
from lilliput.cli.teachers import TeacherOptions, check_place, resumable, takes_teacher
from lilliput.errors import UsageError
from lilliput.progress import warn

if TYPE_CHECKING:
    from lilliput.synthesis.evol_instruct import Originals, Outcome, Plan

_ALL = "all"


@takes_teacher
def evolve(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="A file of rows, or the folder of a run of `lilliput data self-instruct`."),
    ],
    teacher: TeacherOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="The run's folder; by default DATA/evolved, or NAME-evolved beside a file.",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="How often each instruction is evolved; may be raised later.")
    ] = 4,
    operations: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Which to draw from, with commas: constraints, deepen, concretise, reasoning, input, breadth.",
        ),
    ] = _ALL,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all draws.")] = 0,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Evolve the first N rows only; may be raised later.")
    ] = None,
    only_last: Annotated[
        bool, typer.Option("--only-last", help="Keep of each instruction its last form only, not those on the way.")
    ] = False,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="Shuffle the result, or keep the rows by original and round.")
    ] = True,
    to: Annotated[str, typer.Option(metavar="FORM", help="Rows as alpaca or messages.")] = "alpaca",
    temperature: Annotated[float, typer.Option(metavar="X", help="Of evolved instructions and responses.")] = 1.0,
    top_p: Annotated[float, typer.Option(metavar="X", help="Nucleus of the same.")] = 0.9,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest instruction or response.")] = 2048,
    batch: Annotated[int, typer.Option(metavar="N", help="Instructions that go through the steps together.")] = 64,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used.")] = False,
) -> Answer:
    """Evolve instructions into harder and rarer ones, with new answers (Evol-Instruct).

    Each round rewrites each instruction in one of six ways, and drops what gains nothing or went wrong. Stopped at
    any moment, it goes on when the same command is given again. Writes data.jsonl, journal.jsonl and a report.

    Example:  lilliput data evolve out/ --model smollm2-135m-instruct --rounds 2 --limit 20

    Example:  lilliput data evolve alpaca.json --model http://localhost:8000/v1 -o evolved
    """
    from lilliput.synthesis.evol_instruct import evol_instruct, read_originals
    from lilliput.synthesis.growing import FORMS
    from lilliput.synthesis.report import write_report

    plan = _plan(rounds, operations, seed, batch, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    choose(to, FORMS, "--to")
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} is not a number of rows from 1 up", where="--limit")
    originals = read_originals(data, skip_bad_rows=skip_bad_rows, limit=limit)
    _warn_of(originals)
    place = out or (data / "evolved" if data.is_dir() else data.with_name(f"{data.stem}-evolved"))
    check_place(place)
    with resumable(place):
        done = evol_instruct(
            place, teacher.open(), originals, plan, only_last=only_last, shuffle=shuffle, to=to, price=teacher.price
        )
        report = write_report(place, title=f"{data.name}, evolved", seed=seed)
    fault = f"{place}: no instruction was evolved, the data is the originals" if not done.evolved else ""
    return Answer(_results(place, originals, done, report), _people(place, originals, done, report), fault)


def _plan(rounds: int, operations: str, seed: int, batch: int, **decoding: Any) -> Plan:
    """The plan that the options describe, with faults under the options' names."""
    from dataclasses import replace

    from lilliput.synthesis.evol_instruct import DECODING, Plan
    from lilliput.synthesis.evol_prompts import OPERATIONS

    for name, value in (("--rounds", rounds), ("--batch", batch), ("--max-tokens", decoding["max_tokens"])):
        if value < 1:
            raise UsageError(f"{value} is not a number from 1 up", where=name)
    if not 0 <= decoding["temperature"] <= 2:
        raise UsageError(f"{decoding['temperature']:g} is not a temperature from 0 to 2", where="--temperature")
    if not 0 < decoding["top_p"] <= 1:
        raise UsageError(f"{decoding['top_p']:g} is not a share above 0 and up to 1", where="--top-p")
    names = [name.strip() for name in operations.split(",") if name.strip()]
    if names != [_ALL]:
        for name in names or [operations]:
            choose(name, tuple(OPERATIONS), "--operations")
    chosen = tuple(name for name in OPERATIONS if names == [_ALL] or name in names)
    return Plan(rounds, chosen, seed, replace(DECODING, **decoding), batch)


def _warn_of(originals: Originals) -> None:
    """What of the rows is not taken."""
    if originals.cut:
        what = "have more than a question and an answer (a system turn, tools); their first two are taken"
        warn(f"{originals.cut:,} of {originals.read:,} chats {what}")
    if originals.skipped:
        first = originals.skipped[0]
        warn(f"{len(originals.skipped):,} bad rows are left out, the first is {first.origin}: {first.reason}")


def _results(place: Path, originals: Originals, done: Outcome, report: dict[str, Any]) -> dict[str, Any]:
    from lilliput.synthesis.pairs import RESULT

    history = report["journal"]
    counted = ("requests", "prompt_tokens", "completion_tokens", "cost", "seconds", "operations", "rounds")
    return {
        "data": str(place / RESULT),
        "report": str(place / "report.md"),
        "rows": done.rows,
        "originals": len(originals.rows),
        "evolved": done.evolved,
        "refused": dict(done.refused.most_common()),
        **{name: history[name] for name in counted},
    }


def _people(place: Path, originals: Originals, done: Outcome, report: dict[str, Any]) -> Group:
    from lilliput.synthesis.report_page import duration

    history = report["journal"]
    tokens = history["prompt_tokens"] + history["completion_tokens"]
    rows = {
        "originals": f"{len(originals.rows):,}",
        "evolved": f"{done.evolved:,} in the data",
        **{f"round {row['round']}": f"{row['accepted']:,} of {row['tried']:,}" for row in history["rounds"]},
        "refused": ", ".join(f"{reason}: {count:,}" for reason, count in done.refused.most_common()) or "none",
        "asked": f"{history['requests']:,} requests, {tokens:,} tokens, {duration(history['seconds'])}",
    }
    if history["cost"]:
        rows["cost"] = f"{history['cost']:,.4g}"
    written = f"Written: {done.rows:,} rows in {place / 'data.jsonl'}; what happened: {place / 'report.md'}"
    return Group(facts("Evol-Instruct", rows), Text(written))
