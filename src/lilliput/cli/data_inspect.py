"""`lilliput data inspect`: what a data set looks like: lengths, duplicates, languages, roles, labels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer, plain
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lilliput.data.forms import Form
    from lilliput.data.portrait import Lengths, Portrait

_BAR = 40  # characters of the longest bar
_CHARACTERS = 2000  # of an example that is shown
_FEW = 8  # languages, fields and turns in a line


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows: JSON, JSONL, CSV, TSV or Parquet, in any form.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokens are counted, and whose labels are coloured.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write report.json and portrait.png there.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="FORM", help="Form of the rows; by default as their keys tell.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="PART=COLUMN,…", help="Columns of your own, as for `data convert`.")
    ] = None,
    field: Annotated[str | None, typer.Option(metavar="NAME", help="Rows are no chats: look at this field.")] = None,
    examples: Annotated[int, typer.Option(metavar="N", help="Examples shown, labels in green; with --model.")] = 2,
    sample: Annotated[
        int, typer.Option(metavar="N", help="Chats whose tokens and language are looked at; 0 for all.")
    ] = 10_000,
    near: Annotated[bool, typer.Option("--near", help="Also count near-duplicates (ROUGE-L above 0.7).")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Rows that cannot be used are counted, and no fault.")
    ] = False,
) -> Answer:
    """Look at a data set before it is trained on: what its rows are, how long, how often the same, in which language.

    Example:  lilliput data inspect alpaca.jsonl

    Example:  lilliput data inspect chats.jsonl --model smollm2-135m-instruct -o portrait
    """
    _check(out, examples, sample)
    from lilliput.data.portrait import portrait

    started = time.perf_counter()
    tokenizer = None
    form = _form(source, columns, field)
    if model is not None:
        from lilliput.models import load_tokenizer

        tokenizer = load_tokenizer(model)
    found = portrait(file, tokenizer, form=form, sample=sample, examples=examples)
    results: dict[str, Any] = {"model": model, **found.to_json()}
    if near:
        results["near"] = _near(file, form)
    results["seconds"] = round(time.perf_counter() - started, 3)
    if out is not None:
        results["report"], results["plot"] = _write(found, results, out)
    return Answer(results, _people(found, results, tokenizer), fault="" if skip_bad_rows else _fault(found))


def _check(out: Path | None, examples: int, sample: int) -> None:
    for option, number in (("--examples", examples), ("--sample", sample)):
        if number < 0:
            raise UsageError(f"{number} is not a number from 0 up", where=option)
    if out is not None and out.is_file():
        raise UsageError("is a file", where=str(out), todo="Give -o a directory.")


def _form(source: str | None, columns: str | None, field: str | None) -> Form | None:
    """What the options say that a row is; None where none says it."""
    from lilliput.cli.data_convert import parse_columns
    from lilliput.data.forms import form_named, form_of_columns
    from lilliput.data.portrait import form_of_field

    if sum(said is not None for said in (source, columns, field)) > 1:
        raise UsageError("--from, --columns and --field each say what a row is", todo="Give one of them.")
    if columns is not None:
        return form_of_columns(parse_columns(columns))
    if field is not None:
        return form_of_field(field)
    return None if source is None else form_named(source)


def _near(file: Path, form: Form | None) -> dict[str, Any]:
    from lilliput.synthesis.dedupe import near_rows

    near = near_rows(file, form=form)
    return {
        "rows": int((~near.stays & ~near.same).sum()),
        "same": int(near.same.sum()),
        "method": near.method,
        "missed": near.missed,
    }


def _fault(found: Portrait) -> str:
    """What makes the exit status 1: `lilliput tune` would refuse the file."""
    if not found.bad:
        return ""
    first = found.faults[0]
    count = f"{found.bad:,} of {found.rows + found.bad:,} rows cannot be used"
    return f"{first.origin}: {first.reason}; {count}. Fix the file, or leave such rows out with --skip-bad-rows."


def _write(found: Portrait, results: dict[str, Any], out: Path) -> tuple[str, str]:
    """Write the numbers and the picture; returns the two paths."""
    from lilliput.data.portrait_plot import draw_portrait
    from lilliput.files import write_json

    numbers, picture = out / "report.json", out / "portrait.png"
    write_json(numbers, plain(results))
    draw_portrait(found, picture)
    return str(numbers), str(picture)


# ---- for people ----


def _people(found: Portrait, results: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Group:
    parts: list[RenderableType] = []
    if tokenizer is not None and found.examples:
        from lilliput.data.portrait import show_example

        for example in found.examples:
            shown = show_example(example, tokenizer)
            if len(shown) > _CHARACTERS:
                shown = Text.assemble(shown[:_CHARACTERS], (" …", "dim"))
            parts += [
                Text(f"{example.origin}, {example.labels:,} labels of {len(example):,} tokens", "bold"),
                shown,
                Text(),
            ]
    parts += [_spreads(found), _histogram(found), facts(found.file, _facts(found, results))]
    if "report" in results:
        parts.append(Text(f"Written: {results['report']} and {results['plot']}"))
    return Group(*parts)


def _spreads(found: Portrait) -> Table:
    """A line a length: of chats, and of each role's turns."""
    from lilliput.data.portrait import QUANTILES

    table = Table(title=Text("Lengths"), title_justify="left")
    table.add_column("of", no_wrap=True)
    for name in ("count", "least", *(f"{share:.0%}" for share in QUANTILES), "most", "mean", "total"):
        table.add_column(name, justify="right")

    def add(name: str, lengths: Lengths) -> None:
        numbers = (lengths.count, lengths.least, *lengths.quantiles, lengths.most)
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{lengths.mean:,.1f}", f"{lengths.total:,}")

    if found.tokens is not None:
        add("chats, in tokens", found.tokens.lengths)
    add("chats, in words", found.words)
    for role, lengths in found.by_role.items():
        add(f"{role}'s turns, in words" if role != "text" else "texts, in words", lengths)
    add("chats, in characters", found.characters)
    return table


