"""`lilliput eval`: how good a model is, with or without an adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lilliput.cli.base import facts, open_base, size
from lilliput.cli.door import Adapter, AllowOtherBase, Answer, Model, NumberFormat


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
