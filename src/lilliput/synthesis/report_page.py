"""The quality report as a page in Markdown. What a teacher wrote is shown as text, whatever it holds.

Not here: the numbers (`report.py`), the picture (`report_plot.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.synthesis.diversity import rings

_LONGEST = 1500  # characters of a sample


def page(report: Mapping[str, Any]) -> str:
    """The page, with `report.png` beside it."""
    parts = (
        [f"# {_line(report['title'])}", summary(report), "![](report.png)"],
        _history(report["journal"]) if report["journal"] else [],
        _lengths(report["lengths"]) if report["rows"] else [],
        _nearest(report["nearest"]),
        _variety(report["variety"]) if report["rows"] else [],
        _rows(report["samples"]["rows"]),
        _refusals(report["samples"]["refused"]),
    )
    return "\n\n".join(paragraph for part in parts for paragraph in part) + "\n"


def summary(report: Mapping[str, Any]) -> str:
    """A line or two about the whole."""
    counts = [count(report["rows"], "row")]
    if report["originals"]:
        counts.append(f"{report['originals']:,} of them originals")
    if report["repeated_instructions"]:
        counts.append(f"{report['repeated_instructions']:,} with instruction and input of an earlier one")
    if report["skipped"]:
        counts.append(f"{count(report['skipped'], 'bad row')} left out")
    said = ", ".join(counts) + "."
    if history := report["journal"]:
        said += (
            f" {history['accepted']:,} were accepted by the run, {history['refused']:,} times something was refused."
        )
    return said


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of words to the left, of numbers to the right, as the first row has them."""
    sides = ["---:" if isinstance(value, int | float) else "---" for value in rows[0]]
    head = [f"| {' | '.join(names)} |", f"|{'|'.join(sides)}|"]
    return "\n".join(head + [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows])


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _line(str(value))


def _line(text: str) -> str:
    """Text in a line or a table's cell: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>|#!&])", r"\\\1", " ".join(text.split()))


def _block(text: str) -> str:
    """Text as it stands, in a fence longer than any inside it."""
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


# ---- parts -----------------------------------------------------------------------------------------------------------


def _history(history: Mapping[str, Any]) -> list[str]:
    tokens = f"{history['prompt_tokens']:,} tokens of prompts and {history['completion_tokens']:,} of answers"
    asked = (
        f"{history['requests']:,} requests to {_line(str(history['settings'].get('teacher', 'the teacher')))}: {tokens}"
    )
    extras = [
        f"{history[name]:,} {said}" for name, said in (("failed", "failed"), ("retries", "retries")) if history[name]
    ]
    cost = [f"cost {history['cost']:,.4g}"] if history["cost"] else []
    starts = f" in {history['starts']:,} starts" if history["starts"] > 1 else ""
    spent = [asked, *extras, *cost, f"{duration(history['seconds'])}{starts}"]
    steps = [
        (step["step"], reason, count)
        for step in history["steps"]
        for reason, count in (("passed", step["passed"]), *step["refused"].items())
        if count
    ]
    parts = ["## What was asked and decided", ", ".join(spent) + "."]
    parts += [_table(("step", "decision", "times"), steps)] if steps else []
    for name in ("operations", "rounds"):
        if rows := history[name]:
            key = name.removesuffix("s")
            parts.append(_table((key, "tried", "accepted"), [(str(r[key]), r["tried"], r["accepted"]) for r in rows]))
    return parts


def count(number: int, thing: str) -> str:
    """1 row, 1,000 rows."""
    return f"{number:,} {thing}{'s' if number != 1 else ''}"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _lengths(lengths: Mapping[str, Any]) -> list[str]:
    names = ("texts", "shortest", "median", "mean", "p95", "longest")
    rows = [(what, *(found[name] for name in names)) for what, found in lengths.items() if found["texts"]]
    heads = ("words", "texts", "shortest", "median", "mean", "95 % have at most", "longest")
    return ["## Lengths", _table(heads, rows)]


def _nearest(nearest: Mapping[str, Any]) -> list[str]:
    if not nearest:
        return []
    rows = [
        (what, found["instructions"], f"{found['median']:.2f}", found["above_0.7"]) for what, found in nearest.items()
    ]
    about = "ROUGE-L of each distinct instruction and what is nearest to it; 1: the same words in the same order."
    return ["## Nearness", about, _table(("compared with", "instructions", "median", "above 0.7"), rows)]


def _variety(variety: Mapping[str, Any]) -> list[str]:
    share = variety["with_noun"] / variety["instructions"]
    about = (
        f"A verb that asks for something was found in {variety['with_verb']:,} of "
        f"{count(variety['instructions'], 'instruction')}, and with the noun it acts on in {variety['with_noun']:,} "
        f"({share:.0%}): {count(variety['verbs'], 'verb')}, {count(variety['distinct_pairs'], 'pair')}. "
        "Found by rules for English, not by a parser."
    )
    rows = [
        (verb, total, ", ".join(f"{noun} ({times:,})" for noun, times in nouns))
        for verb, total, nouns in rings(variety["pairs"])
    ]
    return ["## Verbs and nouns", about, *([_table(("verb", "times", "its commonest nouns"), rows)] if rows else [])]


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = ["## Samples of the rows"] if rows else []
    for number, row in enumerate(rows, start=1):
        birth = ", ".join(f"{name} {_line(str(row[name]))}" for name in ("operation", "round", "parent") if name in row)
        parts.append(f"**{number}.** {birth}".rstrip())
        parts += [_block(row["instruction"]), *([_block(row["input"])] if row["input"] else []), _block(row["output"])]
    return parts


def _refusals(refusals: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = ["## Samples of what was refused"] if refusals else []
    for one in refusals:
        detail = f" ({_line(one['detail'])})" if one["detail"] else ""
        parts += [f"**{_line(one['step'])}**: {_line(one['reason'])}{detail}", _block(one["text"])]
    return parts
