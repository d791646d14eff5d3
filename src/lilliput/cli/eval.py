"""`lilliput eval`: how good a model is, with or without an adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lilliput.cli.base import Base, facts, open_base, open_classifier, size
from lilliput.cli.door import Adapter, AllowOtherBase, Answer, LabelColumn, Model, NumberFormat, TextColumn
from lilliput.errors import UsageError
from lilliput.progress import say

if TYPE_CHECKING:
    from lilliput.data import Confusion, LabelledTexts
    from lilliput.models import Classifier


def perplexity(
    model: Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Plain text, UTF-8; scored as one string.")],
    adapter: Adapter = None,
    number_format: NumberFormat = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens in a segment.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens between two segments' starts; by default the context.")
    ] = None,
    segments: Annotated[
        int | None, typer.Option(metavar="N", help="Score only the first N segments; by default all.")
    ] = None,
    allow_other_base: AllowOtherBase = False,
) -> Answer:
    """Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

    Each segment is scored on its own (context - 1 predictions); with a stride below the context only new tokens count.

    Example:  lilliput eval perplexity smollm2-135m-instruct --format nf4 --text book.txt --segments 16
    """
    from lilliput.evaluation import perplexity as score
    from lilliput.evaluation import read_text

    words = read_text(text)  # before the model: a wrong path is told at once
    base = open_base(model, number_format=number_format, adapter=adapter, allow_other_base=allow_other_base)
    scored = score(base.model, base.tokenizer, words, context=context, stride=stride, segments=segments)
    results: dict[str, Any] = {
        **asdict(scored),
        "footprint_bytes": base.footprint_bytes,
        "seconds": round(scored.seconds, 3),
        "model": model,
        "format": base.format,
        "adapter": adapter,
        "context": context,
        "stride": stride or context,
    }
    return Answer(results, _table(results, str(text)))


def classify(
    model: Model,
    adapter: Adapter = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Texts with labels: JSON, JSONL, CSV, TSV or Parquet.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text to label; may be repeated.")] = None,
    number_format: NumberFormat = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows at a time.")] = 32,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that are broken.")] = False,
    allow_other_base: AllowOtherBase = False,
) -> Answer:
    """A classifier's accuracy on texts with labels, and its confusion table; or the label of a text.

    The adapter is the run of `lilliput tune MODEL --task classify`; without one, MODEL must be a classifier by itself.

    Example:  lilliput eval classify all-minilm-l6-v2 --adapter runs/sst2 --data test.tsv

    Example:  lilliput eval classify all-minilm-l6-v2 --adapter runs/sst2 --text "A gripping film."
    """
    if data is None and not text:
        raise UsageError("nothing to classify", todo="Give --data FILE or --text TEXT.")
    from lilliput.data import read_labelled

    rows = None
    if data is not None:  # before the model: a wrong path is told at once
        rows = read_labelled(data, text_column=text_column, label_column=label_column, skip_bad_rows=skip_bad_rows)
        if rows.note:
            say(rows.note)
    base, known = open_classifier(
        model, number_format=number_format, adapter=adapter, allow_other_base=allow_other_base
    )
    results: dict[str, Any] = {"model": model, "adapter": adapter, "format": base.format, "labels": known.labels}
    parts: list[RenderableType] = []
    if rows is not None:
        parts += _scored(results, base, known, rows, batch_size, str(data))
    if text:
        parts.append(_labelled(results, base, known, text))
    return Answer({**results, "footprint_bytes": base.footprint_bytes}, Group(*parts))


def _scored(
    results: dict[str, Any], base: Base, known: Classifier, rows: LabelledTexts, batch_size: int, where: str
) -> list[RenderableType]:
    """Count how many rows are labelled right, into `results`; what is shown of it."""
    from lilliput.data import encode_labelled
    from lilliput.evaluation import score_classes

    examples = encode_labelled(rows, base.tokenizer, known.labels, max_length=known.max_length)
    score = score_classes(base.model, examples, known.pad_token_id, batch_size=batch_size)
    found, counts = score.confusion, score.confusion.to_json()
    results |= {
        **counts,
        "loss": score.loss,
        "truncated_rows": len(examples.overlong),
        "skipped_rows": len(rows.skipped),
        "seconds": round(score.seconds, 3),
    }
    cut = f", {len(examples.overlong):,} cut at {known.max_length:,} tokens" if examples.overlong else ""
    left_out = f", {len(rows.skipped):,} broken ones left out" if rows.skipped else ""
    said = {
        "accuracy": f"{found.accuracy:.2%}; always saying the most frequent class: {found.majority:.2%}",
        "macro F1": f"{found.macro_f1:.4f}",
        "rows": f"{found.rows:,}{cut}{left_out}",
        "model": f"{results['model']} ({_numbers(base.format)}), {size(base.footprint_bytes)} in memory",
        "adapter": results["adapter"] or "none",
        "time": f"{score.seconds:.1f} s ({found.rows / max(score.seconds, 1e-9):,.0f} rows/s)",
    }
    return [facts(f"Accuracy on {where}", said), _confusion_table(found)]


def _confusion_table(found: Confusion) -> Table:
    """Rows: what is true; columns: what was predicted."""
    table = Table("true \\ predicted")
    for name in found.labels:
        table.add_column(Text(name), justify="right")
    for name, counts in zip(found.labels, found.table, strict=True):
        table.add_row(Text(name, style="bold"), *(f"{count:,}" for count in counts))
    return table


def _labelled(results: dict[str, Any], base: Base, known: Classifier, texts: list[str]) -> Table:
    """Label single texts, into `results`; what is shown of it."""
    from lilliput.evaluation import predict

    found = predict(base.model, base.tokenizer, texts, known)
    results["texts"] = [{"text": text, **asdict(one)} for text, one in zip(texts, found, strict=True)]
    table = Table("label", "probability", "text", title_justify="left")
    for text, one in zip(texts, found, strict=True):
        table.add_row(Text(one.label), f"{one.probability:.4f}", Text(text))
    return table


def _table(results: dict[str, Any], text: str) -> Table:
    speed = results["tokens"] / max(results["seconds"], 1e-9)
    rows = {
        "perplexity": f"{results['perplexity']:.3f}",
        "tokens predicted": f"{results['tokens']:,} in {results['segments']:,} segments of {results['context']:,}",
        "model": f"{results['model']} ({_numbers(results['format'])}), {size(results['footprint_bytes'])} in memory",
        "adapter": results["adapter"] or "none",
        "time": f"{results['seconds']:.1f} s ({speed:,.0f} tokens/s)",
    }
    return facts(f"Perplexity of {text}", rows)


def _numbers(number_format: str) -> str:
    return "as its checkpoint is" if number_format == "none" else number_format
