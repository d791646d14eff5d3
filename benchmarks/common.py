"""What the benchmarks share: rounds in turn, medians and their spread, processes of their own, the table, JSON.

A benchmark is a script beside this one with `run(arguments) -> Report`. A *side* is a call that measures one stack once
and returns figures by name; sides of the same work are measured one after the other in each round, so that a noisy
hour falls on all of them. A ratio is taken within a round, and its median over the rounds is what counts.
Not here: what is measured; the peers' models (peers.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lilliput import kernels
from lilliput.kernels import core

Side = Callable[[], dict[str, float]]
PACKAGES = ("lilliput", "torch", "transformers", "peft", "bitsandbytes")
OURS = "Lilliput"
_SLOW = 2.0  # seconds of a side that are worth a line on standard error


@dataclass(frozen=True)
class Row:
    """What one stack took for one piece of work: its figures, a number a round each; or why there are none."""

    what: str
    who: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
        rows: all measured.
        better: each figure in the table's order, and whether "less" or "more" of it is better; "" where no ratio is
            to be taken.
        ours: the stacks that all are compared with; a ratio above 1 says that ours is better.
        notes: lines below the table.
        failures: what makes the exit status 1.
    """

    rows: list[Row]
    better: dict[str, str]
    ours: tuple[str, ...] = (OURS,)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class SideFailed(Exception):
    """A side's process ended badly."""


# ---- measuring ---------------------------------------------------------------------------------------------------


def compare(what: str, sides: Mapping[str, Side | str], rounds: int) -> list[Row]:
    """Measure the sides in turn, `rounds` times. A text instead of a side says why there is none."""
    taken: dict[str, list[dict[str, float]]] = {who: [] for who in sides}
    missing = {who: side for who, side in sides.items() if isinstance(side, str)}
    for number in range(rounds):
        for who, side in sides.items():
            if who in missing or isinstance(side, str):
                continue
            began = time.perf_counter()
            try:
                taken[who].append(side())
            except SideFailed as error:
                missing[who] = f"failed: {error}"
            if (spent := time.perf_counter() - began) > _SLOW:
                print(f"{what}, {who}, round {number + 1} of {rounds}: {spent:.1f} s", file=sys.stderr)
    return [Row(what, who, {} if who in missing else gathered(taken[who]), missing.get(who, "")) for who in sides]


