"""`lilliput inspect`: where a model's outlier features are, and what int8 does to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer, Model, plain
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from lilliput.evaluation import Int8Comparison, OutlierReport

_NAMED = 12  # features whose numbers fit into a line


def inspect(
    model: Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Plain text, UTF-8, that the model is shown.")],
    compare: Annotated[
        bool, typer.Option("--compare", help="Instead: perplexity of the ways to round to int8, beside float32.")
    ] = False,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens in a segment.")] = 512,
    segments: Annotated[int, typer.Option(metavar="N", help="Take the first N segments of the text.")] = 2,
    threshold: Annotated[float, typer.Option(metavar="X", help="A larger number is an outlier.")] = 6.0,
    top: Annotated[
        int, typer.Option(metavar="N", help="Layers in the table, the worst first; the files have all.")
    ] = 12,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Write the numbers (JSON) and a picture (PNG) there."),
    ] = None,
) -> Answer:
    """Look at what goes into each linear layer: outlier features, and the error of its product in int8.

    Example:  lilliput inspect smollm2-135m-instruct --text book.txt -o inspected

    Example:  lilliput inspect smollm2-135m-instruct --text book.txt --compare --segments 8
    """
    _check(top, out)
    from lilliput.evaluation import compare_int8, find_outliers, read_text
    from lilliput.formats.rowwise import check_threshold
    from lilliput.models import load_model, load_tokenizer

    words = read_text(text)  # before the model: what is wrong here is told at once
    options: dict[str, Any] = {"context": context, "segments": segments, "threshold": check_threshold(threshold)}
    tokenizer = load_tokenizer(model)
    loaded = load_model(model)
    started = time.perf_counter()
    found: Int8Comparison | OutlierReport
    found = (compare_int8 if compare else find_outliers)(loaded, tokenizer, words, **options)
    seconds = round(time.perf_counter() - started, 3)
    results = {"model": model, "text": str(text), **options, "seconds": seconds, **found.to_json()}
    if out is not None:
        title = f"{model}: {segments} x {context} tokens of {text.name}"
        results["report"], results["plot"] = _write(found, results, out, title)
    return Answer(results, _people(found, results, top))


def _check(top: int, out: Path | None) -> None:
    if top < 1:
        raise UsageError(f"{top} is not a number of layers from 1 up", where="--top")
    if out is not None and out.is_file():
        raise UsageError("is a file", where=str(out), todo="Give -o a directory.")


def _write(found: Int8Comparison | OutlierReport, results: dict[str, Any], out: Path, title: str) -> tuple[str, str]:
    """Write the numbers and the picture; returns the two paths."""
    from lilliput.evaluation import OutlierReport
    from lilliput.evaluation.pictures import draw_comparison, draw_outliers
    from lilliput.files import write_json

    name = "report" if isinstance(found, OutlierReport) else "comparison"
    numbers, picture = out / f"{name}.json", out / f"{name}.png"
    write_json(numbers, plain(results))
    if isinstance(found, OutlierReport):
        draw_outliers(found, picture, title)
    else:
        draw_comparison(found, picture, title)
    return str(numbers), str(picture)


# ---- for people ----


def _people(found: Int8Comparison | OutlierReport, results: dict[str, Any], top: int) -> Group:
    from lilliput.evaluation import OutlierReport

    tables: list[Table | Text]
    if isinstance(found, OutlierReport):
        tables = [_layers(found, top), _curve(found), _totals(found, results)]
    else:
        seen = (
            f"{found.tokens:,} tokens of {results['text']} predicted by {results['model']}, {results['seconds']:.1f} s"
        )
        tables = [_comparison(found), Text(seen)]
    written = [Text(f"Written: {results['report']} and {results['plot']}")] if "report" in results else []
    return Group(*tables, *written)


def _layers(report: OutlierReport, top: int) -> Table:
    shown = report.worst_first()[:top]
    title = f"The {len(shown)} layers of {len(report.layers)} that int8 takes furthest from float32"
    table = _table(
        title, "layer", "error", "without", "outlier features", "of columns", "of positions", "of values", "largest"
    )
    for layer in shown:
        table.add_row(
            Text(layer.name),
            f"{layer.error:.4f}",
            f"{layer.error_without:.4f}",
            f"{len(layer.outlier_features):,}",
            f"{len(layer.outlier_features) / layer.in_features:.1%}",
            f"{layer.positions_share:.1%}",
            f"{layer.values_share:.3%}",
            f"{layer.largest:,.1f}",
        )
    return table


def _curve(report: OutlierReport) -> Table:
    table = _table("Error against threshold, mean of the layers", "threshold", "error", "columns in float32")
    for row in report.curve():
        name = f"{row['threshold']:g}" if row["threshold"] else "none"
        table.add_row(name, f"{row['error']:.4f}", f"{row['float32_columns']:.2%}")
    return table


def _totals(report: OutlierReport, results: dict[str, Any]) -> Table:
    sums = report.totals()
    by_paper = [str(feature.feature) for feature in report.features if feature.by_paper]
    named = f": {', '.join(by_paper[:_NAMED])}{', …' if len(by_paper) > _NAMED else ''}" if by_paper else ""
    rows = {
        "error": f"{sums['mean_error']:.4f} with outlier columns in float32, {sums['mean_error_without']:.4f} without "
        "(mean of the layers)",
        "outliers": f"{sums['values_share']:.4%} of the values, in {sums['layers_with_outliers']:,} of "
        f"{sums['layers']:,} layers; the largest is {sums['largest']:,.1f}",
        "hidden features": f"{sums['outlier_features']:,} of {report.width:,} beyond {report.threshold:g} somewhere",
        "by the paper": f"{sums['outlier_features_by_paper']:,} in 25 % of {report.blocks:,} blocks and at 6 % of "
        f"positions{named}",
        "seen": f"{report.positions:,} tokens, {results['seconds']:.1f} s",
    }
    if report.unreached:
        rows["never reached"] = f"{len(report.unreached):,} layers, {report.unreached[0]} the first"
    return facts(f"Totals of {results['model']}", rows)


def _comparison(found: Int8Comparison) -> Table:
    table = _table(
        "Perplexity in int8, simulated", "rounding", f"columns > {found.threshold:g}", "perplexity", "less float32"
    )
    table.add_row("float32", "", f"{found.float32:,.3f}", "")
    for row in found.rows:
        columns = "in float32" if row.decomposition else "in int8"
        table.add_row(row.way, columns, f"{row.perplexity:,.3f}", f"{row.difference:+,.3f}")
    return table


def _table(title: str, *columns: str) -> Table:
    """The first column is names, the others are numbers."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table
