"""`lilliput data convert`: rows of any known form as chats, or in another form."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from lilliput.cli.base import facts
from lilliput.cli.door import Answer
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lilliput.data import Chat, Converted

_NAMED = 3  # bad rows in the table; --json has more


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, JSON, CSV, TSV or Parquet.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Written: .jsonl, or .json for one JSON array.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORM",
            help="messages, alpaca, dolly, sharegpt, prompt-completion, prompt-response, p3, self-instruct, oasst or "
            "oasst-messages; by default told by the first rows.",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORM",
            help="messages, alpaca, dolly, sharegpt, prompt-completion, prompt-response or p3.",
        ),
    ] = "messages",
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="PART=COLUMN,…", help="Columns of your own; the parts are user, assistant, input and system."
        ),
    ] = None,
    paths: Annotated[
        str, typer.Option(metavar="WHICH", help="oasst: the best chat of a tree, all, or top-2 (the 2 best replies).")
    ] = "best",
    languages: Annotated[
        str, typer.Option("--lang", metavar="NAMES", help="oasst: messages in these languages only, e.g. en,de.")
    ] = "",
    unreviewed: Annotated[
        bool, typer.Option("--unreviewed", help="oasst: also messages that nobody has reviewed.")
    ] = False,
    keep_html: Annotated[bool, typer.Option("--keep-html", help="sharegpt: leave HTML as it is.")] = False,
    max_chars: Annotated[
        int | None, typer.Option(metavar="N", help="Cut chats of more characters into several, between exchanges.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="The same by tokens, as --model and its chat template count them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokens --max-tokens counts; only its tokenizer is read.")
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and count them.")
    ] = False,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="process, or ray for many cores or machines; the result is the same.")
    ] = "process",
    workers: Annotated[int | None, typer.Option(metavar="N", help="ray: at most so many at a time.")] = None,
) -> Answer:
    """Turn a data set of one form into another: chats to tune on, by default.

    Example:  lilliput data convert oasst-trees.jsonl -o chats.jsonl --paths best --lang en

    Example:  lilliput data convert questions.csv -o chats.jsonl --columns user=question,assistant=answer
    """
    from lilliput import data
    from lilliput.data.conversion import characters
    from lilliput.data.engine import engine_of
    from lilliput.data.reading import Choices

    _check_lengths(max_chars, max_tokens, model)
    named = tuple(name.strip().lower() for name in languages.split(",") if name.strip())
    asked: dict[str, Any] = {
        "source": source,
        "target": target,
        "columns": parse_columns(columns) if columns is not None else None,
        "choices": Choices(paths=paths, languages=named, unreviewed=unreviewed, keep_html=keep_html),
        "longest": max_chars if max_tokens is None else max_tokens,
        "length": characters if max_tokens is None else _tokens_of(str(model)),
    }
    with engine_of(engine, workers) as where:
        found = data.convert(file, out, **asked, skip_bad_rows=skip_bad_rows, engine=where)
    return Answer(_results(found, file, out), _people(found, file, out))


def parse_columns(said: str) -> dict[str, str]:
    """ "user=question,assistant=answer" as a mapping. Raises UsageError for a piece without a name on both sides."""
    columns: dict[str, str] = {}
    for piece in said.split(","):
        part, _, column = (word.strip() for word in piece.partition("="))
        if not column or not part:
            raise UsageError(
                f"'{piece}' is no PART=COLUMN", where="--columns", todo="E.g. --columns user=question,assistant=answer."
            )
        if part in columns:
            raise UsageError(f"two columns are said to be the {part}", where="--columns")
        columns[part] = column
    return columns


def _check_lengths(max_chars: int | None, max_tokens: int | None, model: str | None) -> None:
    if max_chars is not None and max_tokens is not None:
        raise UsageError("--max-chars and --max-tokens are both said", todo="Take one of them.")
    if (max_tokens is None) != (model is None):
        missing, there = ("--model", "--max-tokens") if model is None else ("--max-tokens", "--model")
        raise UsageError(f"{there} says nothing without {missing}", todo="Say both, or take --max-chars.")


class _Tokens:
    """The length of a chat in tokens, its template's included; a class, so that it can be sent to a worker."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, chat: Chat) -> int:
        from lilliput.data import make_example

        return len(make_example(chat, self.tokenizer))


def _tokens_of(model: str) -> _Tokens:
    from lilliput.models import load_tokenizer

    return _Tokens(load_tokenizer(model))


# ---- for people ----


def _results(found: Converted, file: Path, out: Path) -> dict[str, Any]:
    results = asdict(found)
    results["skipped"] = [{"where": row.origin, "why": row.reason} for row in found.skipped]
    results["seconds"] = round(found.seconds, 3)
    return {"file": str(file), "out": str(out), **results}


def _people(found: Converted, file: Path, out: Path) -> Group:
    rows = {
        "read": f"{found.rows:,} rows of {file} ({found.source})",
        "written": f"{found.chats:,} rows to {out} ({found.target})",
    }
    for title, counts in (("dropped", found.dropped), ("changed", found.changed)):
        if counts:
            rows[title] = "\n".join(f"{count:,} {reason}" for reason, count in counts.items())
    if found.left:
        rows["not carried over"] = ", ".join(found.left)
    if found.orphans:
        rows["orphans"] = f"{len(found.orphans):,} messages whose tree does not begin in the file, the first at "
        rows["orphans"] += found.orphans[0]
    if found.bad:
        named = [f"{row.origin}: {row.reason}" for row in found.skipped[:_NAMED]]
        more = [f"and {found.bad - _NAMED:,} more"] if found.bad > _NAMED else []
        rows["bad rows skipped"] = "\n".join([f"{found.bad:,}", *named, *more])
    speed = f", {found.rows / found.seconds:,.0f} rows a second" if found.seconds > 1 else ""
    return Group(facts("Converted", rows), Text(f"{found.seconds:.1f} s{speed}"))