def gathered(rounds: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Figures by name, a number a round, from the rounds' figures."""
    return {name: [figures[name] for figures in rounds] for name in rounds[0]} if rounds else {}


def seconds_of(call: Callable[[], object], seconds: float) -> float:
    """The median time of a call, made over and over for `seconds`, after one that does not count."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def timed(call: Callable[[], object], seconds: float, **work: float) -> Side:
    """A side of one figure, "ms", and of rates: `work` done by a call, in units of 10⁹, over its seconds."""

    def side() -> dict[str, float]:
        took = seconds_of(call, seconds)
        return {"ms": took * 1e3, **{name: amount / took / 1e9 for name, amount in work.items()}}

    return side


def by_reference(call: Callable[[], object]) -> Callable[[], object]:
    """The same call answered by Lilliput's plain torch reference."""

    def inside() -> object:
        with kernels.use("reference"):
            return call()

    return inside


def in_process(script: str, environment: Mapping[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """What `child(**arguments)` of a benchmark's script returns in a fresh process, which runs with as many threads as
    this one unless `environment` says otherwise ("" takes a variable away)."""
    changed = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(environment or {})}
    changed = {name: value for name, value in changed.items() if value}
    command = [sys.executable, script, "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=changed)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise SideFailed(said[-1].strip())
    return json.loads(done.stdout.strip().splitlines()[-1])


def not_installed(*packages: str) -> str:
    """Why a stack that needs these packages cannot be measured here; "" if it can."""
    lacking = [name for name in packages if util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def machine() -> dict[str, Any]:
    """Where and with what the figures are taken."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "instruction set": core.status().instruction_set or "no compiled core",
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES if not not_installed(name)},
    }


# ---- showing -----------------------------------------------------------------------------------------------------


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def ratios(report: Report, row: Row, ours: str) -> dict[str, dict[str, float]]:
    """How many times better ours is than `row` at the same work, for each figure that says what is better."""
    mine = next((other for other in report.rows if (other.what, other.who) == (row.what, ours)), None)
    found: dict[str, dict[str, float]] = {}
    for name, better in report.better.items():
        if mine is None or mine.who == row.who or not better:
            continue
        pairs = list(zip(mine.samples.get(name, ()), row.samples.get(name, ()), strict=False))  # rounds both ended
        if pairs:
            found[name] = spread([b / a if better == "less" else a / b for a, b in pairs])
    return found


def as_json(name: str, report: Report, about: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that was found, as plain values."""
    rows = []
    for row in report.rows:
        figures = {key: {**spread(values), "rounds": values} for key, values in row.samples.items()}
        against = {ours: found for ours in report.ours if (found := ratios(report, row, ours))}
        rows.append({"what": row.what, "who": row.who, "missing": row.missing, "figures": figures, "ratios": against})
    told = {"notes": report.notes, "failures": report.failures}
    return {"benchmark": name, "machine": dict(about), "settings": dict(settings), "rows": rows, **told}


def table_of(report: Report, title: str) -> Table:
    """A line a row: the medians, and for each of our stacks the ratios with their spread."""
    compared = [name for name, better in report.better.items() if better]
    table = Table("what", "who", *report.better, title=title)
    for ours in report.ours if compared else ():
        table.add_column(f"{ours} better by" + (f" ({', '.join(compared)})" if len(compared) > 1 else ""))
    for row in report.rows:
        figures = [_number(statistics.median(s)) if (s := row.samples.get(name)) else "" for name in report.better]
        figures[0] = row.missing or figures[0]
        cells = ["; ".join(map(_ratio, ratios(report, row, ours).values())) for ours in report.ours]
        table.add_row(row.what, row.who, *figures, *(cells if compared else ()))
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ratio(found: Mapping[str, float]) -> str:
    around = f" ({found['min']:.2f}–{found['max']:.2f})" if found["min"] != found["max"] else ""
    return f"x {found['median']:.2f}{around}"


# ---- a script ----------------------------------------------------------------------------------------------------


def main(
    run: Callable[[argparse.Namespace], Report],
    script: str,
    about: str,
    *,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
    quick: Mapping[str, Any] | None = None,
    child: Callable[..., dict[str, Any]] | None = None,
    rounds: int = 3,
) -> int:
    """The command line of a benchmark's script; returns its exit status.

    Args:
        run: measures.
        script: its file.
        about: its docstring.
        options: adds its own options.
        quick: values of options for a trial run, `--quick`.
        child: what `in_process` calls in a fresh process.
        rounds: unless `--rounds` says otherwise.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each stack, in turn ({rounds})")
    parser.add_argument("--threads", type=int, help="torch's, and so ours (default: as torch would)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--quick", action="store_true", help="a trial at a small size")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if options:
        options(parser)
    if "--quick" in sys.argv:
        parser.set_defaults(**{"rounds": 1, **(quick or {})})
    arguments = parser.parse_args()
    if arguments.child:
        assert child is not None
        print(json.dumps(child(**json.loads(arguments.child))))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    described = machine()
    report = run(arguments)
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("child", "json")}
    show(Path(script).stem, report, described, settings, arguments.json)
    failed = [f"{row.what}, {row.who}: {row.missing}" for row in report.rows if row.missing.startswith("failed")]
    for line in [*report.failures, *failed]:
        print(line, file=sys.stderr)
    return 1 if report.failures or failed else 0


def show(
    name: str, report: Report, about: Mapping[str, Any], settings: Mapping[str, Any], file: Path | None = None
) -> None:
    """Print the table and the notes on standard output, and write JSON where it is asked for."""
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(table_of(report, name))
    for line in report.notes:
        console.print(line, highlight=False)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(as_json(name, report, about, settings), indent=2) + "\n", encoding="utf-8")