def _histogram(found: Portrait) -> Table:
    """Bars of tokens a chat, or of words where there is no tokenizer."""
    unit, lengths = ("words", found.words) if found.tokens is None else ("tokens", found.tokens.lengths)
    table = Table(title=Text(f"Chats by {unit}"), title_justify="left", show_header=False, box=None)
    most = max((one.count for one in lengths.bins), default=1)
    for one in lengths.bins:
        name = f"{one.low:,} and more" if one.high is None else f"{one.low:,} to {one.high - 1:,}"
        table.add_row(Text(name, justify="right"), _bar(one.count / most), Text(f"{one.count:,}"))
    return table


def _bar(share: float) -> Text:
    """Blocks of eighths: a thin line for the least that there is, nothing for nothing."""
    eighths = max(round(share * _BAR * 8), 1) if share else 0
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style="green")


def _facts(found: Portrait, results: dict[str, Any]) -> dict[str, str]:
    bad = f", and {found.bad:,} that cannot be used" if found.bad else ""
    rows = {
        "rows": f"{found.rows:,} of the form {found.form}{bad}",
        "chats": f"{found.chats:,}; by number of turns {_counts(found.turns)}",
        "turns": _counts(found.roles),
        "the same": f"{found.same:,} chats repeat an earlier one; {found.same_question:,} its first question",
        "languages": _counts(found.languages) + _of_sample(found),
        "longest": "\n".join(f"{length:,} characters, {place}" for length, place in found.longest),
    }
    if "near" in results:
        near = results["near"]
        seen = "all pairs compared" if near["method"] == "all pairs" else "candidates of MinHash compared"
        rows["near"] = f"{near['rows']:,} rows more come near an earlier question (ROUGE-L above 0.7; {seen})"
    if found.empty:
        rows["empty fields"] = _counts(found.empty)
    for name, counts in (("left out", found.dropped), ("mended", found.changed)):
        if counts:
            rows[name] = _counts(counts)
    rows["labels"] = "without --model nothing is known about tokens and labels"
    if found.tokens is not None:
        labels, total = found.tokens.labels, found.tokens.lengths.total
        rows["labels"] = f"{labels:,} of {total:,} tokens ({labels / max(total, 1):.1%}){_of_sample(found)}"
        if found.tokens.refused:
            rows["refused"] = "chats that the model's template cannot write: " + _counts(found.tokens.refused)
    for number, fault in enumerate(found.faults, start=1):
        rows[f"bad row {number}"] = f"{fault.origin}: {fault.reason}"
    return rows


def _of_sample(found: Portrait) -> str:
    return f", in a sample of {found.sampled:,} chats" if found.sampled < found.chats else ""


def _counts(counts: Mapping[Any, int]) -> str:
    """`"en: 964, unsure: 35"`; the first few, and how many more there are."""
    told = [f"{name}: {count:,}" for name, count in list(counts.items())[:_FEW]]
    more = len(counts) - _FEW
    return ", ".join(told) + (f" and {more:,} more" if more > 0 else "")
