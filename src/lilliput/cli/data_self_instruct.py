"""`lilliput data self-instruct`: a language model writes its own instruction data, from people's seed tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer, choose
from lilliput.cli.teachers import TeacherOptions, check_place, resumable, takes_teacher

if TYPE_CHECKING:
    from lilliput.synthesis.growing import Outcome, Plan
    from lilliput.synthesis.run import Run

VARIANTS = ("paper", "alpaca")
_REASONS = 8  # the most frequent ones are shown; the report has all


@takes_teacher
def self_instruct(
    teacher: TeacherOptions,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where journal, rows and report go.")],
    target: Annotated[int, typer.Option(metavar="N", help="End with so many rows.")] = 100,
    seeds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tasks to grow from (Self-Instruct's seeds, Alpaca); by default our own."),
    ] = None,
    variant: Annotated[
        str, typer.Option(metavar="NAME", help="paper: the four steps; alpaca: many tasks in one answer.")
    ] = "paper",
    max_requests: Annotated[
        int | None, typer.Option(metavar="N", help="End before more requests than these are made in all.")
    ] = None,
    patience: Annotated[int, typer.Option(metavar="N", help="End after N rounds in a row without a row.")] = 10,
    batch: Annotated[int, typer.Option(metavar="N", help="Requests in one step of a round.")] = 8,
    instances: Annotated[int, typer.Option(metavar="N", help="Rows of one task, at most.")] = 5,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of an answer with instances; by default 1024, alpaca 3072.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Of new tasks; by default 0.7 (paper), 1 (alpaca).")
    ] = None,
    rouge: Annotated[float, typer.Option(metavar="X", help="Refuse instructions nearer (ROUGE-L) to another.")] = 0.7,
    unicode: Annotated[
        bool, typer.Option("--unicode", help="For languages beyond a-z: compare their words too.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all draws.")] = 0,
    to: Annotated[str, typer.Option(metavar="FORM", help="Rows as alpaca or as messages.")] = "alpaca",
) -> Answer:
    """Let a language model write instruction data of its own, as in Self-Instruct.

    It is shown tasks, writes new ones and examples of them; what is too near to another, or no good, is refused. DIR
    gets journal.jsonl (all that was asked, answered and decided), data.jsonl (the rows; `lilliput tune --data` takes
    it) and a report. Stopped by whatever, the same command goes on where it was.

    Example:  lilliput data self-instruct --model smollm2-135m-instruct --completions -o out --target 20

    Example:  lilliput data self-instruct --model http://localhost:8000/v1 --seeds seeds.jsonl -o out --target 1000
    """
    from lilliput.synthesis import alpaca, self_instruct
    from lilliput.synthesis.growing import FORMS, Plan, write_rows
    from lilliput.synthesis.pairs import RESULT
    from lilliput.synthesis.report import write_report
    from lilliput.synthesis.run import Run
    from lilliput.synthesis.seeds import read_seeds

    methods = {"paper": (self_instruct.METHOD, self_instruct.self_instruct), "alpaca": (alpaca.METHOD, alpaca.alpaca)}
    name, method = methods[choose(variant, VARIANTS, "--variant")]
    choose(to, FORMS, "--to")
    plan = Plan(target, max_requests, patience, seed, batch, instances, max_tokens, temperature, rouge, unicode)
    tasks = read_seeds(seeds)  # before the model: what is wrong here is told at once
    check_place(out)
    price = teacher.price
    with resumable(out), Run(out, teacher.open(), plan.settings(name, tasks), price=price) as run:

        def save() -> None:
            write_rows(out / RESULT, run.rows(), to)

        try:
            outcome = method(run, tasks, plan, save)
        finally:
            save()
        results = _results(run, outcome, plan)
    title = f"{out}: {name}, {teacher.model}"
    write_report(out, title=title, seeds=[task.instruction for task in tasks], seed=seed)
    results |= {"data": str(out / RESULT), "report": str(out / "report.md"), "seed_tasks": len(tasks)}
    results |= {"variant": variant, "model": teacher.model, "out": str(out)}
    fault = "" if results["rows"] else f"{out}: no row was accepted: {results['why']}"
    return Answer(results, _people(results, outcome), fault)


def _results(run: Run, outcome: Outcome, plan: Plan) -> dict[str, Any]:
    spent, refused = run.spent, dict[str, dict[str, int]]()
    for (step, reason), count in outcome.refused.items():
        refused.setdefault(step, {})[reason] = count
    return {
        "rows": len(run.rows()),
        "target": plan.target,
        "complete": outcome.rows >= plan.target,
        "ended": outcome.ended,
        "why": _end(outcome, plan),
        "instructions": outcome.instructions,
        "rounds": outcome.rounds,
        "requests": spent.requests,
        "failed_requests": spent.failed,
        "retries": spent.retries,
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "cost": run.price.of(spent.prompt_tokens, spent.completion_tokens),
        "seconds": round(run.state.seconds, 3),
        "refused": refused,
    }


def _end(outcome: Outcome, plan: Plan) -> str:
    """Why it ended, and what to do for more."""
    ends = {
        "target": "as many as wanted",
        "max-requests": f"another step would be more requests than --max-requests allows ({outcome.requests:,} made); "
        "with a larger number the same command goes on",
        "patience": f"{plan.patience:,} rounds in a row brought no new row ({outcome.most_refused()}); "
        "with a larger --patience the same command goes on",
    }
    return ends[outcome.ended]


def _people(results: Mapping[str, Any], outcome: Outcome) -> RenderableType:
    cost = f", cost {results['cost']:,.2f}" if results["cost"] else ""
    failed = f", {results['failed_requests']:,} failed" if results["failed_requests"] else ""
    tokens = f"{results['prompt_tokens']:,} tokens of prompts, {results['completion_tokens']:,} of answers"
    rows = {
        "rows": f"{results['rows']:,} of {results['target']:,}: {results['why']}",
        "instructions": f"{results['instructions']:,} kept, from {results['seed_tasks']:,} seed tasks",
        "requests": f"{results['requests']:,} in {results['rounds']:,} rounds{failed}",
        "tokens": f"{tokens}{cost}",
        "time": f"{results['seconds']:,.0f} s, all starts together",
        "written": f"{results['data']}, {results['report']}",
        "now try": f"lilliput tune {results['model']} --data {results['data']} -o runs/own",
    }
    if not results["rows"] or results["model"].startswith(("http://", "https://")):
        del rows["now try"]
    return Group(facts("Self-Instruct", rows), *([_refusals(outcome)] if outcome.refused else []))


def _refusals(outcome: Outcome) -> Table:
    table = Table(title=Text("Refused"), title_justify="left")
    for name in ("step", "reason"):
        table.add_column(name)
    table.add_column("times", justify="right")
    counts = sorted(outcome.refused.items(), key=lambda item: -item[1])
    for (step, reason), count in counts[:_REASONS]:
        table.add_row(step, Text(reason), f"{count:,}")
    if counts[_REASONS:]:
        table.add_row("…", f"{len(counts) - _REASONS} other reasons", f"{sum(n for _, n in counts[_REASONS:]):,}")
    return table
